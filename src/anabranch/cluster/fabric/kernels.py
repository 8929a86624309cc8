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
from typing import Any, NamedTuple, TypeVar

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


def in_lists(values: Any) -> Any:
    """Arrays of one dimension as lists, on which interpreted loops are several times as fast; tuples likewise, the rest as it is."""
    if isinstance(values, tuple):
        made = [in_lists(value) for value in values]
        return type(values)(*made) if hasattr(values, "_fields") else tuple(made)
    return values.tolist() if isinstance(values, np.ndarray) and values.ndim == 1 else values


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


class Scratch(NamedTuple):
    """Room for `fill`: of each link what is used, by how much it grows, where its members begin and are filled to, how many are left."""

    used_L: Any
    grows_L: Any
    first_L: Any
    filled_L: Any
    left_L: Any
    member: Any
    heap: Any


def scratch(num_links: int, num_entries: int) -> Scratch:
    """Arrays for so many links, and pairs of a piece and a link."""
    heap = (np.zeros(num_links + 1), np.zeros(num_links + 1, np.int64), np.zeros(num_links + 1, np.int64))
    first_L, filled_L, left_L = (np.zeros(num_links + 1, np.int64) for _ in range(3))
    member = np.zeros(num_entries, np.int64)
    return Scratch(np.zeros(num_links), np.zeros(num_links), first_L, filled_L, left_L, member, heap)


@kernel
def _join(
    start: Any, link_E: Any, weight_E: Any, num_links: int, active_A: Any, num_active: int, rate_Q: Any, room: Any
) -> None:
    """Make ``room`` and the rates ready: who crosses each link, and by how much it fills while all rates grow alike."""
    for link in range(num_links):
        room.used_L[link], room.grows_L[link], room.left_L[link] = 0.0, 0.0, 0
    for a in range(num_active):
        piece = active_A[a]
        rate_Q[piece] = -1.0
        for e in range(start[piece], start[piece + 1]):
            room.grows_L[link_E[e]] += weight_E[e]
            room.left_L[link_E[e]] += 1
    total = 0
    for link in range(num_links):
        room.first_L[link], room.filled_L[link] = total, total
        total += room.left_L[link]
    room.first_L[num_links] = total
    for a in range(num_active):
        piece = active_A[a]
        for e in range(start[piece], start[piece + 1]):
            room.member[room.filled_L[link_E[e]]] = piece
            room.filled_L[link_E[e]] += 1


@kernel
def fill(
    start: Any,
    link_E: Any,
    weight_E: Any,
    capacity_L: Any,
    active_A: Any,
    num_active: int,
    rate_Q: Any,
    room: Any,
) -> int:
    """Max-min fair rates of the active pieces, by progressive filling; returns the number of links that were filled.

    All rates grow alike until a link is full; whoever crosses it keeps its rate, the others grow on. Links wait in a heap by the rate
    at which they would be full. That rate never falls while pieces stop elsewhere, so a link that comes out with an old one is put back.

    Args:
        start, link_E, weight_E: links of each piece, with the share of its rate that a link carries. Arrays, or lists, as all here.
        capacity_L: floats, 0 for a link that carries nothing.
        active_A: pieces that send, the first ``num_active`` of it.
        rate_Q: floats, written for the active ones.
        room: a `Scratch`.
    """
    num_links, heap = len(capacity_L), room.heap
    _join(start, link_E, weight_E, num_links, active_A, num_active, rate_Q, room)
    count, rounds, left = 0, 0, num_active
    for link in range(num_links):
        if room.left_L[link]:
            count = push(heap, count, capacity_L[link] / room.grows_L[link], link, link)
    while left > 0 and count > 0:
        level, link = heap[0][0], heap[2][0]
        count = pop(heap, count)
        if room.left_L[link] == 0:
            continue
        now = max(capacity_L[link] - room.used_L[link], 0.0) / room.grows_L[link]
        if now > level:
            count = push(heap, count, now, link, link)
            continue
        rounds += 1
        for m in range(room.first_L[link], room.first_L[link + 1]):
            piece = room.member[m]
            if rate_Q[piece] >= 0.0:
                continue
            rate_Q[piece] = level
            left -= 1
            for e in range(start[piece], start[piece + 1]):
                other = link_E[e]
                room.used_L[other] += weight_E[e] * level
                room.grows_L[other] -= weight_E[e]
                room.left_L[other] -= 1
                if room.left_L[other] == 0:
                    room.grows_L[other] = 0.0
    return rounds


class Chain(NamedTuple):
    """Who waits for what.

    Attributes:
        who_Q: int64 [Q, 3], source, destination and step of each piece.
        pending: int64 [R, S], pieces that a rank has still to send or to receive in a step.
        begin: where a rank's own pieces of a step stand in ``order_Q``: those of rank r and step s from place r S + s of ``begin``.
        order_Q: pieces by source, step and window.
        last_O: bool, whether a place of ``order_Q`` is the last of its window.
        cur_R: the step that a rank is in, -1 before the first.
        next_R: the place in ``order_Q`` of a rank's next piece.
        out_R: pieces of a rank's window that are not over.
        started: room for numbers of pieces.
    """

    who_Q: Any
    pending: Any
    begin: Any
    order_Q: Any
    last_O: Any
    cur_R: Any
    next_R: Any
    out_R: Any
    started: Any


