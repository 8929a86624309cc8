"""How an index on disk is made: plans within memory, shards, packing, builds that are killed, and the memory of a whole one."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.array_file import Filling, read_arrays
from anabranch.graph.beside import live_folder
from anabranch.graph.disk import DiskIndex, build, making
from anabranch.graph.disk.blocks import PAGE, block_of, element_bytes
from anabranch.graph.disk.packing import merge_links, packed
from anabranch.graph.disk.plan import planned
from anabranch.graph.disk.shards import assigned, centres_of
from anabranch.graph.disk.source import Rows
from anabranch.graph.disk.stored import KIND


def drawn(count, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


# Plans


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 10**8),
    dim=st.integers(1, 4096),
    share=st.floats(0.001, 3),
    M=st.integers(2, 64),
    has_ids=st.booleans(),
)
def test_a_plan_fits_or_says_what_would(count, dim, share, M, has_ids):
    memory = 1 + int(share * 4 * count * dim)
    try:
        plan = planned(count, dim, memory, M, has_ids=has_ids)
    except CapacityError as error:
        needed = int(re.search(r"needs ([\d,]+)", str(error))[1].replace(",", ""))
        assert needed > memory
        plan = planned(count, dim, needed, M, has_ids=has_ids)
        with pytest.raises(CapacityError):
            planned(count, dim, needed - 1, M, has_ids=has_ids)
        memory = needed
    row = 4 * -(-dim // 16) * 16
    assert plan.shard * (row + 8 * M) + 4 * count <= memory
    assert plan.code_bytes * count + 4 * count <= memory
    assert plan.num_shards * plan.shard >= (count if plan.num_shards == 1 else 2 * count)
    assert 1 <= plan.code_bytes <= dim


def test_more_memory_means_fewer_shards_and_longer_codes():
    plans = [planned(10**6, 128, size << 20, 16) for size in (64, 128, 256, 1024)]
    assert [plan.num_shards for plan in plans] == sorted((plan.num_shards for plan in plans), reverse=True)
    assert plans[0].num_shards > 3
    assert plans[-1].num_shards == 1
    assert plans[-1].code_bytes == 32
    # Codes, tables and the entry layer of a fifth of the vectors.
    assert planned(10**6, 128, 10**6 * 128 * 4 // 5, 16).code_bytes == 32


def test_wrong_arguments_are_told(tmp_path):
    rows, place = drawn(20, 4), tmp_path / "i.anb"
    for call, error, said in (
        (lambda: build(rows, place, metric="l1"), InputError, "metric is 'l1'"),
        (lambda: build(rows, place, M=0), InputError, "M is 0"),
        (lambda: build(rows, place, memory=0), InputError, "memory is 0"),
        (lambda: build(rows, place, num_shards=0), InputError, "num_shards is 0"),
        (lambda: build(rows, place, code_bytes=5), InputError, "codes of 1 to 4 bytes"),
        (lambda: build(rows, place, memory=1000), CapacityError, "needs"),
        (lambda: build(rows, place, num_shards=40_000), CapacityError, "shards"),
        (lambda: build(rows, place, ids=[1, 1]), InputError, "one for each"),
        (lambda: build(rows, place, ids=[0] * 20), InputError, "stands there before"),
        (lambda: build(rows[0], place), InputError, "shape"),
        (lambda: build(rows[:0], place), InputError, "at least one"),
        (lambda: build(np.array([["a"]]), place), InputError, "numbers"),
        (lambda: build(np.full((3, 2), np.inf), place), InputError, "row 0 of vectors is not finite"),
        (lambda: build(np.zeros((3, 2)), place, metric="cosine"), InputError, "no direction"),
        (lambda: build(rows, tmp_path), DataError, "cannot write"),
    ):
        with pytest.raises(error, match=said):
            call()
    assert not any(path.is_file() for path in tmp_path.iterdir())


def test_the_row_that_is_bad_is_named_in_pieces():
    rows = drawn(300, 4)
    rows[250, 1] = np.nan
    source = Rows(rows, "l2")
    assert len(source.piece(0, 250)) == 250
    with pytest.raises(InputError, match="row 50 of the vectors from 200 on is not finite"):
        source.piece(200, 300)


# Shards


@pytest.mark.parametrize("kind", ["clustered", "equal", "far"])
def test_every_vector_is_in_two_shards_and_none_is_too_large(kind):
    rows = drawn(700, 5)
    if kind == "equal":
        rows[:] = 1
    elif kind == "far":
        rows[:600] *= 1e-3
    centre_CD = centres_of(rows, 5, 0)
    shard_N2 = assigned(Rows(rows, "l2"), centre_CD, 320, 64)
    assert (shard_N2[:, 0] >= 0).all()
    assert (shard_N2[:, 0] != shard_N2[:, 1]).all()
    number_C = np.bincount(shard_N2[shard_N2 >= 0], minlength=5)
    assert number_C.max() <= 320
    # Only where all other shards are full.
    assert (shard_N2 >= 0).all() or (number_C == 320).sum() == 4
    # The first come first: nobody was there before them.
    near = ((rows[:60, None] - centre_CD) ** 2).sum(2)
    if kind == "clustered":
        np.testing.assert_array_equal(np.sort(near.argsort(1)[:, :2], 1), np.sort(shard_N2[:60], 1))


def test_where_one_shard_alone_has_room_a_vector_is_in_one():
    rows = np.ones((10, 2), np.float32)
    shard_N2 = assigned(Rows(rows, "l2"), centres_of(rows, 3, 0), 7, 4)
    assert shard_N2[8:].tolist() == [[2, -1]] * 2
    assert np.bincount(shard_N2[:8].reshape(-1)).tolist() == [7, 7, 2]


@pytest.mark.parametrize(("shards", "dim"), [(5, 3), (60, 600)])
def test_equal_vectors_make_an_index_in_shards(tmp_path, shards, dim):
    """With 60 there are more parts that nothing leads between, nor a block, than elements of the entry layer: each is begun at."""
    rows = np.ones((400, dim), np.float32)
    with build(rows, tmp_path / "i.anb", M=4, code_bytes=2, num_shards=shards, workers=1) as index:
        assert index.stats()["shards"] == shards
        assert (index.stats()["per_block"] == 1) == (dim == 600)
        assert sorted(index.search(rows[:1], 400, 400)[0][0].tolist()) == list(range(400))


# Blocks


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 3000), links=st.integers(0, 300))
def test_elements_fit_into_blocks_of_whole_pages(dim, links):
    block, per = block_of(dim, links)
    assert block % PAGE == 0
    assert per >= 1
    assert per * element_bytes(dim, links) + 8 <= block
    assert element_bytes(dim, links) >= 4 * dim + 12 + 4 * links
    # No page without an element, and none that would not do.
    assert per > 1 or block - PAGE < element_bytes(dim, links) + 8 or block == PAGE


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), room=st.integers(1, 6), per=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_packing_by_hand(count, room, per, seed):
    draw = np.random.default_rng(seed)
    link_NL = draw.integers(0, count + 1, (count, room)).astype(np.int32)
    wanted = [list(dict.fromkeys(link for link in row if link)) for row in link_NL.tolist()]
    degree_N = np.zeros(count, np.int32)
    assert merge_links(link_NL, degree_N) == max(map(len, wanted))
    assert [[link for link in row if link] for row in link_NL.tolist()] == wanted
    assert degree_N.tolist() == [sum(row.count(number + 1) for row in wanted) for number in range(count)]
    order_N, slot_N = packed(link_NL, degree_N, per)
    assert sorted(order_N.tolist()) == list(range(count))
    assert slot_N[order_N].tolist() == list(range(count))
    lead = [degree_N[order_N[begin : begin + per]].sum() for begin in range(0, count // per * per, per)]
    assert lead == sorted(lead, reverse=True)


def test_neighbours_share_blocks():
    # A path whose numbers are shuffled.
    order = np.random.default_rng(0).permutation(100)
    link_NL = np.zeros((100, 2), np.int32)
    link_NL[order[:-1], 0] = order[1:] + 1
    link_NL[order[1:], 1] = order[:-1] + 1
    degree_N = np.zeros(100, np.int32)
    merge_links(link_NL, degree_N)
    slot_N = packed(link_NL, degree_N, 5)[1]
    assert (slot_N[order[1:]] // 5 == slot_N[order[:-1]] // 5).mean() > 0.6


# The file


def test_threads_change_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(making.secrets, "randbits", lambda bits: 7)
    rows = drawn(400, 6)
    for shards in (1, 3):
        for threads in (1, 2):
            build(rows, tmp_path / f"{threads}.anb", M=4, num_shards=shards, workers=threads).close()
        assert (tmp_path / "1.anb").read_bytes() == (tmp_path / "2.anb").read_bytes()


def test_the_file_is_one_of_ours_and_blocks_lie_on_pages(tmp_path):
    build(drawn(100, 6), tmp_path / "i.anb", M=4, workers=1).close()
    found = read_arrays(tmp_path / "i.anb", KIND, mmap=True, verify=True)
    assert found.arrays["blocks"].offset % PAGE == 0
    with DiskIndex(tmp_path / "i.anb") as index:
        assert index._form.place % PAGE == 0
        assert index.size_bytes == (tmp_path / "i.anb").stat().st_size


def test_progress_rises_to_all(tmp_path):
    for shards in (1, 3):
        told = []
        build(drawn(300, 4), tmp_path / "i.anb", M=4, num_shards=shards, workers=1, progress=told.append).close()
        assert told == sorted(told)
        assert told[-1] == 300


def _killed(place, when, shards):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "blocks":
        Filling.put = kill
    elif when == "checksums":
        Filling.crc = kill
    build(drawn(300, 4), place, M=4, num_shards=shards, workers=1, progress=kill if when == "links" else None)


@pytest.mark.parametrize("when", ["links", "blocks", "checksums"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_build_that_is_killed_leaves_what_was_there(tmp_path, when, is_there):
    place = tmp_path / "i.anb"
    if is_there:
        build(drawn(50, 4, 1), place, M=4, workers=1).close()
    before = place.read_bytes() if is_there else None
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(place, when, 3))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (place.read_bytes() if place.exists() else None) == before
    # What says that no changes may be taken of the one that is replaced: it goes when that is done.
    held = live_folder(place)
    assert held.exists() == (is_there and when != "links")
    left = [path.name for path in tmp_path.iterdir() if path not in (place, held)]
    # Links have no name; of the last step a temporary file stays, as of all our files.
    assert len(left) == (when != "links")
    assert all(name.startswith(".i.anb.") for name in left)
    build(drawn(60, 4), place, M=4, workers=1).close()
    assert not held.exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="no room left on disk"):
        build(drawn(300, 4), tmp_path / "i.anb", M=4, num_shards=3, workers=1)
    assert not list(tmp_path.iterdir())


# Memory

LIMITED = """
import resource, sys
import numpy as np
from anabranch.graph.disk import DiskIndex, build

