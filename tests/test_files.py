"""Files are whole or as they were: after an error, on a full disk, when killed in the middle."""

import contextlib
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anabranch import files, locks
from anabranch.errors import CapacityError, ConfigError, DataError, InputError
from anabranch.files import atomic_file, atomic_folder, atomic_write, atomic_write_json, atomic_write_text, check_apart
from anabranch.locks import is_locked, locked
from anabranch.places import data_file, data_folder


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden leftovers too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


# Files


def test_text_and_json_by_hand(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "λ = 1\n")
    atomic_write_json(tmp_path / "a.json", {"name": "λ", "values": [1, 2.5]})
    assert (tmp_path / "a.txt").read_bytes() == "λ = 1\n".encode()
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "name": "λ",\n  "values": [\n    1,\n    2.5\n  ]\n}\n'
    )
    assert names(tmp_path) == ["a.json", "a.txt"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_any_text_reads_back(text):
    with tempfile.TemporaryDirectory() as folder:
        atomic_write_text(f"{folder}/a", text)
        assert Path(f"{folder}/a").read_text(encoding="utf-8") == text


def test_parents_are_made_and_the_old_file_is_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    atomic_write_text(str(path), "one")
    atomic_write(path, lambda temporary: temporary.write_text("two"))
    with atomic_file(path) as temporary:
        temporary.write_text("three")
        assert path.read_text() == "two"
        assert temporary.parent == path.parent
    assert path.read_text() == "three"
    assert names(path.parent) == ["a.txt"]


def test_new_files_have_the_rights_the_user_asked_for(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "x")
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "b").write_text("x")
        assert os.umask(0o027) == 0o027  # left as it was found
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o750


def test_a_file_that_is_replaced_keeps_who_may_read_it_and_a_secret_is_nobody_elses(tmp_path):
    (tmp_path / "a").write_text("secret")
    (tmp_path / "a").chmod(0o600)
    atomic_write_text(tmp_path / "a", "another")
    with atomic_file(tmp_path / "b", mode=0o640) as temporary:
        temporary.write_text("x")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    # Not even for those who may read the other file: one that was private stays so.
    with atomic_file(tmp_path / "a", mode=0o644) as temporary:
        temporary.write_text("x")
    assert [files.mode_of(tmp_path / name) for name in "ab"] == [0o600, 0o640]


NAMES = st.sampled_from(
    ["a", "b", "d/a", "d/b", "d", "d/e/a", "link", "hard", "folder", "folder/a", "new", "d/new", "./a", "d/../a", "\0"]
)


@settings(deadline=None, max_examples=60)
@example(out="d/new", source="d")
@given(out=NAMES, source=NAMES)
def test_what_is_written_is_apart_from_what_is_read(tmp_path_factory, out, source):
    place = tmp_path_factory.mktemp("apart")
    (place / "d/e").mkdir(parents=True)
    for name in ("a", "b", "d/a", "d/b", "d/e/a"):
        (place / name).write_text(name)
    (place / "link").symlink_to("d/a")
    (place / "folder").symlink_to("d")
    os.link(place / "d/a", place / "hard")
    # By hand: what each name is, and what lies in it; a hard link is its file, and lies in no folder but its own.
    files = {
        "a": "a",
        "b": "b",
        "d/a": "x",
        "d/b": "y",
        "d/e/a": "z",
        "link": "x",
        "hard": "x",
        "folder/a": "x",
        "./a": "a",
        "d/../a": "a",
    }
    holds = {"d": {"x", "y", "z"}, "folder": {"x", "y", "z"}}
    written, read = ({files[name]} if name in files else holds.get(name, set()) for name in (out, source))
    # What is not there yet can be no more written into a folder that is read than what is there.
    if out == "d/new":
        written = {"n"}
    read = read | ({"n"} if source in holds else set())
    is_lost = (
        bool(written & read) and not (out == "hard" and source in holds) and not (source == "hard" and out in holds)
    )
    with pytest.raises(InputError, match="would be lost") if is_lost else contextlib.nullcontext():
        check_apart([place / out], [place / source])


def test_whether_an_output_is_there_changes_no_answer(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "g.db").write_text("")
    for name, source in (
        ("texts/o", "texts"),
        ("texts/new/o", "texts"),
        ("g.db-wal", "g.db"),
        ("o", "texts"),
        ("o", "g.db"),
    ):
        out, answers = tmp_path / name, []
        for _ in range(2):
            try:
                answers.append(check_apart([out], [tmp_path / source]))
            except InputError as error:
                answers.append(str(error))
            out.parent.mkdir(exist_ok=True)
            out.write_text("")
        assert answers[0] == answers[1]
        assert (answers[0] is None) == (name == "o")
        out.unlink()


