"""What Spark's workers do for FastRP, as functions of arrays and Arrow tables: rows of L R, products of a tile, sums, columns.

Rows of numbers travel as bytes, which Spark moves without looking at them.
"""
# Shapes: N nodes, P partial rows, D dim

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from anabranch.errors import CapacityError, InputError
from anabranch.graph.fastrp.start import Projection, sparsity
from anabranch.graph.projection import keys_of

# In `combined_rows`, of a row that only says that its node is there.
NODES = -1

# Columns that are added up at once, in 64 bits.
_COLUMNS = 64


def scale_of(degree_N: np.ndarray, beta: float, dim: int, dtype: str) -> np.ndarray:
    """The diagonal of L over sqrt(D). Raises InputError where it leaves the range of the type."""
    with np.errstate(over="ignore", under="ignore"):
        scale_N = (degree_N**beta / math.sqrt(dim)).astype(dtype)
    if not (np.isfinite(scale_N).all() and (scale_N > 0).all()):
        raise InputError(f"degrees to the power beta = {beta} leave the range of {dtype}; scale the edge weights")
    return scale_N


def start_rows(model: Any, batch: pa.RecordBatch, num_nodes: int, buckets: int) -> pa.Table:
    """L R of some nodes (``node``, ``id``, ``degree``)."""
    node_N = batch["node"].to_numpy()
    ids = batch["id"]
    key_N = keys_of(ids.to_numpy() if pa.types.is_integer(ids.type) else ids.to_pylist())
    s = sparsity(num_nodes) if model.s is None else float(model.s)
    scale_N = scale_of(batch["degree"].to_numpy(), model.beta, model.dim, model.dtype)
    made = Projection(key_N, model.projection, s, model.seed, model.dim, None, scale_N)
    return rows_table(node_N, made.columns(0, model.dim), buckets)


def partial_rows(entries: pa.Table, vectors: pa.Table, dim: int, dtype: str, buckets: int) -> pa.Table:
    """What the entries of one tile make of the vectors of its bucket: a row for each source."""
    from scipy.sparse import csr_array

    node_N = vectors["node"].to_numpy() if len(vectors) else np.empty(0, np.int64)
    order = np.argsort(node_N)
    source, target, value = (entries[name].to_numpy() for name in ("source", "target", "value"))
    place = np.searchsorted(node_N, target, sorter=order)
    # Nodes without edges out have no row: theirs are 0.
    place[place == len(node_N)] = 0
    is_there = node_N[order[place]] == target if len(node_N) else np.zeros(len(target), bool)
    source, value, column = source[is_there], value[is_there], order[place[is_there]]
    nodes, row = np.unique(source, return_inverse=True)
    matrix = csr_array((value, (row, column)), shape=(len(nodes), len(node_N)))
    return rows_table(nodes, _product(matrix, to_array(vectors["vector"], dtype, dim), dtype), buckets)


def total_rows(rows: pa.Table, dim: int, dtype: str) -> pa.Table:
    """Rows of the same node added up."""
    from scipy.sparse import csr_array

    nodes, row = np.unique(rows["node"].to_numpy(), return_inverse=True)
    matrix = csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(nodes), len(row)))
    found = _product(matrix, to_array(rows["vector"], dtype, dim), dtype)
    bucket = rows["bucket"].to_numpy()[:1]
    return rows_table(nodes, found, None, bucket)