def data():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))

vectors = np.load(sys.argv[1], mmap_mode="r")
place, memory, shards = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
options = {"M": 4, "ef_construction": 16, "workers": 1}
# Kernels are compiled or read first.
small = build(np.array(vectors[:2000]), place, num_shards=3, **options)
small.search(vectors[:2], 5)
small.close()
# What Python itself takes beside arrays is within the last of these.
resource.setrlimit(resource.RLIMIT_DATA, (data() + memory + (1 << 20), resource.RLIM_INFINITY))
index = build(vectors, place, memory=memory, **options)
assert index.stats()["shards"] >= shards, index.stats()
ids = index.search(vectors[::250], 10, 80)[0]
print(float((ids[:, 0] == np.arange(0, len(vectors), 250)).mean()))
try:
    np.ones(3 * memory, np.uint8)
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is of Linux")
def test_an_index_is_made_and_searched_within_its_memory(tmp_path):
    """RLIMIT_DATA counts what is private and can be written, as arrays are, and not the system's cache of files."""
    draw = np.random.default_rng(0)
    centre = draw.standard_normal((30, 128))
    np.save(
        tmp_path / "v.npy",
        (centre[draw.integers(0, 30, 12_000)] + 0.4 * draw.standard_normal((12_000, 128))).astype(np.float32),
    )
    memory = 12_000 * 128 * 4 // 3
    command = [sys.executable, "-c", LIMITED, tmp_path / "v.npy", tmp_path / "i.anb", str(memory), "3"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=280, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, limited = done.stdout.split()
    assert float(found) > 0.9
    assert limited == "limited"
