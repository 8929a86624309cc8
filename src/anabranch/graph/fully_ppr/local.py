"""The embedded engine: rows of any set of sources on this machine, by walks, by an index of walks, or exactly.

Walks of a source are all made at once, with counts in a dense array beside the list of what was touched (`anabranch.graph.counters`); a
source costs its walks and nothing that grows with the graph. Sources are independent, so threads share nothing but the graph.
Rounds, pipelines and pieces of hubs are for graphs that do not fit here (`anabranch.graph.fully_ppr.rounds`).
"""
# Shapes: N nodes, C sources of a chunk, W walks

import threading
from collections.abc import Callable
from typing import NamedTuple

import numba as nb
import numpy as np

from anabranch.graph.counters import Counts, count_walks, take_counts
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.ppr import Dangling, PageRank
from anabranch.graph.rows import SparseRows, id_type, order_top
from anabranch.graph.store import Graph
from anabranch.graph.walk import Walk

Work = Callable[[np.ndarray], SparseRows]

# L1 error above which a push looks at less of the graph than a solution does.
LOCAL = 1e-2


class How(NamedTuple):
    """What a row is, as the kernel takes it; see `WalkWork`."""

    seed: int
    alpha: float
    dangling: int
    full: bool
    top_k: int
    least: float


class WalkWork:
    """Rows of sources by ``walks`` walks from each; one object serves any number of threads.

    Args:
        arrays: of `anabranch.graph.walk.walk_arrays`.
        walks: per source.
        alpha: probability to end before each step.
        dangling: a code of `anabranch.graph.counters`.
        full: count every visit and let a row sum to 1; else ends over walks.
        top_k: entries of a row; 0 for all.
        least: smallest score that is kept.
        seed: of the streams (seed, source, 0).
    """

    def __init__(
        self,
        arrays: Walk,
        walks: int,
        alpha: float,
        dangling: int,
        full: bool,
        top_k: int,
        least: float,
        seed: int,
    ) -> None:
        self.arrays, self.walks, self.full, self.top_k = arrays, walks, full, top_k
        self.how = How(np.uint64(int(seed) % 2**64), alpha, dangling, full, top_k, least)  # type: ignore[arg-type]
        self._scratch = threading.local()

    def __call__(self, source_C: np.ndarray) -> SparseRows:
        """Rows of these sources."""
        num_nodes = len(self.arrays.indptr) - 1
        counts, value_N = self._buffers(num_nodes)
        most = min(num_nodes, self.top_k or num_nodes)
        most = most if self.full else min(most, self.walks)
        indptr = np.zeros(len(source_C) + 1, np.int64)
        ids = np.empty(min(len(source_C) * most, 1 << 20) + most, id_type(num_nodes))
        values = np.empty(len(ids), np.float32)
        done = 0
        while True:
            filled = (indptr, ids, values)
            done = _walk_rows(tuple(self.how), tuple(self.arrays), tuple(counts), value_N, source_C, done, filled)
            if done == len(source_C):
                break
            # Rows are longer than expected: twice the room.
            ids = np.append(ids, np.empty_like(ids))
            values = np.append(values, np.empty_like(values))
        used = indptr[-1]
        return SparseRows(indptr, ids[:used].copy(), values[:used].copy(), num_nodes)

    def _buffers(self, num_nodes: int) -> tuple[Counts, np.ndarray]:
        """Scratch of this thread, and room for values."""
        if not hasattr(self._scratch, "held"):
            counts = Counts(
                np.empty(self.walks, np.int64),
                np.empty(self.walks, np.int64),
                np.zeros(num_nodes, np.int32),
                np.empty(num_nodes, id_type(num_nodes)),
            )
            self._scratch.held = counts, np.empty(num_nodes, np.float32)
        return self._scratch.held


def scratch_bytes(num_nodes: int, walks: int) -> int:
    """Bytes of scratch of one thread: 16 W + (4 + 4 + id) N."""
    return 16 * walks + num_nodes * (8 + np.dtype(id_type(num_nodes)).itemsize)


@nb.njit(cache=True, nogil=True)
def _walk_rows(plain_how, plain_walk, plain_counts, value_N, source_C, done, filled):
    """Rows of the sources from ``done`` on, as far as there is room; returns how many are done.

    Takes a `How`, a `Walk` and a `Counts` as plain tuples; ``filled`` are starts, ids and values of rows.
    """
    how, walk, counts = How(*plain_how), Walk(*plain_walk), Counts(*plain_counts)
    first, ids, values = filled
    count_N, touched_N = counts.count_N, counts.touched_N
    used = first[done]
    while done < len(source_C):
        touched, _ = count_walks(how.seed, source_C[done], 0, how.alpha, how.dangling, how.full, 0, walk, counts, 0)
        total = 0
        for place in range(touched):
            total += count_N[touched_N[place]]
        take_counts(count_N, touched_N, touched, touched_N, value_N, 1.0 / total)
        kept = order_top(touched_N, value_N, touched, how.top_k)
        while kept > 0 and value_N[kept - 1] < how.least:
            kept -= 1
        if kept > len(ids) - used:
            # Made again, the same, when there is room.
            break
        for place in range(kept):
            ids[used + place] = touched_N[place]
            values[used + place] = value_N[place]
        used += kept
        done += 1
        first[done] = used
    return done


def exact_work(graph: Graph, alpha: float, dangling: Dangling, tol: float, top_k: int | None, least: float) -> Work:
    """Rows within ``tol`` of the truth in L1, float64.

    By blocks of sources where nothing of the graph can be eliminated; else one after another, by elimination and conjugate gradients, or
    by forward push where ``tol`` is wide.
    """
    model = PageRank(alpha, "solve", tol, dangling)
    blocks = model.blocks(graph)
    if blocks is not None:

        def work_in_blocks(source_C: np.ndarray) -> SparseRows:
            parsed = [(source_C[place : place + 1], np.ones(1)) for place in range(len(source_C))]
            return at_least(SparseRows.from_rows(blocks.rows(parsed, top_k), graph.num_nodes, dtype=np.float64), least)

        return work_in_blocks
    if tol >= LOCAL:
        model.set_params(method="push")
    # What queries share is made once, before threads ask for it.
    model.personalized(graph, 0, 1)

    def work(source_C: np.ndarray) -> SparseRows:
        return at_least(model.batch(graph, source_C.tolist(), top_k), least)

    return work


def decompose_work(index: PowerWalk, rounds: int, top_k: int | None, least: float) -> Work:
    """Rows by rounds of decomposition on an index of walks (`anabranch.graph.powerwalk`), float32.

    ``forward``, one source after another: what is pulled back for a batch at once differs in its last digits with the batch.
    """

    def work(source_C: np.ndarray) -> SparseRows:
        return at_least(index.query_batch(source_C.tolist(), top_k, rounds, method="forward"), least)

    return work


def at_least(rows: SparseRows, least: float) -> SparseRows:
    """Rows without entries below ``least``."""
    if least <= 0:
        return rows
    chosen = rows.values >= least
    running = np.append(0, np.cumsum(chosen))
    return SparseRows(running[rows.indptr], rows.ids[chosen], rows.values[chosen], rows.num_columns, rows.nodes)
