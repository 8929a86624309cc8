"""Other ways to draw the walks of an index than one by one: as counts of walkers, and as one long walk.

`count_moves` moves counts: of c walkers on a node Binomial(c, 1 - alpha) go on and are spread over the neighbours multinomially, which
is the same distribution as c walkers by themselves. ``rounding`` instead rounds c (1 - alpha) and every edge's share of it up or down at
random (the reference implementation): right in expectation, of smaller variance, but walkers are not conserved.

`count_long_path` lets a walk that ended start again until W / alpha nodes are visited.
"""
# Shapes: N nodes, M edges

from typing import NamedTuple

import numba as nb
import numpy as np

from anabranch.graph.random import next_bits, stream, to_unit
from anabranch.graph.walk import step


class Fronts(NamedTuple):
    """Where walkers stand, and where after the step: int32 counts, 0 before and after, and the ids that have one. Empty where none move."""

    here_N: np.ndarray
    next_N: np.ndarray
    front_N: np.ndarray
    ahead_N: np.ndarray


@nb.njit(cache=True, nogil=True)
def binomial(state, count, chance):
    """A draw of Binomial(count, chance): jumps between the rarer outcomes, which are geometric. Returns the state too."""
    if chance <= 0.0 or count == 0:
        return state, 0
    if chance >= 1.0:
        return state, count
    rare = min(chance, 1.0 - chance)
    scale = 1.0 / np.log1p(-rare)
    found, place = 0, 0
    while True:
        state, bits = next_bits(state)
        jump = np.log(1.0 - to_unit(bits)) * scale
        if jump >= count - place:
            break
        place += int(jump) + 1
        found += 1
        if place >= count:
            break
    return state, found if chance <= 0.5 else count - found


@nb.njit(cache=True, nogil=True)
def rounded(state, amount):
    """``amount`` rounded up with the probability of its fraction, else down."""
    whole = int(amount)
    state, bits = next_bits(state)
    return state, whole + (1 if to_unit(bits) < amount - whole else 0)


@nb.njit(cache=True, nogil=True)
def count_moves(seed, source, walks, alpha, full, rounding, max_steps, walk, weight_M, fronts, counts):
    """Visits (or ends) of ``walks`` walks from ``source``, vanishing at dead ends.

    Takes a `Walk` and its weights, `Fronts`, and `Counts`. Returns how many ids have a count, and how many walkers were cut at
    ``max_steps`` (0: no limit).
    """
    indptr, indices, keep_M, other_M = walk
    here_N, next_N, front_N, ahead_N = fronts
    count_N, touched_N = counts.count_N, counts.touched_N
    state = stream(seed, source, 0)
    here_N[source] = walks
    front_N[0] = source
    size, touched, steps, cut = 1, 0, 0, 0
    while size > 0:
        ahead = 0
        for place in range(size):
            node = front_N[place]
            count = here_N[node]
            here_N[node] = 0
            if rounding:
                state, alive = rounded(state, count * (1.0 - alpha))
            else:
                state, alive = binomial(state, count, 1.0 - alpha)
            if max_steps > 0 and steps == max_steps:
                cut += alive
                alive = 0
                counted = count
            else:
                counted = count if full else count - alive
            if counted > 0:
                if count_N[node] == 0:
                    touched_N[touched] = node
                    touched += 1
                count_N[node] += counted
            start, end = indptr[node], indptr[node + 1]
            if alive == 0 or start == end:
                continue
            if not rounding and alive < end - start:
                for _ in range(alive):
                    state, bits = next_bits(state)
                    to = step(bits, node, indptr, indices, keep_M, other_M)
                    if next_N[to] == 0:
                        ahead_N[ahead] = to
                        ahead += 1
                    next_N[to] += 1
                continue
            total = 0.0
            for edge in range(start, end):
                total += weight_M[edge] if len(weight_M) else 1.0
            left, left_weight = alive, total
            for edge in range(start, end):
                weight = weight_M[edge] if len(weight_M) else 1.0
                if rounding:
                    state, moved = rounded(state, alive * weight / total)
                else:
                    if left == 0:
                        break
                    chance = 1.0 if edge == end - 1 else min(weight / left_weight, 1.0)
                    state, moved = binomial(state, left, chance)
                    left -= moved
                    left_weight -= weight
                if moved > 0:
                    to = indices[edge]
                    if next_N[to] == 0:
                        ahead_N[ahead] = to
                        ahead += 1
                    next_N[to] += moved
        front_N, ahead_N = ahead_N, front_N
        here_N, next_N = next_N, here_N
        size = ahead
        steps += 1
    return touched, cut


@nb.njit(cache=True, nogil=True)
def count_long_path(seed, source, visits, alpha, full, walk, counts):
    """``visits`` visits of a walk that goes back to ``source`` whenever it ends or vanishes; or the ends among them.

    Returns how many ids have a count, and how many walks ended or vanished.
    """
    indptr, indices, keep_M, other_M = walk
    count_N, touched_N = counts.count_N, counts.touched_N
    state = stream(seed, source, 0)
    node, touched, starts = np.int64(source), 0, 1
    for _ in range(visits):
        state, bits = next_bits(state)
        ends = to_unit(bits) < alpha
        if full or ends:
            if count_N[node] == 0:
                touched_N[touched] = node
                touched += 1
            count_N[node] += 1
        to = np.int64(-1)
        if not ends:
            state, bits = next_bits(state)
            to = step(bits, node, indptr, indices, keep_M, other_M)
        if to < 0:
            to = np.int64(source)
            starts += 1
        node = to
    return touched, starts - 1
