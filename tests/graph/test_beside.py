"""What may not take the place of what is there: an index that took changes, a folder that holds something else."""

import ast
import errno
import gc
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import anabranch
from anabranch.errors import DataError, InputError
from anabranch.graph import HNSW, FullyPPR, Graph, PowerWalk, beside, write_graph
from anabranch.graph.beside import (
    FolderLock,
    NoLocksError,
    foreign_parts,
    live_folder,
    new_file,
    remove_parts,
    replacing,
)
from anabranch.graph.hnswlib_compat import Index
from anabranch.graph.live import LiveIndex, open_index
from anabranch.graph.names import Names, write_names
from anabranch.graph.rows import SparseRows
from anabranch.graph.stored_folder import FACTS, SCORES, VECTORS, WALKS, check_place, read_facts

GRAPH = Graph.from_edges([0, 1, 2], [1, 2, 0])
ROWS = np.eye(4, dtype=np.float32)


def made():
    index = HNSW(4, workers=1)
    index.add(ROWS)
    return index


@pytest.fixture
def changed(tmp_path):
    """An index of whose vectors a server took one out."""
    path = tmp_path / "index.anb"
    made().save(path)
    with LiveIndex.open(path) as live:
        live.delete([3])
    return path


def compatible(path):
    index = Index("l2", 4)
    index.init_index(4)
    index.save_index(path)


WRITERS = {
    "the same index": lambda path: open_index(path).save(path),
    "another index": lambda path: made().save(path),
    "hnswlib": compatible,
    "graph": GRAPH.save,
    "edges": lambda path: write_graph(GRAPH, path, format="edges"),
    "rows": SparseRows.from_rows([], 3).save,
    "walks": PowerWalk(walks=2, workers=1).build(GRAPH).save,
    "walks on disk": lambda path: PowerWalk(walks=2, workers=1).build(GRAPH, out=path),
    "scores": lambda path: FullyPPR(walks=2, workers=1, out=path).fit(GRAPH),
    "names": lambda path: write_names(path, Names(["a", "b", "c", "d"])),
}


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_over_an_index_that_took_changes(changed, name):
    before = {file: file.read_bytes() for file in changed.parent.rglob("*") if file.is_file()}
    with pytest.raises(
        InputError, match=r"index\.anb\.live holds changes of .*index\.anb, which would be lost .* name another file"
    ):
        WRITERS[name](changed)
    assert {file: file.read_bytes() for file in changed.parent.rglob("*") if file.is_file()} == before
    assert len(open_index(changed)) == 3


@pytest.mark.parametrize("name", WRITERS)
def test_what_took_none_is_replaced_as_ever(tmp_path, name):
    path = tmp_path / "index.anb"
    made().save(path)
    with LiveIndex.open(path):
        WRITERS[name](path)
    assert sorted(file.name for file in tmp_path.iterdir()) in (["index.anb"], ["index.anb", "index.anb.names"])


def test_everything_here_that_writes_a_file_asks_first():
    """`atomic_file` itself would not: only what has no path that a user gave may use it."""
    package = Path(anabranch.__file__).parent
    found = set()
    for folder in (package / "graph", package / "cli" / "graph"):
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "anabranch.files":
                    found |= {
                        (str(file.relative_to(package)), name.name) for name in node.names if "atomic" in name.name
                    }
    # Changes of an index lie in its own folder; those of JSON are files of a folder that is ours.
    assert found == {
        ("graph/beside.py", "atomic_file"),
        ("graph/array_file.py", "atomic_file"),
        ("graph/live/log.py", "atomic_file"),
        ("graph/adapters/documents.py", "atomic_write_json"),
        ("graph/fully_ppr/chunks.py", "atomic_write_json"),
        ("graph/fully_ppr/result.py", "atomic_write_json"),
        ("graph/fully_ppr/manifest.py", "atomic_write_json"),
        ("graph/fully_ppr/spark.py", "atomic_folder"),
    }