@kernel
def start_window(chain: Any, rank: int) -> int:
    """Start the next window of a rank's step; how many pieces that are, whose numbers are in ``started``."""
    count, end = 0, chain.begin[rank * chain.pending.shape[1] + chain.cur_R[rank] + 1]
    while chain.next_R[rank] < end:
        place = chain.next_R[rank]
        chain.started[count] = chain.order_Q[place]
        count += 1
        chain.next_R[rank] = place + 1
        if chain.last_O[place]:
            break
    chain.out_R[rank] = count
    return count


@kernel
def go_on(chain: Any, rank: int) -> int:
    """Let a rank start what it may: its next window, or what it has in the next step in which it has something left.

    Returns how many pieces were started; their numbers are in ``started``.
    """
    num_steps, step = chain.pending.shape[1], chain.cur_R[rank]
    if (
        0 <= step < num_steps
        and chain.out_R[rank] == 0
        and chain.next_R[rank] < chain.begin[rank * num_steps + step + 1]
    ):
        return start_window(chain, rank)
    count = 0
    while chain.cur_R[rank] < num_steps:
        if chain.cur_R[rank] >= 0 and chain.pending[rank, chain.cur_R[rank]] > 0:
            break
        chain.cur_R[rank] += 1
        if chain.cur_R[rank] < num_steps:
            chain.next_R[rank] = chain.begin[rank * num_steps + chain.cur_R[rank]]
            count = start_window(chain, rank)
    return count


class Pieces(NamedTuple):
    """What `drain` knows of pieces: bits that are left, rates, and when each ended (-1 while it has not); room for numbers of pieces."""

    left_Q: Any
    rate_Q: Any
    finish_Q: Any
    active: Any
    ended: Any


def pieces_of(bits_Q: np.ndarray) -> Pieces:
    """All at the start."""
    count = len(bits_Q)
    left_Q = np.asarray(bits_Q, np.float64).copy()
    numbers = (np.zeros(count, np.int64) for _ in range(2))
    return Pieces(left_Q, np.zeros(count), np.full(count, -1.0), *numbers)


@kernel
def _first_end(pieces: Any, count: int, resolution: float) -> tuple[float, float]:
    """Seconds up to which ends are one, and after how many the last of those comes; infinite where none can end."""
    first = np.inf
    for a in range(count):
        piece = pieces.active[a]
        if pieces.rate_Q[piece] > 0.0:
            first = min(first, pieces.left_Q[piece] / pieces.rate_Q[piece])
    # Ends that differ by rounding alone are one.
    most, passed = first * (1.0 + 1e-9) + resolution, first
    for a in range(count):
        piece = pieces.active[a]
        if pieces.rate_Q[piece] > 0.0:
            lasts = pieces.left_Q[piece] / pieces.rate_Q[piece]
            if passed < lasts <= most:
                passed = lasts
    return most, passed


@kernel
def drain(
    start: Any,
    link_E: Any,
    weight_E: Any,
    capacity_L: Any,
    pieces: Any,
    chain: Any,
    resolution: float,
    room: Any,
) -> int:
    """Let all pieces run to their end at max-min fair rates, shared anew whenever one ends; returns how often that was done.

    Args:
        start, link_E, weight_E, capacity_L, room: as for `fill`.
        pieces: a `Pieces`; ``finish_Q`` is the result, in seconds. -1 stays where a piece can never end.
        chain: a `Chain`, used up.
        resolution: seconds; ends within so many of the first are taken together, and bandwidth is shared anew after the last.
    """
    count, now, shares = 0, 0.0, 0
    for rank in range(chain.pending.shape[0]):
        for s in range(go_on(chain, rank)):
            pieces.active[count] = chain.started[s]
            count += 1
    while count > 0:
        fill(start, link_E, weight_E, capacity_L, pieces.active, count, pieces.rate_Q, room)
        shares += 1
        most, passed = _first_end(pieces, count, resolution)
        if passed == np.inf:
            break
        kept, over = 0, 0
        for a in range(count):
            piece = pieces.active[a]
            rate = pieces.rate_Q[piece]
            if rate > 0.0 and pieces.left_Q[piece] / rate <= most:
                pieces.finish_Q[piece] = now + pieces.left_Q[piece] / rate
                pieces.left_Q[piece] = 0.0
                src, dst, step = chain.who_Q[piece, 0], chain.who_Q[piece, 1], chain.who_Q[piece, 2]
                chain.pending[src, step] -= 1
                chain.pending[dst, step] -= 1
                chain.out_R[src] -= 1
                pieces.ended[over] = piece
                over += 1
            else:
                pieces.left_Q[piece] -= rate * passed
                pieces.active[kept] = piece
                kept += 1
        now += passed
        count = kept
        for e in range(over):
            for side in range(2):
                for s in range(go_on(chain, chain.who_Q[pieces.ended[e], side])):
                    pieces.active[count] = chain.started[s]
                    count += 1
    return shares
