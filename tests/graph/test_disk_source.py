"""Where vectors of an index on disk come from: rows of arrays, and elements of an index in memory."""

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph.disk.source import Elements, Rows
from anabranch.graph.hnsw import HNSW

VECTORS = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
ORDER = np.array([7, 0, 11, 0, 3])


@pytest.mark.parametrize(
    "given",
    [VECTORS, VECTORS.astype(np.float64), VECTORS.tolist(), np.asfortranarray(VECTORS), VECTORS[:, ::-1][:, ::-1]],
    ids=["float32", "float64", "lists", "columns", "strides"],
)
def test_rows_are_those_of_the_array(given):
    source = Rows(given, "l2")
    assert (source.count, source.dim, source.metric) == (12, 5, "l2")
    np.testing.assert_array_equal(source.piece(3, 7), VECTORS[3:7])
    np.testing.assert_array_equal(source.take(ORDER), VECTORS[ORDER])
    for found in (source.piece(0, 12), source.take(ORDER)):
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
    assert source.take(ORDER[:0]).shape == (0, 5)


def test_whole_numbers_and_tensors_are_rows_too():
    torch = pytest.importorskip("torch")
    whole = np.arange(6, dtype=np.int8).reshape(2, 3)
    for given in (whole, whole.astype(bool), torch.from_numpy(VECTORS).double()):
        source = Rows(given, "l2")
        np.testing.assert_array_equal(source.take(np.array([1, 0])), np.asarray(given, np.float32)[[1, 0]])


def test_rows_are_scaled_as_the_metric_asks():
    source, length_N = Rows(3 * VECTORS, "cosine"), np.linalg.norm(VECTORS, axis=1, keepdims=True)
    for found, rows in ((source.piece(2, 9), slice(2, 9)), (source.take(ORDER), ORDER)):
        np.testing.assert_allclose(found, (VECTORS / length_N)[rows], rtol=1e-6)


def test_what_is_mapped_is_read_where_it_is_asked_for(tmp_path):
    np.save(tmp_path / "x.npy", VECTORS)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = Rows(mapped, "l2")
    assert source._array is mapped
    np.testing.assert_array_equal(source.take(ORDER), VECTORS[ORDER])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (VECTORS[0], r"the shape \[5\]; they must be rows"),
        (VECTORS[:0], r"the shape \[0, 5\]; they must be rows, at least one"),
        (np.empty((3, 0)), r"the shape \[3, 0\]"),
        (VECTORS[None], r"the shape \[1, 12, 5\]"),
        (np.array([["a"]]), "vectors must be numbers, not <U1"),
        (np.array([[1j]]), "vectors must be numbers, not complex128"),
    ],
)
def test_what_are_no_rows_of_numbers_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Rows(given, "l2")


def test_the_piece_of_a_bad_row_is_told():
    bad = VECTORS.copy()
    bad[9, 1] = np.nan
    source = Rows(bad, "l2")
    source.piece(0, 9)
    with pytest.raises(InputError, match="row 1 of the vectors from 8 on is not finite"):
        source.piece(8, 12)
    with pytest.raises(InputError, match="row 9 of vectors is not finite"):
        source.piece(0, 12)


def test_elements_come_in_the_order_of_their_places():
    index = HNSW(5, M=4, compact_at=None, workers=1)
    index.add(VECTORS, ids=np.arange(100, 112))
    index.remove([103, 100])
    with index._lock.read(whole=True) as interrupts:
        assert not Elements(index, interrupts).is_whole
    index.compact()
    kept = [row for row in range(12) if row not in (0, 3)]
    with index._lock.read(whole=True) as interrupts:
        source = Elements(index, interrupts)
        assert (source.is_whole, source.count, source.dim, source.metric) == (True, 10, 5, "l2")
        assert source.id_N.tolist() == [100 + row for row in kept]
        np.testing.assert_array_equal(source.piece(2, 6), VECTORS[kept][2:6])
        np.testing.assert_array_equal(source.take(np.array([9, 0, 4])), VECTORS[kept][[9, 0, 4]])
    empty = HNSW(5)
    with empty._lock.read(whole=True) as interrupts:
        assert not Elements(empty, interrupts).is_whole