def test_a_file_system_without_locks_keeps_nothing_from_being_written(tmp_path, monkeypatch):
    path = tmp_path / "index.anb"
    made().save(path)

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(beside.fcntl, "flock", none)
    made().save(path)
    with (
        LiveIndex.open(path) as live,
        pytest.raises(NoLocksError, match=r"cannot be locked .* a file system with locks"),
    ):
        live.delete([1])
    assert not live_folder(path).exists()
    with new_file(tmp_path / "other.csv") as temporary:
        temporary.write_text("x")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.anb", "other.csv"]


@pytest.mark.parametrize("manifest", [False, True])
def test_a_folder_of_other_things_is_no_place_for_parts(tmp_path, manifest):
    out, mine = tmp_path / "scores.anb", tmp_path / "scores.anb.parts" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    if manifest:
        (mine.parent / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"scores\.anb\.parts holds thesis\.txt, which would be lost.* move it away"):
        FullyPPR(walks=2, workers=1, out=out).fit(GRAPH)
    assert mine.read_text() == "mine"
    mine.unlink()
    # Of a write that was broken off.
    (mine.parent / ".manifest.json.abcdefgh").touch()
    (mine.parent / "manifest.json").unlink(missing_ok=True)
    FullyPPR(walks=2, workers=1, out=out).fit(GRAPH)
    assert not mine.parent.exists()


def test_a_result_takes_the_place_of_its_own_kind_alone():
    held = {
        SCORES: {"kind": SCORES},
        VECTORS: {"kind": VECTORS},
        WALKS: {"kind": WALKS},
    }
    older = {SCORES: {"num_nodes": 1, "is_all": True}, VECTORS: {"num_nodes": 1, "dim": 2}}
    names = ["part-0.parquet", "_SUCCESS", ".part-0.parquet.crc", FACTS]
    for facts in (held, older):
        for kind, there in facts.items():
            for wanted in held:

                def place(there=there, wanted=wanted, kind=kind):
                    check_place("out", names, lambda _, there=there: json.dumps(there), wanted)

                if wanted == kind:
                    place()
                    continue
                with pytest.raises(
                    DataError, match=r"out holds the .* of another run, not .*, and would be lost; choose a new folder"
                ):
                    place()
    check_place("out", [], lambda _: "", SCORES)
    check_place("out", ["part-0.parquet"], lambda _: "", SCORES, is_publishing=True)
    for text in ("{", "[]", "[" * 100_000):
        with pytest.raises(DataError, match="out holds what this release cannot read"):
            check_place("out", names, lambda _, text=text: text, SCORES)
    with pytest.raises(DataError, match=r"out holds part-0\.parquet, which would be lost"):
        check_place("out", names[:3], lambda _: "", SCORES)
    with pytest.raises(DataError, match=r"out holds thesis\.txt, which would be lost"):
        check_place("out", [*names, "thesis.txt"], lambda _: "", SCORES)


def test_facts_of_another_kind_are_told(tmp_path):
    (tmp_path / FACTS).write_text(json.dumps({"kind": WALKS}))
    with pytest.raises(
        DataError, match=r"cannot read the vectors in .*, which holds the index of walks of another run"
    ):
        read_facts(tmp_path, VECTORS)


@pytest.mark.parametrize("name", [".env", ".git", ".DS_Store", ".manifest.json.backup", "chunk-1.anb.bak", "notes"])
@pytest.mark.parametrize("manifest", [False, True])
def test_what_is_hidden_is_not_ours_for_that(tmp_path, name, manifest):
    out, mine = tmp_path / "scores.anb", tmp_path / "scores.anb.parts" / name
    mine.mkdir(parents=True)
    if manifest:
        (mine.parent / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"which would be lost"):
        FullyPPR(walks=2, workers=1, out=out).fit(GRAPH)
    assert mine.is_dir()
    assert sorted(file.name for file in mine.parent.iterdir()) == sorted([name] + ["manifest.json"] * manifest)


def test_what_comes_into_the_folder_of_parts_stays(tmp_path):
    out, parts = tmp_path / "scores.anb", tmp_path / "scores.anb.parts"

    def progress(done, total):
        if done:
            # Called as ours, and not written by us.
            for name in ("thesis.txt", ".chunk-000000.anb.abcdefgh", "chunk-000009.anb"):
                (parts / name).write_text("mine")
            (parts / ".chunk-000001.anb.abcdefgh").write_bytes(beside.MAGIC)

    FullyPPR(walks=2, workers=1, out=out, progress=progress).fit(GRAPH)
    assert out.is_file()
    assert {file.name for file in parts.iterdir()} == {"thesis.txt", "chunk-000009.anb", ".chunk-000000.anb.abcdefgh"}