def test_two_outputs_are_not_written_into_one_place(tmp_path):
    check_apart([tmp_path / "a", None, tmp_path / "b"], [None, "a name", tmp_path / "c"])
    with pytest.raises(InputError, match="is to be written twice"):
        check_apart([tmp_path / "a", tmp_path / "d/../a"], [])


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), ConfigError("wrong")])
def test_failing_writer_leaves_the_old_file_and_its_own_error(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(path, write)
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"^cannot write .*/file/a: (Not a directory|File exists)"):
        atomic_write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(DataError, match=r"^cannot write .*/folder: Is a directory"):
        atomic_write_text(tmp_path / "folder", "x")
    with pytest.raises(DataError, match=r"^cannot write /proc/anabranch: "):
        atomic_write_text("/proc/anabranch", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_another_file_missing_on_the_way_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*/a: No such file or directory \(.*/source\)$"):
        atomic_write(tmp_path / "a", lambda temporary: temporary.write_text((tmp_path / "source").read_text()))


# Folders


def test_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "runs" / "a"
    with atomic_folder(path, replacing=".*") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not path.exists()
    assert names(tmp_path) == ["runs", "runs/a", "runs/a/sub", "runs/a/sub/x"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_folder_takes_the_place_of_the_old_one(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    path = tmp_path / "a"
    for content in ("1", "2"):
        with atomic_folder(path, replacing=".*") as temporary:
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["a", "a/2"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_linux_exchanges_in_one_step(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a", "b", "b/x"]
    assert not files._exchange(tmp_path / "a", tmp_path / "missing")


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failing_folder_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()

    def fill() -> None:
        with atomic_folder(path, replacing=".*") as temporary:
            (temporary / "new").touch()
            raise error

    with pytest.raises(type(error)):
        fill()
    assert names(tmp_path) == ["a", "a/old"]


def test_old_folder_is_put_back_if_the_second_step_fails(tmp_path):
    # Regression: a failure between the two renames left no folder under the name.
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(FileNotFoundError):
        files._swap(tmp_path / "missing", tmp_path / "a")
    assert names(tmp_path) == ["a", "a/old"]


def test_folder_takes_the_place_of_what_it_may_replace_and_of_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    with atomic_folder(path) as temporary:  # an empty one may go
        (temporary / "part-1").touch()
    for replacing, kept in (("", "part-1"), (r"part-\d", "thesis.txt")):
        (path / "thesis.txt").write_text("years of work")
        with (
            pytest.raises(DataError, match=rf"a holds {kept}, which would be lost"),
            atomic_folder(path, replacing=replacing),
        ):
            pytest.fail("work was begun whose result has no place")
        assert names(tmp_path) == ["a", "a/part-1", "a/thesis.txt"]
    (path / "thesis.txt").unlink()
    with (
        pytest.raises(DataError, match=r"holds thesis\.txt"),
        atomic_folder(path, replacing=r"part-\d") as temporary,
    ):
        (path / "thesis.txt").write_text("put there meanwhile")
    assert names(tmp_path) == ["a", "a/part-1", "a/thesis.txt"]


def test_folder_does_not_take_the_place_of_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    with (
        pytest.raises(DataError, match="it is a file, and a folder is to take its place"),
        atomic_folder(tmp_path / "a"),
    ):
        pass
    assert (tmp_path / "a").read_text() == "x"
    assert names(tmp_path) == ["a"]


def test_folder_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "x").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["big", "big/x", "link"]


def test_error_inside_keeps_its_kind(tmp_path):
    with pytest.raises(ConfigError, match="wrong"), atomic_folder(tmp_path / "a"):
        raise ConfigError("wrong")
    with pytest.raises(CapacityError, match="too big"), atomic_folder(tmp_path / "a"):
        raise CapacityError("too big")
    assert names(tmp_path) == []


FILL = """
import sys, time
from anabranch.files import atomic_folder
with atomic_folder(sys.argv[1]) as temporary:
    (temporary / "half").write_text("x")
    print(temporary, flush=True)
    time.sleep(60)
"""


FILL_FILE = """
import sys, time
from anabranch.files import atomic_file
with atomic_file(sys.argv[1], clears=True) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    time.sleep(60)
"""


def test_a_file_that_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    place = tmp_path / "k[1].anb"
    theirs = (".k[1].anb.abcdefgh", ".k[1].anb.unfinished-notes", ".k1.anb.unfinished-abcdefgh", ".k[1].anb.bak")
    for name in theirs:
        (tmp_path / name).write_text("mine")
    # Of that very name, and no file.
    (tmp_path / ".k[1].anb.unfinished-aaaaaaaa").mkdir()
    (tmp_path / ".k[1].anb.unfinished-bbbbbbbb").symlink_to(theirs[0])
    os.mkfifo(tmp_path / ".k[1].anb.unfinished-cccccccc")
    before = {path.name for path in tmp_path.iterdir()}
    workers = [
        subprocess.Popen([sys.executable, "-c", FILL_FILE, str(place)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        left, held = (Path(worker.stdout.readline().strip()) for worker in workers)
        workers[0].kill()
        workers[0].wait()
        assert left.read_text() == "half"
        # Who does not ask for it removes nothing.
        atomic_write_text(place, "x")
        assert left.exists()
        with atomic_file(place, clears=True) as temporary:
            temporary.write_text("y")
            # One at work beside it sees that it is held.
            with atomic_file(place, clears=True) as other:
                other.write_text("z")
            assert temporary.read_text() == "y"
        assert place.read_text() == "y"
        assert {path.name for path in tmp_path.iterdir()} == before | {held.name, place.name}
        assert all((tmp_path / name).read_text() == "mine" for name in theirs)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()


def test_a_long_name_leaves_no_room_for_more(tmp_path):
    for length in (230, 234, 235, 244):
        place = tmp_path / ("n" * length)
        with atomic_file(place, clears=True) as temporary:
            temporary.write_text("x")
        assert place.read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    own, taken = files.fcntl.flock, []

    def flock(handle, how):
        if len(taken) < 2:
            taken.append(next(tmp_path.iterdir()))
            taken[-1].unlink()
        own(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with atomic_file(tmp_path / "a", clears=True) as temporary:
        temporary.write_text("x")
    assert len(taken) == 2
    assert names(tmp_path) == ["a"]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".a.unfinished-abcdefgh").write_text("half")
    with atomic_file(tmp_path / "a", clears=True) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == [".a.unfinished-abcdefgh", "a"]


def test_what_a_killed_process_left_is_removed_and_what_one_is_at_work_on_is_not(tmp_path):
    place = tmp_path / "model[1]"
    theirs = (".model[1].settings", ".model[1].unfinished-notes", ".model1.unfinished-abcdefgh")
    for name in theirs:
        (tmp_path / name).mkdir()
    workers = [
        subprocess.Popen([sys.executable, "-c", FILL, str(place)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        left, held = (Path(worker.stdout.readline().strip()) for worker in workers)
        workers[0].kill()
        workers[0].wait()
        assert (left / "half").exists()
        with atomic_folder(place) as temporary:
            (temporary / "a").write_text("x")
        assert {path.name for path in tmp_path.iterdir()} == {*theirs, held.name, place.name}
        assert (held / "half").exists()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()


# Full disks


def save_with_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(torch.zeros(50_000), file)


WRITERS = {
    "text": lambda path: path.write_text("x" * 200_000),
    "safetensors": lambda path: save_file({"x": torch.zeros(50_000)}, path),
    "torch": save_with_torch,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_full_disk_is_a_capacity_error_and_leaves_the_old_file(small_disk, write):
    path = small_disk / "a"
    path.write_text("old")
    with pytest.raises(CapacityError, match=r"^no room left on disk to write .*/a; free some or choose another place$"):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert names(small_disk) == ["a"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_full_disk_leaves_the_old_folder(small_disk, write):
    path = small_disk / "a"
    path.mkdir()
    (path / "old").write_text("old")

    def fill() -> None:
        with atomic_folder(path, replacing=".*") as temporary:
            (temporary / "small").write_text("x")
            write(temporary / "large")

    with pytest.raises(CapacityError, match=r"^no room left on disk to write .*/a;"):
        fill()
    assert names(small_disk) == ["a", "a/old"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_file_size_limit_is_a_capacity_error(tmp_path, write):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CapacityError, match="no room left on disk"):
            atomic_write(tmp_path / "a", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


# Killed in the middle


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the old folder is away for an instant")
def test_killed_process_leaves_a_whole_folder(tmp_path):
    """Replace a folder again and again, kill without warning, and look: what stands under the name is whole."""
    script = textwrap.dedent(
        """
        import itertools, sys
        from anabranch.files import atomic_folder
        for turn in itertools.count():
            with atomic_folder(sys.argv[1], replacing=".") as folder:
                for name in "abc":
                    (folder / name).write_text(str(turn))
            if turn == 0:
                print("ready", flush=True)
        """
    )
    path = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == b"ready\n"
    seen = set()
    try:
        process.wait(timeout=0.3)
    except subprocess.TimeoutExpired:
        for _ in range(200):
            seen.add(path.is_dir())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert seen == {True}
    turns = {(path / name).read_text() for name in "abc"}
    assert len(turns) == 1
    assert int(turns.pop()) > 0


def test_data_is_found_in_the_folder_that_the_environment_names(tmp_path, monkeypatch):
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    assert data_folder() is None
    with pytest.raises(DataError, match=r"set ANABRANCH_DATA to the folder that holds text/a\.gz \(from b\)"):
        data_file("text/a.gz", "from b")
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no .*text/a\.gz; ANABRANCH_DATA must name the folder that holds"):
        data_file("text/a.gz")
    (tmp_path / "text" / "a.gz").mkdir(parents=True)
    with pytest.raises(DataError, match="there is no"):
        data_file("text/a.gz")
    (tmp_path / "text" / "b").touch()
    assert data_file("text/b") == tmp_path / "text" / "b"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ANABRANCH_DATA", "~")
    assert data_file("text/b").is_file()


def test_no_path_of_one_machine_stands_in_the_code():
    """A test that finds its data only on the machine of whoever wrote it is skipped, unseen, everywhere else."""
    root = Path(__file__).parents[1]
    found = [
        f"{path.relative_to(root)}: {match}"
        for folder in ("src", "tests", "benchmarks")
        for path in sorted((root / folder).rglob("*.py"))
        if path != Path(__file__)
        for match in re.findall(r"""["'](?:/work|/root)/[^"']*""", path.read_text("utf-8"))
    ]
    assert not found


def test_json_of_half_a_character_reads_back(tmp_path):
    """What a file name that is not UTF-8 becomes in Python."""
    value = {"path": "caf\udce9", "name": "café"}
    atomic_write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


def test_a_lock_is_held_by_one_and_freed_at_the_end(tmp_path):
    path = tmp_path / ".one.lock"
    assert not is_locked(path)
    with locked(path) as first, locked(path) as second:
        assert (first, second) == (True, False)
        assert is_locked(path)
    assert not path.exists()
    path.write_text("what a killed process left")
    assert not is_locked(path)
    with locked(path) as again:
        assert again


def test_whoever_opened_a_lock_file_that_is_gone_makes_another(tmp_path, monkeypatch):
    path, real = tmp_path / ".one.lock", locks._try_lock

    def meanwhile(handle, **options):
        found = real(handle, **options)
        if path.read_text() == "old":
            path.unlink()  # its holder came to its end between our open and our lock
        return found

    path.write_text("old")
    monkeypatch.setattr(locks, "_try_lock", meanwhile)
    with locked(path) as mine:
        assert mine
        assert is_locked(path)


def test_a_lock_is_waited_for_as_long_as_was_said(tmp_path):
    path, told = tmp_path / ".one.lock", []
    with locked(path):
        begin = time.monotonic()
        with locked(path, wait_s=0.2, on_wait=lambda: told.append("waiting")) as second:
            assert not second
        assert time.monotonic() - begin >= 0.2
    assert told == ["waiting"]
    holding, freed = threading.Event(), threading.Event()

    def hold():
        with locked(path):
            holding.set()
            freed.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert holding.wait(60)
    with locked(path, wait_s=math.inf, on_wait=freed.set) as mine:
        assert mine
    other.join()


HOLD = """
import sys, time
from anabranch.locks import locked
with locked(sys.argv[1]) as alone:
    print(alone, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_frees_its_lock(tmp_path):
    path = tmp_path / ".one.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        assert is_locked(path)
        with locked(path) as mine:
            assert not mine
        process.kill()
        process.wait()
    assert path.exists()
    with locked(path) as mine:
        assert mine


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    """As root, ``--out /dev/null`` would take the null device away from all programs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(
            DataError, match=r"cannot write .*: it is a device or a pipe, not a file; choose another name"
        ):
            atomic_write_text(place, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_new_folder_that_another_process_took_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    held, taken = files._held, []

    def after_the_sweep(folder):
        if not taken:
            taken.append(folder)
            files._remove_leftovers(tmp_path / "f")
            assert not folder.exists()
        return held(folder)

    monkeypatch.setattr(files, "_held", after_the_sweep)
    with atomic_folder(tmp_path / "f") as temporary:
        assert temporary != taken[0]
        (temporary / "a").write_text("x")
    assert names(tmp_path) == ["f", "f/a"]
