"""Online augmentation: walks whose pairs of near nodes are positive samples, made while the pool before them is trained.

1. A start edge by weight: a node by the sum of its weights (alias table), then one of its edges by weight (alias table).
2. A walk of L edges from there; it ends early at a node without edges. node2vec: a walk that came from t to v goes on to x with weight
   w(v, x) times 1/p if x = t, 1 if t has an edge to x, 1/q otherwise, by rejection (no table per edge).
3. Every ordered pair (walk[j], walk[j + k]), 1 <= k <= s, is a positive sample (s: the augmentation step), routed to the block of its
   head's part and its tail's part.
4. Pseudo shuffle: sample o of a block of n goes to slot (o mod b) (n / b) + o div b, so that the b samples that follow each other, which
   share nodes, come to lie far apart. Where b does not divide n, the first n mod b classes have one slot more.

Walk w is keyed by (seed, w): pools are the same however walks are split among threads or machines.
"""
# Shapes: N nodes, M stored edges, C walks of a chunk, L edges of a walk, S samples of a pool, P parts, B = P^2 blocks

import math
from dataclasses import dataclass

import numba as nb
import numpy as np

from anabranch.graph.alias import build_alias, pick
from anabranch.graph.graphvite.partition import Partition
from anabranch.graph.random import next_bits, stream, to_unit
from anabranch.graph.store import Graph
from anabranch.graph.walk import step, walk_arrays
from anabranch.graph.workers import Workers

# Second key of the streams of walks.
WALKS = 1
CHUNK = 4096  # walks at once

# DeepWalk's window.
WIDEST = 10

# Rejections after which the row is gone through instead, with the same distribution.
_TRIES = 64


@dataclass(frozen=True)
class Pool:
    """The positive samples of one episode, block by block.

    Attributes:
        head_S: int32, rows within the head parts.
        tail_S: int32, rows within the tail parts.
        start_B: int64, where the samples of block (head part) P + (tail part) begin.
        count_B: int64, how many it has; where processes share a pool, also the blocks that lie elsewhere.
        num_walks: that gave them.
    """

    head_S: np.ndarray
    tail_S: np.ndarray
    start_B: np.ndarray
    count_B: np.ndarray
    num_walks: int

    @property
    def size(self) -> int:
        """S."""
        return int(self.count_B.sum())

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Heads and tails of a block."""
        inside = slice(self.start_B[number], self.start_B[number] + self.count_B[number])
        return self.head_S[inside], self.tail_S[inside]


def auto_augmentation(num_nodes: int, num_edges: int) -> int:
    """The reference's step: floor(ln 1600 / ln(E / N)), at least 1; ours at most 10, also where E <= N, which the formula does not know."""
    density = num_edges / max(num_nodes, 1)
    if density <= 1:
        return WIDEST
    return min(max(1, int(math.log(1600) / math.log(density))), WIDEST)


def pairs_of_walk(walk_length: int, augmentation: int) -> int:
    """Samples of a walk that does not end early: the sum over k <= s of L + 1 - k."""
    return sum(walk_length + 1 - k for k in range(1, min(augmentation, walk_length) + 1))