def test_steps_of_a_run_are_removed_and_nothing_else(tmp_path):
    for name in ("walks-000001", "records", "photos"):
        (tmp_path / "parts" / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "parts" / "lock").touch()
    names = [
        "walks-000001",
        "records",
        "photos",
        ".manifest.json.new.crc",
        ".manifest.json.crc",
        "manifest.json.new",
        "lock",
    ]
    assert foreign_parts(names, r"records|walks-\d+") == ["photos"]
    remove_parts(tmp_path / "parts", ["walks-000001", "records"])
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["photos"]


def test_two_runs_do_not_share_a_folder_of_parts(tmp_path):
    out, parts = tmp_path / "new" / "scores.anb", tmp_path / "new" / "scores.anb.parts"
    second = []

    def progress(done, total):
        if not second:
            with pytest.raises(
                DataError, match=r"scores\.anb\.parts holds the parts of a run that is under way; wait for it"
            ):
                FullyPPR(walks=2, workers=1, out=out).fit(GRAPH)
            second.append(done)

    FullyPPR(walks=2, workers=1, out=out, progress=progress).fit(GRAPH)
    assert second
    assert [file.name for file in out.parent.iterdir()] == ["scores.anb"]
    (tmp_path / "elsewhere").mkdir()
    for place, what in (((tmp_path / "elsewhere"), "a link"), (None, "a file")):
        parts.unlink(missing_ok=True)
        parts.symlink_to(place) if place else parts.touch()
        with pytest.raises(DataError, match=rf"scores\.anb\.parts is {what}; .* name another place"):
            FullyPPR(walks=2, workers=1, out=out).fit(GRAPH)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_changes_belong_to_the_file_whatever_it_is_called(changed):
    alias = changed.with_name("alias.anb")
    alias.symlink_to(changed.name)
    assert live_folder(alias) == live_folder(changed)
    with LiveIndex.open(alias) as live:
        live.delete([2])
    for path in (alias, changed):
        with pytest.raises(InputError, match="holds changes of"):
            made().save(path)
        assert len(open_index(path)) == 2


def test_an_index_that_came_meanwhile_keeps_its_changes(tmp_path):
    path = tmp_path / "index.anb"

    def late(temporary):
        temporary.write_text("late")
        made().save(path)
        with LiveIndex.open(path) as live:
            live.delete([3])

    with pytest.raises(InputError, match="holds changes of"), new_file(path) as temporary:
        late(temporary)
    assert len(open_index(path)) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.anb", "index.anb.live"]


def test_changes_that_came_before_the_lock_are_seen_under_it(tmp_path, monkeypatch):
    path = tmp_path / "index.anb"
    made().save(path)
    real = beside.FolderLock

    def late(folder, *rest):
        monkeypatch.setattr(beside, "FolderLock", real)
        with LiveIndex.open(path) as live:
            live.delete([3])
        return real(folder, *rest)

    monkeypatch.setattr(beside, "FolderLock", late)
    with pytest.raises(InputError, match="holds changes of"), replacing(path):
        pass
    assert len(open_index(path)) == 3


@pytest.mark.parametrize(
    "held", [{}, {"lock": b"mine"}, {"photo.jpg": b"mine"}, {"photo.jpg": b"mine", "lock": b"mine"}]
)
def test_a_folder_of_the_user_stays(tmp_path, held):
    folder = tmp_path / "graph.txt.live"
    folder.mkdir()
    for name, content in held.items():
        (folder / name).write_bytes(content)
    with new_file(tmp_path / "graph.txt") as temporary:
        temporary.write_text("0 1")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == held


def test_a_lock_that_a_crash_left_goes_with_its_folder(tmp_path):
    folder = tmp_path / "graph.txt.live"
    folder.mkdir()
    (folder / "lock").touch()
    with new_file(tmp_path / "graph.txt") as temporary:
        temporary.write_text("0 1")
    assert [file.name for file in tmp_path.iterdir()] == ["graph.txt"]


