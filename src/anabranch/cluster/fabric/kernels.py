"""Loops of the simulators: interpreted where there is little to do, and the same lines compiled where there is much and numba is here.

Compiling takes seconds, once per machine; interpreted they take about a hundred times as long as compiled.

A heap is a tuple of three arrays (key, order, item) of which the first ``count`` rows are a binary heap by key, then order, so that what
comes out does not depend on what else is in it.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anabranch.extras import is_installed
from anabranch.places import cache_folder, can_write

Loop = TypeVar("Loop", bound=Callable[..., Any])
# Steps of the innermost loop that are quicker interpreted than compiled: about a second of them.
FEW = 200_000
_LOOPS: list[Callable[..., Any]] = []


def kernel(loop: Loop) -> Loop:
    """Mark a function that can be compiled, and be called by others that are."""
    _LOOPS.append(loop)
    return loop


def fitting(loop: Loop, steps: float) -> Loop:
    """``loop`` as it is quicker for so many steps of its innermost loop: as it stands, or compiled where there is numba."""
    return _compiled(loop) if steps > FEW and is_installed("numba") else loop


@cache
def _compiled(loop: Any) -> Any:
    _keep_compiled()
    import numba
    from numba.extending import register_jitable

    while _LOOPS:
        # Once each: from then on compiled loops may call them.
        register_jitable(_LOOPS.pop())
    return numba.njit(cache=True, nogil=True)(loop)


def _keep_compiled(package: Path = Path(__file__).parent) -> None:
    """Numba keeps what it compiled beside the module; where nothing can be written there, in our cache."""
    if os.environ.get("NUMBA_CACHE_DIR") or can_write(package / "__pycache__"):
        return
    os.environ["NUMBA_CACHE_DIR"] = str(cache_folder() / "numba")
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


@kernel
def push(heap: Any, count: int, key: Any, order: int, item: int) -> int:
    """Add a row to a heap of ``count``; the new count. There must be room."""
    keys, orders, items = heap
    place = count
    while place > 0:
        above = (place - 1) >> 1
        if keys[above] < key or (keys[above] == key and orders[above] <= order):
            break
        keys[place], orders[place], items[place] = keys[above], orders[above], items[above]
        place = above
    keys[place], orders[place], items[place] = key, order, item
    return count + 1


@kernel
def pop(heap: Any, count: int) -> int:
    """Take the first row out, having read it before; the new count."""
    keys, orders, items = heap
    count -= 1
    key, order, item = keys[count], orders[count], items[count]
    place = 0
    while True:
        below = 2 * place + 1
        if below >= count:
            break
        other = below + 1
        if other < count and (
            keys[other] < keys[below] or (keys[other] == keys[below] and orders[other] < orders[below])
        ):
            below = other
        if key < keys[below] or (key == keys[below] and order <= orders[below]):
            break
        keys[place], orders[place], items[place] = keys[below], orders[below], items[below]
        place = below
    keys[place], orders[place], items[place] = key, order, item
    return count


@kernel
def fill(
    start: np.ndarray,
    link_E: np.ndarray,
    weight_E: np.ndarray,
    capacity_L: np.ndarray,
    active_A: np.ndarray,
    rate_Q: np.ndarray,
) -> int:
    """Max-min fair rates of the active pieces, by progressive filling; returns the number of links that were filled.

    All rates grow alike until a link is full; whoever crosses it keeps its rate, the others grow on. Links wait in a heap by the rate
    at which they would be full. That rate never falls while pieces stop elsewhere, so a link that comes out with an old one is put back.

    Args:
        start, link_E, weight_E: links of each piece, with the share of its rate that a link carries.
        capacity_L: float64, 0 for a link that carries nothing.
        active_A: pieces that send.
        rate_Q: float64, written for the active ones.
    """
    num_links = len(capacity_L)
    used_L, grows_L, count_L = np.zeros(num_links), np.zeros(num_links), np.zeros(num_links + 1, np.int64)
    for piece in active_A:
        rate_Q[piece] = -1.0
        for e in range(start[piece], start[piece + 1]):
            grows_L[link_E[e]] += weight_E[e]
            count_L[link_E[e] + 1] += 1
    first_L = np.cumsum(count_L)
    member, filled_L = np.empty(first_L[-1], np.int64), first_L[:-1].copy()
    for piece in active_A:
        for e in range(start[piece], start[piece + 1]):
            member[filled_L[link_E[e]]] = piece
            filled_L[link_E[e]] += 1
    left_L = count_L[1:].copy()
    heap = (np.empty(num_links + 1), np.empty(num_links + 1, np.int64), np.empty(num_links + 1, np.int64))
    count, rounds, left = 0, 0, len(active_A)
    for link in range(num_links):
        if left_L[link]:
            count = push(heap, count, capacity_L[link] / grows_L[link], link, link)
    while left > 0 and count > 0:
        level, link = heap[0][0], heap[2][0]
        count = pop(heap, count)
        if left_L[link] == 0:
            continue
        now = max(capacity_L[link] - used_L[link], 0.0) / grows_L[link]
        if now > level:
            count = push(heap, count, now, link, link)
            continue
        rounds += 1
        for m in range(first_L[link], first_L[link + 1]):
            piece = member[m]
            if rate_Q[piece] >= 0.0:
                continue
            rate_Q[piece] = level
            left -= 1
            for e in range(start[piece], start[piece + 1]):
                other = link_E[e]
                used_L[other] += weight_E[e] * level
                grows_L[other] -= weight_E[e]
                left_L[other] -= 1
                if left_L[other] == 0:
                    grows_L[other] = 0.0
    return rounds


@kernel
def enter_steps(
    rank: int, cur_R: np.ndarray, pending: np.ndarray, begin: np.ndarray, order_Q: np.ndarray, started: np.ndarray
) -> int:
    """Let a rank go on to the first step in which it has something left; its pieces of steps that it enters are put into ``started``.

    ``pending[rank, step]`` counts pieces that the rank has still to send or receive; ``begin`` says where its own ones of a step stand
    in ``order_Q``. Returns how many were started.
    """
    count, num_steps = 0, pending.shape[1]
    while cur_R[rank] < num_steps:
        if cur_R[rank] >= 0 and pending[rank, cur_R[rank]] > 0:
            break
        cur_R[rank] += 1
        if cur_R[rank] < num_steps:
            place = rank * num_steps + cur_R[rank]
            for at in range(begin[place], begin[place + 1]):
                started[count] = order_Q[at]
                count += 1
    return count


@kernel
def drain(
    start: np.ndarray,
    link_E: np.ndarray,
    weight_E: np.ndarray,
    capacity_L: np.ndarray,
    left_Q: np.ndarray,
    who_Q: np.ndarray,
    pending: np.ndarray,
    begin: np.ndarray,
    order_Q: np.ndarray,
    resolution: float,
    finish_Q: np.ndarray,
) -> int:
    """Let all pieces run to their end at max-min fair rates, shared anew whenever one ends; returns how often that was done.

    Args:
        left_Q: float64, bits; used up.
        who_Q: int64 [Q, 3], source, destination and step of each piece.
        pending, begin, order_Q: see `enter_steps`.
        resolution: seconds; ends within so many of the first are taken together, and bandwidth is shared anew after the last.
        finish_Q: float64, written: seconds. -1 stays where a piece can never end.
    """
    num_ranks, num_pieces = pending.shape[0], len(left_Q)
    cur_R, started, ended = (
        np.full(num_ranks, -1, np.int64),
        np.empty(num_pieces, np.int64),
        np.empty(num_pieces, np.int64),
    )
    active, rate_Q = np.empty(num_pieces, np.int64), np.zeros(num_pieces)
    count, now, shares = 0, 0.0, 0
    for rank in range(num_ranks):
        for s in range(enter_steps(rank, cur_R, pending, begin, order_Q, started)):
            active[count] = started[s]
            count += 1
    while count > 0:
        fill(start, link_E, weight_E, capacity_L, active[:count], rate_Q)
        shares += 1
        first = np.inf
        for a in range(count):
            if rate_Q[active[a]] > 0.0:
                first = min(first, left_Q[active[a]] / rate_Q[active[a]])
        if first == np.inf:
            break
        # Ends that differ by rounding alone are one.
        most = first * (1.0 + 1e-9) + resolution
        passed = first
        for a in range(count):
            lasts = left_Q[active[a]] / rate_Q[active[a]] if rate_Q[active[a]] > 0.0 else np.inf
            if lasts <= most and lasts > passed:
                passed = lasts
        kept, over = 0, 0
        for a in range(count):
            piece = active[a]
            lasts = left_Q[piece] / rate_Q[piece] if rate_Q[piece] > 0.0 else np.inf
            if lasts <= most:
                finish_Q[piece] = now + lasts
                left_Q[piece] = 0.0
                pending[who_Q[piece, 0], who_Q[piece, 2]] -= 1
                pending[who_Q[piece, 1], who_Q[piece, 2]] -= 1
                ended[over] = piece
                over += 1
            else:
                left_Q[piece] -= rate_Q[piece] * passed
                active[kept] = piece
                kept += 1
        now += passed
        count = kept
        for e in range(over):
            for side in range(2):
                for s in range(enter_steps(who_Q[ended[e], side], cur_R, pending, begin, order_Q, started)):
                    active[count] = started[s]
                    count += 1
    return shares
