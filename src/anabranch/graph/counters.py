"""Counting where walks from one node go: the kernel under PageRank by Monte Carlo and under indexes made of it.

A walk counts the node it stands on, then ends with probability alpha, else it steps to an out-neighbour by weight. The number of steps is
therefore geometric, P(at least k steps) = (1 - alpha)^k, and is drawn first. ``full`` counts every visit, otherwise the last node alone.

Counts stand in a dense array of N numbers beside the list of those that are not 0, so that a source costs what it touches. All walks of a
source advance together: their look-ups do not wait for each other. Draws come from the stream (seed, source, part), in an order that only
the walks decide, so counts are the same for any split of the sources and any number of threads.
"""
# Shapes: N nodes, M edges, W walks

from typing import NamedTuple

import numba as nb
import numpy as np

from anabranch.graph.random import below, next_bits, stream, to_unit
from anabranch.graph.walk import Walk, step

# What a walk does at a node without edges: see `anabranch.graph.ppr.rules`. One that vanishes there has counted its visit of
# the node but ends nowhere.
SOURCE, ABSORB, UNIFORM, VANISH = 0, 1, 2, 3


class Counts(NamedTuple):
    """Arrays of one thread.

    Attributes:
        left_W, at_W: int64, scratch of one number per walk.
        count_N: int32, counts; 0 wherever ``touched_N`` does not say otherwise.
        touched_N: ids with a count.
    """

    left_W: np.ndarray
    at_W: np.ndarray
    count_N: np.ndarray
    touched_N: np.ndarray


@nb.njit(cache=True, nogil=True)
def draw_lengths(state, alpha, max_steps, left_W):
    """Steps of each walk, at most ``max_steps`` (0: no limit). Returns the state of the stream and how many walks were cut."""
    scale = 1.0 / np.log1p(-alpha)
    cut = 0
    for walk in range(len(left_W)):
        state, bits = next_bits(state)
        length = np.int64(np.log(1.0 - to_unit(bits)) * scale)
        if max_steps > 0 and length > max_steps:
            length = max_steps
            cut += 1
        left_W[walk] = length
    return state, cut


@nb.njit(cache=True, nogil=True)
def count_walks(seed, source, part, alpha, dangling, full, max_steps, walk, counts, touched):
    """Walk ``len(counts.left_W)`` times from ``source`` and add to its counts.

    Args:
        seed, source, part: keys of the stream; ``part`` tells batches of walks of one source apart.
        alpha: probability to end before each step.
        dangling: `SOURCE`, `ABSORB`, `UNIFORM` or `VANISH`.
        full: count every visit (else the end of each walk).
        max_steps: longest walk; 0 for no limit.
        walk: of `anabranch.graph.walk.walk_arrays`.
        counts: a `Counts`.
        touched: how many ids have a count.

    Returns:
        How many ids have a count now, and how many walks were cut.
    """
    indptr, indices, keep_M, other_M = walk
    left_W, at_W, count_N, touched_N = counts
    state = stream(seed, source, part)
    state, cut = draw_lengths(state, alpha, max_steps, left_W)
    num_nodes = len(indptr) - 1
    alive = len(left_W)
    for number in range(alive):
        at_W[number] = source
    while alive > 0:
        still = 0
        for number in range(alive):
            node = at_W[number]
            if full or left_W[number] == 0:
                if count_N[node] == 0:
                    touched_N[touched] = node
                    touched += 1
                count_N[node] += 1
            if left_W[number] > 0:
                state, bits = next_bits(state)
                to = step(bits, node, indptr, indices, keep_M, other_M)
                if to < 0:
                    if dangling == VANISH:
                        continue
                    to = node
                    if dangling == SOURCE:
                        to = source
                    elif dangling == UNIFORM:
                        to = below(bits, num_nodes)
                at_W[still] = to
                left_W[still] = left_W[number] - 1
                still += 1
        alive = still
    return touched, cut


@nb.njit(cache=True, nogil=True)
def add_walks(seed, source, part, alpha, dangling, full, max_steps, walk, counts, touched):
    """`count_walks` for Python, of plain tuples."""
    return count_walks(seed, source, part, alpha, dangling, full, max_steps, Walk(*walk), Counts(*counts), touched)


@nb.njit(cache=True, nogil=True)
def take_counts(count_N, touched_N, touched, ids, values, scale):
    """Move counts, times ``scale``, to the front of ``ids`` and ``values`` (in no order) and set them back to 0."""
    for place in range(touched):
        node = touched_N[place]
        ids[place] = node
        values[place] = count_N[node] * scale
        count_N[node] = 0