@nb.njit(inline="always")
def shuffled(sample, count, base):
    """The slot of a sample in a block of ``count`` after the pseudo shuffle of this base."""
    kind = sample % base
    return kind * (count // base) + min(kind, count % base) + sample // base


@dataclass(frozen=True)
class Sampler:
    """Makes pools of a graph.

    Attributes:
        seed: of all walks.
        partition: of the nodes.
        walk_length: L.
        augmentation: s.
        shuffle_base: b of the pseudo shuffle; 1 for none.
        arrays: what kernels walk on.
        bias: 1 / p and 1 / q; 1 and 1 for walks of first order.
    """

    seed: np.uint64
    partition: Partition
    walk_length: int
    augmentation: int
    shuffle_base: int
    arrays: tuple
    bias: tuple[float, float]

    @classmethod
    def of(
        cls,
        graph: Graph,
        partition: Partition,
        seed: int,
        *,
        walk_length: int = 40,
        augmentation: int = 1,
        shuffle_base: int = 1,
        p: float = 1.0,
        q: float = 1.0,
    ) -> "Sampler":
        """A sampler of this graph, which must have an edge."""
        start = build_alias(np.array([0, graph.num_nodes]), graph.strength_N)
        weights = np.empty(0, np.float32) if graph.weights is None else graph.weights
        arrays = (*walk_arrays(graph), start.keep_M, start.other_M, weights, graph.strength_N)
        return cls(np.uint64(seed), partition, walk_length, augmentation, shuffle_base, arrays, (1 / p, 1 / q))

    def walks(self, first: int, count: int) -> np.ndarray:
        """Walks ``first`` ... ``first + count - 1``: nodes, int32 or int64 [C, L + 1], -1 behind the end of a walk."""
        walk_CL = np.empty((count, self.walk_length + 1), self.arrays[1].dtype)
        if self.bias == (1.0, 1.0):
            _walk(self.seed, first, walk_CL, *self.arrays[:6])
        else:
            arguments = (self.seed, first, walk_CL, *self.arrays, *self.bias)
            _walk_biased(*arguments)
        return walk_CL

    def pool(self, first: int, count: int, workers: Workers | None = None) -> Pool:
        """The pool of these walks; chunks of them are spread over ``workers`` (in this thread if there are none)."""
        chunks = [(at, min(CHUNK, first + count - at)) for at in range(first, first + count, CHUNK)]
        workers = workers or Workers(1)
        parts = self.partition
        num_blocks = parts.num_parts**2

        def make(chunk: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
            walk_CL, count_B = self.walks(*chunk), np.zeros(num_blocks, np.int64)
            _count(walk_CL, self.augmentation, parts.part_N, parts.num_parts, count_B)
            return walk_CL, count_B

        made = workers.map(make, chunks)
        count_KB = np.array([count_B for _, count_B in made], np.int64).reshape(len(made), num_blocks)
        count_B = count_KB.sum(0)
        start_B = np.cumsum(count_B) - count_B
        # Samples of each block in the chunks before.
        before_KB = np.cumsum(count_KB, 0) - count_KB
        head_S, tail_S = np.empty(count_B.sum(), np.int32), np.empty(count_B.sum(), np.int32)

        def fill(number: int) -> None:
            _fill(
                made[number][0],
                self.augmentation,
                parts.part_N,
                parts.local_N,
                parts.num_parts,
                before_KB[number],
                start_B,
                count_B,
                self.shuffle_base,
                head_S,
                tail_S,
            )

        workers.each(fill, [(number,) for number in range(len(made))])
        return Pool(head_S, tail_S, start_B, count_B, count)


@nb.njit(cache=True, nogil=True)
def _walk(seed, first, walk_CL, indptr, indices, keep_M, other_M, keep_N, other_N):
    for number in range(len(walk_CL)):
        state, bits = next_bits(stream(seed, first + number, WALKS))
        node = pick(bits, 0, len(keep_N), keep_N, other_N)
        for place in range(walk_CL.shape[1]):
            walk_CL[number, place] = node
            if node >= 0:
                state, bits = next_bits(state)
                node = step(bits, node, indptr, indices, keep_M, other_M)


@nb.njit(cache=True, nogil=True)
def _find(node, target, indptr, indices):
    """The place of the edge node -> target, -1 if there is none."""
    low, high = indptr[node], indptr[node + 1]
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < target:
            low = middle + 1
        else:
            high = middle
    return low if low < indptr[node + 1] and indices[low] == target else np.int64(-1)


@nb.njit(cache=True, nogil=True)
def _bias(before, target, indptr, indices, back, far):
    if target == before:
        return back
    return 1.0 if _find(before, target, indptr, indices) >= 0 else far


@nb.njit(cache=True, nogil=True)
def _through_row(bits, before, node, indptr, indices, weights, back, far):
    """One step of second order, by going through the edges of the node."""
    total = 0.0
    for edge in range(indptr[node], indptr[node + 1]):
        weight = 1.0 if len(weights) == 0 else weights[edge]
        total += weight * _bias(before, indices[edge], indptr, indices, back, far)
    left = to_unit(bits) * total
    for edge in range(indptr[node], indptr[node + 1]):
        weight = 1.0 if len(weights) == 0 else weights[edge]
        left -= weight * _bias(before, indices[edge], indptr, indices, back, far)
        if left < 0:
            return np.int64(indices[edge])
    return np.int64(indices[indptr[node + 1] - 1])


@nb.njit(cache=True, nogil=True)
def _second(state, before, node, indptr, indices, keep_M, other_M, weights, strength_N, back, far):
    """The node after ``before`` -> ``node``, by rejection. What the way back has beyond the others is a branch of its own."""
    if indptr[node + 1] == indptr[node]:
        return state, np.int64(-1)
    most = max(1.0, far)
    excess = 0.0
    if back > most:
        edge = _find(node, before, indptr, indices)
        if edge >= 0:
            excess = (back - most) * (1.0 if len(weights) == 0 else weights[edge])
    for _ in range(_TRIES):
        if excess > 0:
            state, bits = next_bits(state)
            if to_unit(bits) * (strength_N[node] * most + excess) < excess:
                return state, np.int64(before)
        state, bits = next_bits(state)
        target = step(bits, node, indptr, indices, keep_M, other_M)
        state, bits = next_bits(state)
        if to_unit(bits) * most < min(_bias(before, target, indptr, indices, back, far), most):
            return state, target
    state, bits = next_bits(state)
    return state, _through_row(bits, before, node, indptr, indices, weights, back, far)


@nb.njit(cache=True, nogil=True)
def _walk_biased(
    seed, first, walk_CL, indptr, indices, keep_M, other_M, keep_N, other_N, weights, strength_N, back, far
):
    for number in range(len(walk_CL)):
        state, bits = next_bits(stream(seed, first + number, WALKS))
        node = pick(bits, 0, len(keep_N), keep_N, other_N)
        before = np.int64(-1)
        for place in range(walk_CL.shape[1]):
            walk_CL[number, place] = node
            if node < 0:
                continue
            if before < 0:
                state, bits = next_bits(state)
                target = step(bits, node, indptr, indices, keep_M, other_M)
            else:
                state, target = _second(
                    state, before, node, indptr, indices, keep_M, other_M, weights, strength_N, back, far
                )
            before, node = node, target


@nb.njit(cache=True, nogil=True)
def _count(walk_CL, reach, part_N, num_parts, count_B):
    length = walk_CL.shape[1]
    part_L = np.empty(length, np.int64)
    for number in range(len(walk_CL)):
        end = 0
        while end < length and walk_CL[number, end] >= 0:
            part_L[end] = part_N[walk_CL[number, end]]
            end += 1
        for j in range(end):
            for k in range(j + 1, min(j + reach + 1, end)):
                count_B[part_L[j] * num_parts + part_L[k]] += 1


@nb.njit(cache=True, nogil=True)
def _fill(walk_CL, reach, part_N, local_N, num_parts, before_B, start_B, count_B, base, head_S, tail_S):
    length = walk_CL.shape[1]
    part_L, local_L = np.empty(length, np.int64), np.empty(length, np.int32)
    sample_B = before_B.copy()
    for number in range(len(walk_CL)):
        end = 0
        while end < length and walk_CL[number, end] >= 0:
            part_L[end], local_L[end] = part_N[walk_CL[number, end]], local_N[walk_CL[number, end]]
            end += 1
        for j in range(end):
            for k in range(j + 1, min(j + reach + 1, end)):
                block = part_L[j] * num_parts + part_L[k]
                sample = sample_B[block]
                sample_B[block] += 1
                slot = sample if base == 1 else shuffled(sample, count_B[block], base)
                head_S[start_B[block] + slot] = local_L[j]
                tail_S[start_B[block] + slot] = local_L[k]
