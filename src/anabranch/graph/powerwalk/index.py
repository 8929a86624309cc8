"""The offline half: fingerprints of nodes by short walks, in compressed rows, built in bounded memory.

A fingerprint holds how often the walks of a node visited (or ended at) each node. Walks *vanish* at dead ends, so that fingerprints
estimate rows of the leaky system (`anabranch.graph.ppr.rules`), for which decomposition is an identity under every policy of dead ends:
a walk that goes back to its source would have to know whose walk it was. Rows are ordered by count and may be cut; the estimate of a
row is its counts times one number, ``h / (counts of all of the row, cut or not)`` or, unbiased, ``alpha / walks``.

Counts are stored as float16, exact up to 2048, or float32. The walks of a node come from the stream (seed, node): rows are the same for any
chunks and any number of threads, and a row can be made again by itself.
"""
# Shapes: N nodes, S sources, Z entries

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numba as nb
import numpy as np

from anabranch.graph.counters import VANISH, Counts, count_walks
from anabranch.graph.powerwalk.moves import Fronts, count_long_path, count_moves
from anabranch.graph.ppr.rules import NO_WEIGHTS
from anabranch.graph.rows import SparseRows, grown, id_type, order_top
from anabranch.graph.store import Graph
from anabranch.graph.walk import Walk, walk_arrays
from anabranch.graph.workers import in_order

Moves = Literal["walkers", "counts", "rounding"]
MOVES = {"walkers": 0, "counts": 1, "rounding": 2, "long_path": 3}

# Sources of one piece of work.
CHUNK = 1024

# That scores from elsewhere are taken for.
VISITS = 1 << 14


@dataclass(frozen=True)
class Plan:
    """All that decides a row beside the graph.

    Attributes:
        alpha, walks, seed: of the walks.
        full: count every visit, else ends.
        moves: a key of ``MOVES``.
        max_steps: longest walk; 0 for no limit.
        keep: entries kept of a row; 0 for all.
        mass: share of a row's counts that is kept at least; 1 for all.
        track: also keep the ids of all nodes that the walks visited.
    """

    alpha: float
    walks: int
    seed: int
    full: bool
    moves: str
    max_steps: int
    keep: int
    mass: float
    track: bool