def _product(matrix: Any, x_PD: np.ndarray, dtype: str) -> np.ndarray:
    """In 64 bits, some columns at a time."""
    out = np.empty((matrix.shape[0], x_PD.shape[1]), dtype)
    for first in range(0, x_PD.shape[1], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        out[:, columns] = matrix @ x_PD[:, columns].astype(np.float64)
    return out


def combined_rows(model: Any, table: pa.Table) -> pa.Table:
    """Vectors of a bucket's nodes from their rows of every order."""
    order_P, node_P = table["order"].to_numpy(), table["node"].to_numpy()
    nodes = np.sort(node_P[order_P == NODES])
    vectors = table["vector"]
    arrays: dict[int, np.ndarray] = {}
    for order in [0, *range(1, len(model.weights) + 1)]:
        is_of = order_P == order
        # Those of weight 0 are not looked at.
        wanted = model.self_weight if order == 0 else model.weights[order - 1]
        arrays[order] = np.zeros((len(nodes) if wanted else 0, model.dim), model.dtype)
        if wanted:
            rows = to_array(vectors.filter(pa.array(is_of)), model.dtype, model.dim)
            arrays[order][np.searchsorted(nodes, node_P[is_of])] = rows
    found = model.mixed(arrays.pop(0), tuple(arrays.values()))
    return rows_table(nodes, found, None, table["bucket"].to_numpy()[:1])


def batch_sums(x_ND: np.ndarray) -> np.ndarray:
    """Number of rows, sums of columns, sums of squares, float64 [1 + 2 D]."""
    wide = x_ND.astype(np.float64)
    return np.concatenate([[len(wide)], wide.sum(0), (wide**2).sum(0)])


def as_sums(parts: Iterator[np.ndarray]) -> Iterator[pa.RecordBatch]:
    """Their sum as one row; none of none."""
    total: Any = None
    for part in parts:
        total = part.copy() if total is None else total + part
    if total is not None:
        yield pa.RecordBatch.from_pydict({"sums": pa.array([total.tobytes()], pa.binary())})


def listed_rows(
    batch: pa.RecordBatch, dtype: str, mean_D: np.ndarray | None, factor_D: np.ndarray | None
) -> pa.RecordBatch:
    """Rows as lists, columns shifted and scaled."""
    found = to_array(batch["vector"], dtype)
    if mean_D is not None:
        found = ((found - mean_D) * factor_D).astype(dtype)
    ends = np.arange(0, found.size + 1, found.shape[1], dtype=np.int32)
    lists = pa.ListArray.from_arrays(ends, np.ascontiguousarray(found).reshape(-1))
    return pa.RecordBatch.from_arrays([batch["node"], lists], ["node", "vector"])


# Rows of numbers as bytes, which Spark moves without looking


def rows_table(node_N: np.ndarray, x_ND: np.ndarray, buckets: int | None, bucket: Any = None) -> pa.Table:
    """Rows of `ROWS`; of the bucket of each node, or all of one."""
    found = node_N % buckets if buckets else np.repeat(bucket, len(node_N)) if len(node_N) else np.empty(0)
    return pa.table({"bucket": found.astype(np.int32), "node": node_N.astype(np.int64), "vector": to_binary(x_ND)})


def to_binary(x_ND: np.ndarray) -> pa.Array:
    """Rows as bytes. Raises CapacityError where Arrow's 2 GiB do not hold them."""
    row = x_ND.shape[1] * x_ND.itemsize
    if row * len(x_ND) >= 2**31:
        raise CapacityError(f"{row * len(x_ND):,} bytes of vectors in one bucket; give more partitions")
    ends = np.arange(len(x_ND) + 1, dtype=np.int32) * np.int32(row)
    data = np.ascontiguousarray(x_ND).reshape(-1)
    return pa.Array.from_buffers(pa.binary(), len(x_ND), [None, pa.py_buffer(ends), pa.py_buffer(data)])


def to_array(column: Any, dtype: str, dim: int | None = None) -> np.ndarray:
    """What `to_binary` made; [0, D] of nothing."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = []
    for chunk in chunks:
        if len(chunk):
            offset_type = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
            _, ends, data = chunk.buffers()
            ends = np.frombuffer(ends, offset_type)[chunk.offset : chunk.offset + len(chunk) + 1]
            flat = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
            parts.append(flat.view(dtype).reshape(len(chunk), -1))
    if not parts:
        return np.empty((0, dim or 0), dtype)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
