"""A file of arrays comes back as it was, and a damaged, foreign or other one never comes back at all."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.errors import DataError, InputError
from anabranch.graph.array_file import (
    ALIGN,
    MAGIC,
    Shape,
    filling_arrays,
    kind_of,
    read_arrays,
    read_beside,
    verify,
    write_arrays,
)

ARRAYS = {"ids": np.arange(7, dtype=np.int32), "weights": np.linspace(0, 1, 5, dtype=np.float32).reshape(5, 1)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.anb"
    write_arrays(path, "demo", ARRAYS, {"is_directed": True, "note": "é"})
    return path


def same(found, arrays):
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype.newbyteorder("<")
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_layout_by_hand(file):
    raw = file.read_bytes()
    assert raw[:8] == MAGIC == b"ANABARR1"
    length, whole = np.frombuffer(raw[8:24], "<u8").tolist()
    header = json.loads(raw[24 : 24 + length])
    assert whole == len(raw)
    assert int(np.frombuffer(raw[24 + length : 28 + length], "<u4")[0]) == zlib.crc32(raw[24 : 24 + length])
    assert (header["kind"], header["version"], header["meta"]) == ("demo", 1, {"is_directed": True, "note": "é"})
    start = -(-(28 + length) // ALIGN) * ALIGN
    first, second = header["arrays"]
    assert first == {
        "name": "ids",
        "dtype": "<i4",
        "shape": [7],
        "offset": 0,
        "crc": zlib.crc32(ARRAYS["ids"].tobytes()),
    }
    assert second["offset"] == 64
    assert raw[start : start + 28] == ARRAYS["ids"].tobytes()
    assert len(raw) == start + 128


def test_comes_back(file):
    for mmap in (False, True):
        found = read_arrays(file, "demo", mmap=mmap)
        same(found.arrays, ARRAYS)
        assert found.meta == {"is_directed": True, "note": "é"}
        assert found.version == 1
    assert kind_of(file) == "demo"
    verify(file, "demo")


@given(
    st.dictionaries(
        st.text(max_size=5),
        hnp.arrays(
            st.sampled_from(["<i4", ">i8", "<f4", ">f8", "<u2", "|b1", "<U3", "|S4", "<c8", "<f2"]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=40)
def test_every_type_and_shape_comes_back(tmp_path_factory, arrays, mmap):
    path = tmp_path_factory.mktemp("f") / "a.anb"
    write_arrays(path, "demo", arrays)
    same(read_arrays(path, "demo", mmap=mmap).arrays, arrays)


def test_arrays_that_are_not_contiguous(tmp_path):
    array = np.arange(24).reshape(4, 6)
    arrays = {"turned": array.T, "skipped": array[::2, ::-3], "scalar": np.array(3)}
    write_arrays(tmp_path / "a", "demo", arrays)
    same(read_arrays(tmp_path / "a", "demo").arrays, {name: np.asarray(a, order="C") for name, a in arrays.items()})


def test_mapped_arrays_are_aligned_and_read_only(file):
    for array in read_arrays(file, "demo", mmap=True).arrays.values():
        assert isinstance(array, np.memmap)
        assert array.ctypes.data % ALIGN == 0
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_every_flipped_byte_is_detected_or_harmless(file):
    raw = bytearray(file.read_bytes())
    length = int(np.frombuffer(bytes(raw[8:16]), "<u8")[0])
    start = -(-(28 + length) // ALIGN) * ALIGN
    padding = {*range(28 + length, start), *range(start + 28, start + 64), *range(start + 84, start + 128)}
    harmless = set()
    for place in range(len(raw)):
        for mask in (1, 0x80, 0xFF):
            raw[place] ^= mask
            file.write_bytes(raw)
            try:
                same(read_arrays(file, "demo").arrays, ARRAYS)
                harmless.add(place)
            except DataError:
                pass
            raw[place] ^= mask
    assert harmless == padding  # bytes that belong to nothing


def test_every_truncation_and_every_longer_file_is_detected(file):
    raw = file.read_bytes()
    for end in range(len(raw)):
        file.write_bytes(raw[:end])
        for mmap in (False, True):
            with pytest.raises(DataError, match=r"truncated|does not start"):
                read_arrays(file, "demo", mmap=mmap)
    file.write_bytes(raw + b"\0")
    with pytest.raises(DataError, match="truncated or damaged"):
        read_arrays(file, "demo")


def test_a_mapped_file_is_verified_where_that_is_asked_for(file):
    raw = bytearray(file.read_bytes())
    raw[-64] ^= 1  # in the weights
    file.write_bytes(raw)
    assert read_arrays(file, "demo", mmap=True).arrays["weights"][0, 0] != 0
    for read in (lambda: read_arrays(file, "demo", mmap=True, verify=True), lambda: verify(file, "demo")):
        with pytest.raises(DataError, match="damaged: the checksum of 'weights'"):
            read()
    assert "ids" in read_arrays(file, "demo", verify=False).arrays


@pytest.mark.parametrize(
    "raw", [b"", b"PK\x03\x04 a zip file", b"ANABARR2" + b"\0" * 100, b"text", b"\x93NUMPY" + b"\0" * 200]
)
def test_foreign_files(tmp_path, raw):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(DataError, match="not one of our array files"):
        read_arrays(tmp_path / "f", "demo")


def test_other_kinds_versions_and_places(file, tmp_path):
    with pytest.raises(DataError, match="holds a demo, not a graph"):
        read_arrays(file, "graph")
    with pytest.raises(DataError, match="version 1 of a demo; this release reads 2, 3"):
        read_arrays(file, "demo", versions=(2, 3))
    with pytest.raises(DataError, match="no such file"):
        read_arrays(tmp_path / "none", "demo")
    with pytest.raises(DataError, match="directory"):
        read_arrays(tmp_path, "demo")


def forged(path, change):
    """A file whose header says something else, with the right sums."""
    raw = path.read_bytes()
    length = int(np.frombuffer(raw[8:16], "<u8")[0])
    header = json.loads(raw[24 : 24 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    start = -(-(28 + len(text)) // ALIGN) * ALIGN
    body = raw[-(-(28 + length) // ALIGN) * ALIGN :]
    fixed = MAGIC + np.array([len(text), start + len(body)], "<u8").tobytes() + text
    fixed += np.array([zlib.crc32(text)], "<u4").tobytes()
    path.write_bytes(fixed + b"\0" * (start - len(fixed)) + body)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["arrays"][0].update(offset=-64),
        lambda header: header["arrays"][0].update(offset=1 << 40),
        lambda header: header["arrays"][0].update(shape=[1 << 62, 1 << 62]),
        lambda header: header["arrays"][0].update(shape=[-1]),
        lambda header: header["arrays"][0].update(dtype="|O"),
        lambda header: header["arrays"][0].update(dtype="nonsense"),
        lambda header: header["arrays"][0].pop("shape"),
        lambda header: header.pop("arrays"),
        lambda header: header.pop("kind"),
        lambda header: b"[]",
        lambda header: b"{",
        lambda header: b"\xff",
    ],
)
def test_headers_of_another_hand(file, change):
    forged(file, change)
    for mmap in (False, True):
        with pytest.raises(DataError, match="header that this release cannot read"):
            read_arrays(file, "demo", mmap=mmap)


def test_what_cannot_be_written_leaves_the_old_file(file):
    before = file.read_bytes()
    for bad in (np.array([object()]), np.zeros(2, [("a", "i4")])):
        with pytest.raises(InputError, match="'x' is of type"):
            write_arrays(file, "demo", {"x": bad})
    with pytest.raises(TypeError):
        write_arrays(file, "demo", {}, {"x": object()})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_file_may_be_replaced_while_it_is_mapped(file):
    mapped = read_arrays(file, "demo", mmap=True).arrays["ids"]
    write_arrays(file, "demo", {"ids": np.zeros(7, np.int32)})
    assert mapped.tolist() == list(range(7))


# Files that are filled piece by piece


def filled(path, arrays, align=64):
    shapes = {name: Shape(array.dtype, array.shape, align if name == "a" else 64) for name, array in arrays.items()}
    with filling_arrays(path, "thing", shapes, {"x": 1}) as file:
        for name, array in arrays.items():
            # In any order.
            for row in reversed(range(len(array))):
                file.put(name, row, array[row : row + 1])


PARTS = {
    "a": np.arange(30, dtype=np.uint64).reshape(10, 3),
    "b": np.array([1.5, -2.0], np.float32),
    "none": np.empty((0, 4), np.int32),
}


@pytest.mark.parametrize("align", [64, 4096])
def test_a_file_that_was_filled_is_read_as_any_other(tmp_path, align):
    path = tmp_path / "f.anb"
    filled(path, PARTS, align)
    found = read_arrays(path, "thing", mmap=True, verify=True)
    assert (found.meta, list(found.arrays)) == ({"x": 1}, list(PARTS))
    for name, array in PARTS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    assert found.arrays["a"].offset % align == 0


def test_rows_that_were_not_written_are_zeros(tmp_path):
    with filling_arrays(tmp_path / "f.anb", "thing", {"a": Shape(np.int32, (4, 2))}) as file:
        file.put("a", 1, np.ones((1, 2), np.int32))
    np.testing.assert_array_equal(
        read_arrays(tmp_path / "f.anb", "thing").arrays["a"], [[0, 0], [1, 1], [0, 0], [0, 0]]
    )


def test_rows_that_do_not_fit_and_files_that_fail_leave_nothing(tmp_path):
    (tmp_path / "f.anb").write_bytes(b"before")
    for first, rows in ((-1, np.ones((1, 2))), (4, np.ones((1, 2))), (0, np.ones((1, 3)))):
        with (
            pytest.raises(ValueError, match="are none of 'a'"),
            filling_arrays(tmp_path / "f.anb", "thing", {"a": Shape(np.int32, (4, 2))}) as file,
        ):
            file.put("a", first, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["f.anb"]
    assert (tmp_path / "f.anb").read_bytes() == b"before"


@pytest.mark.parametrize("mmap", [False, True])
def test_one_array_is_left_in_its_file(tmp_path, mmap):
    path = tmp_path / "f.anb"
    write_arrays(path, "thing", PARTS, {"x": 1})
    found, left = read_beside(path, "thing", "a", mmap=mmap)
    # What takes its place is another file.
    write_arrays(tmp_path / "other.anb", "thing", {"a": PARTS["a"] + 1})
    (tmp_path / "other.anb").replace(path)
    left.file.seek(left.place)
    np.testing.assert_array_equal(np.fromfile(left.file, np.uint64, 30).reshape(left.shape.sides), PARTS["a"])
    np.testing.assert_array_equal(found.arrays["b"], PARTS["b"])
    assert set(found.arrays) == {"b", "none"}
    left.file.close()


def test_what_is_not_left_is_checked(tmp_path):
    path = tmp_path / "f.anb"
    write_arrays(path, "thing", PARTS)
    with pytest.raises(DataError, match="has no 'c'"):
        read_beside(path, "thing", "c")
    with pytest.raises(DataError, match="not a thong"):
        read_beside(path, "thong", "a")
    with pytest.raises(DataError, match="this release reads 2"):
        read_beside(path, "thing", "a", versions=(2,))
    with pytest.raises(DataError, match="no such file"):
        read_beside(tmp_path / "none.anb", "thing", "a")
    data = bytearray(path.read_bytes())
    # The last array with bytes.
    data[-64] ^= 1
    path.write_bytes(data)
    for mmap in (False, True):
        with pytest.raises(DataError, match="checksum of 'b'"):
            read_beside(path, "thing", "a", mmap=mmap)
        read_beside(path, "thing", "b", mmap=mmap)[1].file.close()
