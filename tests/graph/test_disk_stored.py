"""What a file of an index on disk must hold to be opened: everything that kernels follow without looking."""

import os

import numpy as np
import pytest

from anabranch.errors import BackendError, DataError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.disk import build, is_on_disk, stored
from anabranch.graph.disk.blocks import block_of, element_bytes, padded_width
from anabranch.graph.disk.stored import KIND, _is_sound, read
from anabranch.graph.guarded import CHECKED
from anabranch.graph.hnsw import HNSW

COUNT, DIM = 60, 6
VECTORS = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
IDS = np.random.default_rng(1).permutation(500)[:COUNT]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "i.anb"
    build(VECTORS, path, ids=IDS, M=4, ef_construction=20, code_bytes=3, workers=1).close()
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_it_says_what_it_is(path, mmap):
    held = read(path, mmap=mmap)
    form, (block, per) = held.form, block_of(DIM, held.form.links)
    assert (form.block, form.per, form.size) == (block, per, element_bytes(DIM, form.links))
    assert (form.width, form.elements, form.dim, form.kind, form.cached) == (padded_width(DIM), COUNT, DIM, 0, 0)
    assert (held.metric, held.M, held.shards, held.size_bytes) == ("l2", 4, 1, path.stat().st_size)
    assert held.id_N.tolist() == sorted(IDS.tolist())
    # In the checked build what is mapped is copied, to lie between pages that may not be touched.
    assert isinstance(held.code_NM, np.memmap) == (mmap and not CHECKED)
    # All arrays but the blocks.
    arrays = read_arrays(path, KIND).arrays
    assert held.nbytes == sum(array.nbytes for name, array in arrays.items() if name != "blocks")
    place = form.place
    assert place % 4096 == 0
    assert os.pread(form.file, 4 * DIM, place) == VECTORS[IDS.tolist().index(first_label(held))].tobytes()
    held.left.file.close()


def first_label(held):
    return int.from_bytes(os.pread(held.form.file, 8, held.form.place + 4 * held.form.width), "little")


def test_ids_that_are_numbers_of_rows_are_not_kept(tmp_path):
    with build(VECTORS, tmp_path / "i.anb", M=4, workers=1) as index:
        assert index._held.id_N is None
        assert index._held.nbytes == sum(
            array.nbytes for name, array in read_arrays(index.path, KIND).arrays.items() if name != "blocks"
        )


META = {
    "dim": (0, r"does not describe an index \(dim is 0; it is a whole number from 1"),
    "metric": ("hamming", r"does not describe an index \(metric is 'hamming'\)"),
    "links": (-1, r"does not describe an index \(links is -1; it is a whole number from 0"),
    "seed": (-1, "does not describe an index"),
    "M": ("many", "does not describe an index"),
    "shards": (None, "does not describe an index"),
}


@pytest.mark.parametrize("name", META)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_header_that_describes_none_is_damage(path, tmp_path, name, is_there):
    found, (value, message) = read_arrays(path, KIND), META[name]
    meta = {**found.meta, name: value} if is_there else {key: one for key, one in found.meta.items() if key != name}
    write_arrays(tmp_path / "bad.anb", KIND, found.arrays, meta)
    with pytest.raises(DataError, match=message if is_there else "header does not describe an index"):
        read(tmp_path / "bad.anb", mmap=False)


ARRAYS = {
    "a scalar": (lambda a: {**a, "roots": np.int32(1)}, "holds a single number"),
    "one is missing": (lambda a: {name: array for name, array in a.items() if name != "roots"}, "it holds the arrays"),
    "one too many": (lambda a: {**a, "more": a["roots"]}, "it holds the arrays"),
    "another type": (lambda a: {**a, "slots": a["slots"].astype(np.int64)}, "'slots' is int64"),
    "another length": (lambda a: {**a, "slots": a["slots"][:-1]}, r"'slots' is int32 \[59\]"),
    "ids of another length": (lambda a: {**a, "ids": a["ids"][:-1]}, r"'ids' is int64 \[59\]"),
    "links of another layer": (lambda a: {**a, "entry_links": a["entry_links"][:-1]}, "'entry_links' is int32"),
    "blocks of another width": (lambda a: {**a, "blocks": a["blocks"][:, :-1]}, "'blocks' is uint64"),
    "too few blocks": (lambda a: {**a, "blocks": a["blocks"][:-1]}, "'blocks' is uint64"),
    "a slot twice": (lambda a: {**a, "slots": np.zeros_like(a["slots"])}, "do not fit together"),
    "an id twice": (lambda a: {**a, "ids": np.zeros_like(a["ids"])}, "do not fit together"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_do_not_fit_together_are_damage(path, tmp_path, what):
    found, (change, message) = read_arrays(path, KIND), ARRAYS[what]
    write_arrays(tmp_path / "bad.anb", KIND, change(found.arrays), found.meta)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "bad.anb", mmap=False)
    # The file is not left open.
    held = [
        os.readlink(f"/proc/self/fd/{one}")
        for one in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{one}")
    ]
    assert str(tmp_path / "bad.anb") not in held


def sound(**changes):
    arrays = {
        "slots": np.array([2, 0, 1]),
        "roots": np.array([1]),
        "entry_slots": np.array([2, 0]),
        "entry_links": np.array([[1, -1], [0, -1]]),
        "ids": np.array([3, 5, 9]),
    }
    return _is_sound(arrays | {name: np.array(value) for name, value in changes.items()}, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": [0, 0, 1]},
        {"slots": [3, 0, 1]},
        {"slots": [-1, 0, 1]},
        {"roots": [3]},
        {"roots": [-1]},
        {"roots": np.empty(0, int)},
        {"entry_slots": [2, 2]},
        {"entry_slots": [3, 0]},
        {"entry_links": [[2, -1], [0, -1]]},
        {"entry_links": [[-2, -1], [0, -1]]},
        {"entry_links": np.empty((2, 0), int)},
        {"ids": [3, 3, 9]},
        {"ids": [5, 3, 9]},
        {"ids": [-1, 3, 9]},
    ],
)
def test_numbers_that_lead_nowhere_are_not_sound(changes):
    assert sound()
    assert not sound(**changes)


def test_why_a_block_is_bad(path, tmp_path, monkeypatch):
    whole = path.read_bytes()
    (tmp_path / "cut.anb").write_bytes(whole)
    held = read(tmp_path / "cut.anb", mmap=False)
    last = -(-COUNT // held.form.per) - 1
    assert "is not what was written" in held.why_bad(0)
    os.truncate(tmp_path / "cut.anb", len(whole) - 10)
    assert held.why_bad(last) == f"ends after {held.form.block - 10:,} of {held.form.block:,} bytes"

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert held.why_bad(0) == "cannot be read: input/output error"
    held.left.file.close()


def test_which_files_are_on_disk(path, tmp_path):
    HNSW(DIM).save(tmp_path / "memory.anb")
    (tmp_path / "text").write_text("x")
    assert is_on_disk(path)
    assert not any(is_on_disk(tmp_path / name) for name in ("memory.anb", "text", "none"))


def test_a_system_that_cannot_read_at_a_place_is_told(path, monkeypatch):
    monkeypatch.delattr(stored.os, "pread")
    with pytest.raises(BackendError, match="reads at a place of a file"):
        read(path, mmap=False)