class How(NamedTuple):
    """A `Plan` as kernels take it; ``moves`` is its code."""

    seed: int
    walks: int
    alpha: float
    full: bool
    moves: int
    max_steps: int
    keep: int
    mass: float
    track: bool


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of some sources: what a thread hands back.

    Attributes:
        length_S: entries of each row. ids, counts: of the rows, one after another.
        total_S: counts of each row before it was cut.
        cut_S: walks that ``max_steps`` cut.
        seen_length_S, seen: ids of visited nodes, where they are tracked.
    """

    length_S: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    total_S: np.ndarray
    cut_S: np.ndarray
    seen_length_S: np.ndarray
    seen: np.ndarray


class Scratch:
    """Arrays of one thread: 4 N bytes of counts and the ids beside them; twice more where counts move."""

    def __init__(self, num_nodes: int, plan: Plan) -> None:
        ids = id_type(num_nodes)
        walks = plan.walks if plan.moves == "walkers" else 0
        self.counts = Counts(
            np.empty(walks, np.int64),
            np.empty(walks, np.int64),
            np.zeros(num_nodes, np.int32),
            np.empty(num_nodes, ids),
        )
        moving = num_nodes if plan.moves in ("counts", "rounding") else 0
        self.fronts = Fronts(
            np.zeros(moving, np.int32), np.zeros(moving, np.int32), np.empty(moving, ids), np.empty(moving, ids)
        )


def make_chunk(graph: Graph, plan: Plan, sources: np.ndarray, scratch: Scratch) -> Chunk:
    """Fingerprints of ``sources``."""
    weight_M = NO_WEIGHTS if graph.weights is None else graph.weights
    same = {name: getattr(plan, name) for name in How._fields if name != "moves"}
    how, walk = How(**same, moves=MOVES[plan.moves]), walk_arrays(graph)
    return Chunk(*_rows(sources, tuple(how), tuple(walk), weight_M, tuple(scratch.fronts), tuple(scratch.counts)))


def make_chunks(
    graph: Graph, plan: Plan, sources: np.ndarray, workers: int, progress: Callable[[int], None] | None
) -> Iterator[Chunk]:
    """`make_chunk` of all sources, ``CHUNK`` at a time, in order, by ``workers`` threads of which none runs far ahead."""
    # Made once, before threads ask for it.
    _ = graph.alias
    pieces = [sources[first : first + CHUNK] for first in range(0, len(sources), CHUNK)]
    local = threading.local()

    def work(piece: np.ndarray) -> Chunk:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch(graph.num_nodes, plan)
        return make_chunk(graph, plan, piece, local.scratch)

    done = 0
    for chunk in in_order(work, pieces, workers):
        done += len(chunk.length_S)
        yield chunk
        if progress:
            progress(done)


@nb.njit(cache=True, nogil=True)
def _count(source, visits, how, walk, weight_M, fronts, counts):
    """Walks of a source, their visits or ends: how many ids have a count, and how many walks were cut."""
    if how.moves == 0:
        return count_walks(how.seed, source, 0, how.alpha, VANISH, visits, how.max_steps, walk, counts, 0)
    if how.moves == 3:
        touched, _ = count_long_path(
            how.seed, source, int(how.walks / how.alpha + 0.5), how.alpha, visits, walk, counts
        )
        return touched, 0
    return count_moves(
        how.seed, source, how.walks, how.alpha, visits, how.moves == 2, how.max_steps, walk, weight_M, fronts, counts
    )


@nb.njit(cache=True, nogil=True)
def _take_row(counts, touched, ids, values, how):
    """Move counts into a row, in order, and set them to 0: how many entries are kept, and the sum of all."""
    count_N, touched_N = counts.count_N, counts.touched_N
    total = 0
    for entry in range(touched):
        node = touched_N[entry]
        ids[entry] = node
        values[entry] = count_N[node]
        total += count_N[node]
        count_N[node] = 0
    kept = order_top(ids, values, touched, how.keep)
    if how.mass < 1.0:
        running, entry = 0.0, 0
        while entry < kept and running < how.mass * total:
            running += values[entry]
            entry += 1
        kept = entry
    return kept, total


@nb.njit(cache=True, nogil=True)
def _rows(sources, plain_how, plain_walk, weight_M, plain_fronts, plain_counts):
    """Parts of a `Chunk`, in its order. Takes a `How`, a `Walk`, `Fronts` and `Counts` as plain tuples."""
    how, walk = How(*plain_how), Walk(*plain_walk)
    fronts, counts = Fronts(*plain_fronts), Counts(*plain_counts)
    count_N, touched_N, size, track = counts.count_N, counts.touched_N, len(sources), how.track
    length_S, total_S, cut_S = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64)
    seen_length_S = np.zeros(size if track else 0, np.int64)
    ids, values = np.empty(1024, touched_N.dtype), np.empty(1024, np.float32)
    seen = np.empty(1024 if track else 0, touched_N.dtype)
    filled, watched = 0, 0
    for place in range(size):
        touched, cut = 0, 0
        # Ends alone do not say where walks passed: tracked rows count visits first, with the very same walks.
        for look in range(2 if track and not how.full else 1):
            visits = how.full or (track and look == 0)
            touched, cut = _count(sources[place], visits, how, walk, weight_M, fronts, counts)
            if track and look == 0:
                seen = grown(seen, watched + touched)
                seen[watched : watched + touched] = touched_N[:touched]
                seen[watched : watched + touched].sort()
                watched += touched
                seen_length_S[place] = touched
            if visits != how.full:
                for entry in range(touched):
                    count_N[touched_N[entry]] = 0
        ids, values = grown(ids, filled + touched), grown(values, filled + touched)
        row = slice(filled, filled + touched)
        kept, total = _take_row(counts, touched, ids[row], values[row], how)
        length_S[place], total_S[place], cut_S[place] = kept, total, cut
        filled += kept
    return length_S, ids[:filled].copy(), values[:filled].copy(), total_S, cut_S, seen_length_S, seen[:watched].copy()


def adopted(rows: SparseRows, num_nodes: int) -> Chunk:
    """Scores as counts of so many visits that float16 holds the largest to its precision."""
    counts = rows.values.astype(np.float32) * np.float32(VISITS)
    none = np.zeros(len(rows), np.int64)
    ids = rows.ids.astype(id_type(num_nodes))
    total_S = np.full(len(rows), VISITS, np.int64)
    return Chunk(np.diff(rows.indptr), ids, counts, total_S, none, none[:0], ids[:0])


def stored_counts(counts: np.ndarray, dtype: Any) -> np.ndarray:
    """Counts as they are stored; those beyond the range of float16 would be lost, so they end at its largest number."""
    if dtype == np.float16:
        counts = np.minimum(counts, np.float32(65504))
    return counts.astype(dtype)
