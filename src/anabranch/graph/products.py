"""Products of a sparse matrix with a tall dense one, again and again: ``x <- diag(left) A x``, a chunk of columns at a time.

Three makers of the same numbers (to rounding): `NumbaProducts`, `ScipyProducts`, `TorchProducts`. Each hands around chunks of its own
layout; `add_to` writes one out.

The numba one keeps a chunk as blocks of `BLOCK` columns, [B, N, W]. A block's part of a row is two cache lines, and all of it often fits
into the cache of a core, while rows of a wide matrix would not. The sum of a row's neighbours is kept in vector registers, for which
numba's own loops are not enough: `_row_sum` writes that loop as LLVM. Measured against the same loop left to numba (PPI, BlogCatalog, DBLP,
with weights and without, one thread, processor time, equal to the bit): 4.2 to 5.0 times in float32, 2.0 to 4.8 in float64.

Each number is the sum of the same products in the same order whatever the chunks and threads, without fused multiply-adds, so all runs
agree to the bit.
"""
# Shapes: N nodes, M stored edges, D dim, B blocks, W columns of a block, C columns of a chunk

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from anabranch.errors import BackendError, first_line
from anabranch.extras import require
from anabranch.graph.guarded import CHECKED
from anabranch.graph.projection import BLOCK, SparseProjection
from anabranch.graph.workers import Workers


@dataclass(frozen=True)
class Operator:
    """diag(left) A, with A in compressed rows.

    Attributes:
        indptr: int64 [N + 1].
        indices: int32 or int64 [M].
        value_M: of the working type; empty where all are 1.
        left_N: of the working type.
    """

    indptr: np.ndarray
    indices: np.ndarray
    value_M: np.ndarray
    left_N: np.ndarray

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.left_N)

    def to_scipy(self) -> Any:
        """A as `scipy.sparse.csr_array`, without diag(left)."""
        from scipy.sparse import csr_array

        data = self.value_M if len(self.value_M) else np.ones(len(self.indices), self.left_N.dtype)
        indptr = self.indptr.astype(self.indices.dtype, copy=False)
        return csr_array((data, self.indices, indptr), shape=(self.num_rows, self.num_rows))


class Products(Protocol):
    """What the makers have in common; a chunk is whatever they hand out."""

    def load(self, start_NC: np.ndarray) -> Any:
        """A chunk of these values."""

    def first(self, rows: SparseProjection, scale_N: np.ndarray) -> Any:
        """diag(left) A diag(scale) R of a sparse R."""

    def multiply(self, chunk: Any) -> Any:
        """diag(left) A x; x may not be used afterwards."""

    def add_to(self, chunk: Any, out_ND: np.ndarray, column: int, weight: float, is_new: bool) -> None:
        """out[:, column:] = or += weight x."""


def ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """0 ... count - 1 in at most ``parts`` runs (first, last + 1)."""
    # More than there is work would be numbers for nothing.
    bounds = np.linspace(0, count, min(max(parts, 1), max(count, 1)) + 1).astype(int).tolist()
    return [(first, last) for first, last in itertools.pairwise(bounds) if last > first]