# The line at which a file is closed may be interrupted as well: Python closes it then, and warns.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_no_lock_behind(tmp_path):
    """One that came before a lock was anybody's to give back kept all from writing until the process ended, this one too."""
    path, at = tmp_path / "w.anb", 0
    made().save(path)
    content = path.read_bytes()

    def write():
        with beside.new_file(path) as temporary:
            temporary.write_bytes(content)

    is_ended = False
    while not is_ended:
        at += 1
        lines = 0

        def line(frame, event, _, at=at):
            nonlocal lines
            if event == "line":
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return line

        sys.settrace(lambda frame, event, _, line=line: line if frame.f_code.co_filename == beside.__file__ else None)
        try:
            write()
            is_ended = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        # What is left may hang on an error that holds itself.
        gc.collect()
        # As another thread, which is not within, and this one, which is not either.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write).result()
        write()
        assert not getattr(beside._held, "folders", None), f"line {at}"
    assert at > 30


def test_a_lock_is_taken_again_where_another_removed_it_and_is_of_its_owner_alone(tmp_path, monkeypatch):
    folder, real, lost = tmp_path / "index.anb.live", beside.fcntl.flock, []

    def flock(handle, how):
        real(handle, how)
        if len(lost) < 2:
            # Who held it removes it between opening and locking.
            lost.append((folder / "lock").unlink())

    monkeypatch.setattr(beside.fcntl, "flock", flock)
    lock = FolderLock(folder)
    assert len(lost) == 2
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "lock").stat().st_mode & 0o777 == 0o600
    lock.release(clean=True)
    assert not folder.exists()


KILLED = """
import os, signal, sys, types, zlib
from anabranch.graph import array_file
from anabranch.graph.hnsw import HNSW

def crc32(part, found=0):
    if isinstance(part, bytes):
        # Of the header, once the file is begun.
        os.kill(os.getpid(), signal.SIGKILL)
    return zlib.crc32(part, found)

array_file.zlib = types.SimpleNamespace(crc32=crc32)
HNSW(4).save(sys.argv[1])
"""


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    path = tmp_path / "k.anb"
    foreign = [
        ".k.anb.abcdefgh",
        ".k.anb.unfinished-backup",
        "k.anb.unfinished-abcdefgh",
        ".other.anb.unfinished-abcdefgh",
    ]
    for name in foreign:
        (tmp_path / name).write_bytes(beside.MAGIC)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = {file.name for file in tmp_path.iterdir()} - {*foreign}
    assert len(left) == 1
    assert left.pop().startswith(".k.anb.unfinished-")
    made().save(path)
    assert {file.name for file in tmp_path.iterdir()} == {"k.anb", *foreign}


def test_what_a_killed_write_of_parts_left_is_of_the_run(tmp_path):
    names = [".chunk-1.anb.abcdefgh", ".chunk-1.anb.unfinished-abcdefgh", ".manifest.json.unfinished-abcdefgh"]
    for name in [*names, ".chunk-1.anb.unfinished-backup"]:
        (tmp_path / name).write_bytes(beside.MAGIC)
    assert foreign_parts([*names, ".chunk-1.anb.unfinished-backup"], r"chunk-\d\.anb") == [
        ".chunk-1.anb.unfinished-backup"
    ]
    remove_parts(tmp_path, ["chunk-1.anb"])
    assert [file.name for file in tmp_path.iterdir()] == [".chunk-1.anb.unfinished-backup"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_lock_that_is_given_back_is_free_though_a_forked_process_lives(tmp_path):
    """The child has the same open file: it held the lock on until its end, and must not give it back before."""
    lock = FolderLock(tmp_path / "x.live")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        # What it has of the lock ends here, and not what its parent has.
        os.close(write)
        lock.release()
        os.read(read, 1)
        os._exit(0)
    try:
        os.close(read)
        with pytest.raises(DataError, match="is written by another process"):
            FolderLock(tmp_path / "x.live")
        lock.release()
        FolderLock(tmp_path / "x.live").release(clean=True)
    finally:
        os.close(write)
        os.waitpid(child, 0)