class NumbaProducts:
    """On the CPU, with our kernels."""

    def __init__(self, operator: Operator, pool: Workers) -> None:
        self.operator, self.pool = operator, pool
        # Runs of rows with as many edges each, four per thread so that none waits long.
        work = operator.indptr + np.arange(operator.num_rows + 1)
        goal = np.linspace(0, work[-1], min(4 * pool.count if pool.count > 1 else 1, max(operator.num_rows, 1)) + 1)
        bounds = np.unique(np.searchsorted(work, goal)).tolist()
        self.runs = list(itertools.pairwise(bounds))
        self._spare: list[np.ndarray] = []

    def load(self, start_NC: np.ndarray) -> np.ndarray:
        """A chunk of these values."""
        out_BNW = self._empty(start_NC.shape[1])
        self.pool.each(lambda first, last: _pack(start_NC, out_BNW, first, last), self.runs)
        return out_BNW

    def first(self, rows: SparseProjection, scale_N: np.ndarray) -> np.ndarray:
        """diag(left) A diag(scale) R of a sparse R."""
        of, out_BNW = self.operator, self._empty(rows.num_columns)
        value_N = (scale_N * out_BNW.dtype.type(rows.value)).astype(out_BNW.dtype)

        def work(first: int, last: int) -> None:
            _first(
                of.indptr, of.indices, of.value_M, of.left_N, rows.indptr, rows.place_E, value_N, out_BNW, first, last
            )

        self.pool.each(work, self.runs)
        return out_BNW

    def multiply(self, chunk: np.ndarray) -> np.ndarray:
        """diag(left) A x; x may not be used afterwards."""
        of, out_BNW = self.operator, self._empty(chunk.shape[0] * BLOCK)

        def work(block: int, first: int, last: int) -> None:
            _multiply(of.indptr, of.indices, of.value_M, of.left_N, chunk[block], out_BNW[block], first, last)

        self.pool.each(work, [(block, *run) for block in range(len(chunk)) for run in self.runs])
        self._spare.append(chunk)
        return out_BNW

    def add_to(self, chunk: np.ndarray, out_ND: np.ndarray, column: int, weight: float, is_new: bool) -> None:
        """out[:, column:] = or += weight x."""
        weight = out_ND.dtype.type(weight)
        last_column = min(column + chunk.shape[0] * BLOCK, out_ND.shape[1])
        self.pool.each(
            lambda first, last: _unpack(chunk, out_ND, column, last_column, weight, is_new, first, last), self.runs
        )

    def _empty(self, num_columns: int) -> np.ndarray:
        shape = (-(-num_columns // BLOCK), self.operator.num_rows, BLOCK)
        while self._spare:
            found = self._spare.pop()
            if found.shape == shape:
                return found
        return np.empty(shape, self.operator.left_N.dtype)


def multiply_block(of: Operator, x_NW: np.ndarray, out_NW: np.ndarray) -> None:
    """out <- diag(left) A x of one block of `BLOCK` columns, C-contiguous and of the working type, in this thread."""
    _multiply(of.indptr, of.indices, of.value_M, of.left_N, x_NW, out_NW, 0, of.num_rows)


class ScipyProducts:
    """With scipy's product, one thread."""

    def __init__(self, operator: Operator) -> None:
        self.matrix, self.left_N1 = operator.to_scipy(), operator.left_N[:, None]

    def load(self, start_NC: np.ndarray) -> np.ndarray:
        """A chunk of these values."""
        return start_NC

    def first(self, rows: SparseProjection, scale_N: np.ndarray) -> np.ndarray:
        """diag(left) A diag(scale) R of a sparse R."""
        start = rows.to_scipy(self.left_N1.dtype)
        start.data *= np.repeat(scale_N, np.diff(start.indptr)).astype(start.dtype)
        return (self.matrix @ start).toarray() * self.left_N1

    def multiply(self, chunk: np.ndarray) -> np.ndarray:
        """diag(left) A x."""
        found = self.matrix @ chunk
        found *= self.left_N1
        return found

    def add_to(self, chunk: np.ndarray, out_ND: np.ndarray, column: int, weight: float, is_new: bool) -> None:
        """out[:, column:] = or += weight x."""
        part_NC = out_ND[:, column : column + chunk.shape[1]]
        np.multiply(chunk, out_ND.dtype.type(weight), out=part_NC) if is_new else np.add(
            part_NC, weight * chunk, out=part_NC
        )


class TorchProducts:
    """With torch's product, on the CPU or a CUDA device."""

    def __init__(self, operator: Operator, device: str) -> None:
        require("torch", by="backend='torch'")
        import torch

        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"device {device!r} is not available: {first_line(error)}") from None
        self.torch, matrix = torch, operator.to_scipy()
        indptr, indices = (torch.as_tensor(array.astype(np.int64)) for array in (matrix.indptr, matrix.indices))
        with warnings.catch_warnings():
            # Beta; products are all we use.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            self.matrix = torch.sparse_csr_tensor(
                indptr, indices, torch.tensor(matrix.data), matrix.shape, device=self.device, check_invariants=True
            )
        self.left_N1 = torch.as_tensor(operator.left_N[:, None], device=self.device)

    def load(self, start_NC: np.ndarray) -> Any:
        """A chunk of these values."""
        return self.torch.as_tensor(np.ascontiguousarray(start_NC), device=self.device)

    def first(self, rows: SparseProjection, scale_N: np.ndarray) -> Any:
        """diag(left) A diag(scale) R of a sparse R, made dense."""
        start = rows.to_scipy(scale_N.dtype)
        return self.multiply(self.load(start.toarray() * scale_N[:, None]))

    def multiply(self, chunk: Any) -> Any:
        """diag(left) A x."""
        return (self.matrix @ chunk).mul_(self.left_N1)

    def add_to(self, chunk: Any, out_ND: np.ndarray, column: int, weight: float, is_new: bool) -> None:
        """out[:, column:] = or += weight x."""
        part_NC, found = out_ND[:, column : column + chunk.shape[1]], (weight * chunk).cpu().numpy()
        part_NC[:] = found if is_new else part_NC + found


def _row_sum(is_weighted: bool) -> Any:
    """Intrinsic: out[row] = scale * sum over start <= e < end of (value[e] *) x[indices[e]]; x and out are C-contiguous [N, BLOCK]."""

    @intrinsic
    def row_sum(typing, out, row, x, indices, value, start, end, scale):
        def generate(context, builder, signature, given):
            out_type, _, x_type, indices_type, value_type, _, _, _ = signature.args
            out, row, x, indices, value, start, end, scale = given
            data = [
                context.make_array(kind)(context, builder, array).data
                for kind, array in ((out_type, out), (x_type, x), (indices_type, indices), (value_type, value))
            ]
            wide = ir.IntType(64)
            vector = ir.VectorType(context.get_value_type(x_type.dtype), BLOCK)

            # Where row `place` starts.
            def at(pointer, place):
                found = builder.gep(pointer, [builder.mul(place, ir.Constant(wide, BLOCK))])
                return builder.bitcast(found, vector.as_pointer())

            def spread(number):
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [0] * BLOCK)
                return builder.shuffle_vector(one, one, zeros)

            # Rows may start anywhere that one number may.
            size = x_type.dtype.bitwidth // 8
            # LLVM keeps it in registers.
            total = cgutils.alloca_once(builder, vector)
            builder.store(ir.Constant(vector, [0.0] * BLOCK), total)
            with cgutils.for_range(builder, builder.sub(end, start)) as loop:
                edge = builder.add(start, loop.index)
                node = builder.load(builder.gep(data[2], [edge]))
                node = builder.sext(node, wide) if indices_type.dtype.bitwidth < 64 else node
                term = builder.load(at(data[1], node), align=size)
                if is_weighted:
                    term = builder.fmul(spread(builder.load(builder.gep(data[3], [edge]))), term)
                builder.store(builder.fadd(builder.load(total), term), total)
            builder.store(builder.fmul(spread(scale), builder.load(total)), at(data[0], row), align=size)
            return context.get_dummy_value()

        return types.void(out, row, x, indices, value, types.int64, types.int64, x.dtype), generate

    return row_sum


_plain_sum, _weighted_sum = _row_sum(False), _row_sum(True)


@nb.njit
def _check_row(row, rows_out, rows_x, indices, start, end):
    """In the checked build: that a row's sum reads and writes rows that are there."""
    if row < 0 or row >= rows_out or start < 0 or end > len(indices):
        raise IndexError("past the end of a matrix")
    for edge in range(start, end):
        if indices[edge] < 0 or indices[edge] >= rows_x:
            raise IndexError("past the end of the rows that are summed")


@nb.njit(cache=True, nogil=True)
def _multiply(indptr, indices, value_M, left_N, x_NW, out_NW, first, last):
    is_weighted = len(value_M) > 0
    for row in range(first, last):
        if CHECKED:
            _check_row(row, len(out_NW), len(x_NW), indices, indptr[row], indptr[row + 1])
        if is_weighted:
            _weighted_sum(out_NW, row, x_NW, indices, value_M, indptr[row], indptr[row + 1], left_N[row])
        else:
            _plain_sum(out_NW, row, x_NW, indices, value_M, indptr[row], indptr[row + 1], left_N[row])


@nb.njit(cache=True, nogil=True)
def _first(indptr, indices, value_M, left_N, r_indptr, place_E, value_N, out_BNW, first, last):
    blocks = out_BNW.shape[0]
    total_C = np.zeros(blocks * BLOCK, out_BNW.dtype)
    is_weighted = len(value_M) > 0
    for row in range(first, last):
        for edge in range(indptr[row], indptr[row + 1]):
            node = indices[edge]
            start, end = r_indptr[node], r_indptr[node + 1]
            if start == end:
                continue
            value = value_N[node]
            if is_weighted:
                value *= value_M[edge]
            for entry in range(start, end):
                place = np.int64(place_E[entry])
                # No branch: signs cannot be predicted.
                total_C[place >> 1] += value * (1 - 2 * (place & 1))
        for block in range(blocks):
            for column in range(BLOCK):
                out_BNW[block, row, column] = left_N[row] * total_C[block * BLOCK + column]
        total_C[:] = 0


@nb.njit(cache=True, nogil=True)
def _pack(x_NC, out_BNW, first, last):
    columns = x_NC.shape[1]
    for block in range(out_BNW.shape[0]):
        here = min(BLOCK, columns - block * BLOCK)
        for row in range(first, last):
            for column in range(here):
                out_BNW[block, row, column] = x_NC[row, block * BLOCK + column]
            for column in range(here, BLOCK):
                out_BNW[block, row, column] = 0


@nb.njit(cache=True, nogil=True)
def _unpack(x_BNW, out_ND, column, last_column, weight, is_new, first, last):
    for row in range(first, last):
        for block in range(x_BNW.shape[0]):
            start = column + block * BLOCK
            for place in range(min(BLOCK, last_column - start)):
                value = weight * x_BNW[block, row, place]
                out_ND[row, start + place] = value if is_new else out_ND[row, start + place] + value
