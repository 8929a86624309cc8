"""Searches: a walk by codes in memory that reads a block for each element it expands, and measures what lies in it exactly.

GreedySearch of DiskANN (algorithm 1, and section 3.3 for beams and the ranking by full vectors): a sorted pool keeps the ``ef`` nearest by
their codes; the nearest few that were not expanded yet, a beam, have their blocks asked for together, and the walk goes on to their
neighbours. It begins where a walk over the entry layer, which is in memory whole, ends, and at the roots, from which everything can be
reached. Results are the nearest of all that was measured.

What else lies in a block is measured, too, and expanded if it is near enough for the pool: no block is read twice in a search. (It would
have been in the pool later, or never: what the pool takes only becomes nearer.)
"""
# Shapes: N slots, Q queries, K neighbours, E elements of the entry layer, L their links, T room for slots that were seen

from typing import NamedTuple

import numpy as np

from anabranch.graph.codes import CENTRES, fill_table
from anabranch.graph.disk.blocks import are_links_sound, ask_for, bring, label_of, links_at
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import (
    address,
    get_f32,
    get_i32,
    get_u8,
    helper,
    jit,
    kernel,
    prefetch,
    set_u8,
)
from anabranch.graph.hnsw.search import PADDING, clear, insert

# Of the walk over the entry layer.
ENTRY_EF = 16

# What counts are of.
BLOCKS, CODES, EXACT, BAD = range(4)

_SEEN, _DONE = 1, 2

# A step of one kernel that is written by itself.
part = jit(inline="always")


class Known(NamedTuple):
    """What is in memory of an index, as kernels take it.

    Attributes:
        codes: address of uint8 [N, M].
        centre_MWK: what they stand for.
        root_R: int32, slots that every walk begins at.
        slot_E: int32, slots of the entry layer.
        link_EL: int32, numbers in the layer; -1 behind the last.
        cache_CW: uint64, blocks.
    """

    codes: int
    centre_MWK: np.ndarray
    root_R: np.ndarray
    slot_E: np.ndarray
    link_EL: np.ndarray
    cache_CW: np.ndarray


class Room(NamedTuple):
    """Of one thread, and the caller's, as what is taken by address must be: an array of a kernel's own is gone after its last use by name.

    Attributes:
        marks_B: uint8, zeros, a byte for each 4 slots and one more.
        table_MK: float32 [M, 256], for the table of a query.
        block_BW: uint64, for a beam of blocks.
    """

    marks_B: np.ndarray
    table_MK: np.ndarray
    block_BW: np.ndarray


class Pools(NamedTuple):
    """Of a walk, distances and numbers: what is nearest by codes, of all slots (``d``, ``i``) and of the entry layer (``near_d``,
    ``near_e``), and results (``best_d``, and ``best_l``, labels); neighbours of an element (``todo``)."""

    d: np.ndarray
    i: np.ndarray
    near_d: np.ndarray
    near_e: np.ndarray
    best_d: np.ndarray
    best_l: np.ndarray
    todo: np.ndarray


class Query(NamedTuple):
    """Numbers alone, which go from kernel to kernel at no cost: addresses of its vector, its table, the marks of its walk, codes and what
    it may find (0 for all), bytes of a code, and the size of its pool."""

    vector: int
    table: int
    marks: int
    codes: int
    allowed: int
    parts: int
    ef: int


@helper
def code_distance(codes, parts, slot, table):
    """Of a query, by its table, to a slot, by its code; both are addresses."""
    row = codes + slot * parts
    a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    part = np.int64(0)
    # Four sums that do not wait for each other.
    while part + 4 <= parts:
        place = part * CENTRES
        a += get_f32(table, place + np.int64(get_u8(row, part)))
        b += get_f32(table, place + CENTRES + np.int64(get_u8(row, part + 1)))
        c += get_f32(table, place + 2 * CENTRES + np.int64(get_u8(row, part + 2)))
        d += get_f32(table, place + 3 * CENTRES + np.int64(get_u8(row, part + 3)))
        part += 4
    while part < parts:
        a += get_f32(table, part * CENTRES + np.int64(get_u8(row, part)))
        part += 1
    return (a + b) + (c + d)


@helper
def has(marks, slot, what):
    """Whether a slot carries a mark: two bits each, four slots a byte."""
    return (np.int64(get_u8(marks, slot >> 2)) >> (2 * (slot & 3))) & what != 0


@helper
def put(marks, slot, what):
    """Let a slot carry a mark."""
    set_u8(marks, slot >> 2, np.uint8(np.int64(get_u8(marks, slot >> 2)) | (what << (2 * (slot & 3)))))


@helper
def forget(marks, seen_T, number):
    """Take the marks off all slots that were seen."""
    for place in range(number):
        set_u8(marks, np.int64(seen_T[place]) >> 2, np.uint8(0))


@helper
def keep_best(best_d, best_l, held, found, label):
    """Put a result into a pool sorted by (distance, label), whose last falls out if it is full; how many it holds."""
    room = len(best_d)
    if held == room and not (found < best_d[room - 1] or (found == best_d[room - 1] and label < best_l[room - 1])):
        return held
    place = min(held, room - 1)
    while place > 0 and (best_d[place - 1] > found or (best_d[place - 1] == found and best_l[place - 1] > label)):
        best_d[place], best_l[place] = best_d[place - 1], best_l[place - 1]
        place -= 1
    best_d[place], best_l[place] = found, label
    return min(held + 1, room)


@helper
def enter(known, query, near_d, near_e):
    """Walk over the entry layer from its first element; how many entries of ``near_e`` (numbers in the layer) are found, and evaluations.

    Leaves no marks.
    """
    slot_E, link_EL = known.slot_E, known.link_EL
    codes, parts, table, marks = query.codes, query.parts, query.table, query.marks
    clear(near_d, 0)
    near_d[0], near_e[0] = code_distance(codes, parts, np.int64(slot_E[0]), table), 0
    seen = np.empty(ENTRY_EF * 64 + link_EL.shape[1] + 1, np.int32)
    seen[0] = slot_E[0]
    put(marks, np.int64(slot_E[0]), _SEEN)
    size, at, number = 1, 0, 1
    while at < size and number + link_EL.shape[1] <= len(seen):
        if near_e[at] < 0:
            at += 1
            continue
        here = np.int64(near_e[at])
        near_e[at] = ~near_e[at]
        lowest = at + 1
        for place in range(link_EL.shape[1]):
            entry = np.int64(link_EL[here, place])
            if entry < 0:
                break
            slot = np.int64(slot_E[entry])
            if has(marks, slot, _SEEN):
                continue
            put(marks, slot, _SEEN)
            seen[number] = slot
            number += 1
            found = code_distance(codes, parts, slot, table)
            if found < near_d[ENTRY_EF - 1]:
                lowest = min(lowest, insert(near_d, near_e, size, ENTRY_EF, found, entry))
                size = min(size + 1, ENTRY_EF)
        at = lowest
    forget(marks, seen, number)
    return size, number


@helper
def begin(known, query, pools, seen_T):
    """Fill a pool with what the walk begins at; its size, how many slots were seen, evaluations."""
    slot_E, root_R = known.slot_E, known.root_R
    pool_d, pool_i, near_d, near_e = pools.d, pools.i, pools.near_d, pools.near_e
    codes, parts, table, marks, ef = query.codes, query.parts, query.table, query.marks, query.ef
    clear(pool_d, 0)
    size = number = 0
    found, evaluations = enter(known, query, near_d, near_e)
    for place in range(found + len(root_R)):
        entry = np.int64(near_e[place]) if place < found else np.int64(0)
        slot = np.int64(slot_E[~entry if entry < 0 else entry]) if place < found else np.int64(root_R[place - found])
        if has(marks, slot, _SEEN):
            continue
        put(marks, slot, _SEEN)
        seen_T[number] = slot
        number += 1
        far = near_d[place] if place < found else code_distance(codes, parts, slot, table)
        evaluations += place >= found
        if far < pool_d[ef - 1]:
            insert(pool_d, pool_i, size, ef, far, slot)
            size = min(size + 1, ef)
    return size, number, evaluations


@helper
def expand(form, query, block, place, pool_d, pool_i, size, seen_T, number, todo):
    """Look at the neighbours of an element: size of the pool, slots seen, and neighbours; -1 of these where its links are damaged."""
    codes, parts, table, marks, ef = query.codes, query.parts, query.table, query.marks, query.ef
    links = links_at(form, block, place)
    if not are_links_sound(form, links):
        return size, number, -1
    count = 0
    for which in range(1, get_i32(links, 0) + 1):
        slot = get_i32(links, which)
        if not has(marks, slot, _SEEN):
            put(marks, slot, _SEEN)
            seen_T[number + count] = slot
            todo[count] = slot
            count += 1
            prefetch(codes + slot * parts)
    for which in range(count):
        slot = np.int64(todo[which])
        found = code_distance(codes, parts, slot, table)
        if found < pool_d[ef - 1]:
            insert(pool_d, pool_i, size, ef, found, slot)
            size = min(size + 1, ef)
    return size, number + count, count


@helper
def measure(form, block_W, place, query, allowed, slot, best_d, best_l, held):
    """Measure an element exactly, if it may be a result: how many results there are; -1 where that is no number."""
    if allowed != 0 and get_u8(allowed, slot) == 0:
        return held
    zero, row = np.float32(0.0), address(block_W) + place * form.size
    found = distance(form.kind, query, zero, zero, row, 0, 0, form.width)
    label = label_of(form, block_W, place)
    if not (found - found == zero) or label < 0:
        return -1
    return keep_best(best_d, best_l, held, found, label)


@helper
def choose(form, marks, pool_i, size, beam, slot_B):
    """The nearest in the pool that are not expanded yet, in different blocks: how many, at most ``beam``."""
    count = 0
    for place in range(size):
        if pool_i[place] < 0:
            continue
        slot = np.int64(pool_i[place])
        if has(marks, slot, _DONE):
            pool_i[place] = ~pool_i[place]
            continue
        is_new = True
        for other in range(count):
            is_new = is_new and slot_B[other] // form.per != slot // form.per
        if is_new:
            pool_i[place] = ~pool_i[place]
            slot_B[count] = slot
            count += 1
            if count == beam:
                break
    return count


@helper
def ask(form, slot_B, count):
    """Let the system begin to read all blocks but the first, which is waited for next."""
    for which in range(1, count):
        number = slot_B[which] // form.per
        if number >= form.cached:
            ask_for(form.file, form.place + number * form.block, form.block)


@helper
def with_room(form, seen_T, seen):
    """Room for slots that are seen, of which there are so many: larger where a block may bring more than it holds."""
    most = form.per * (form.links + 1)
    if len(seen_T) - seen >= min(most, form.elements - seen):
        return seen_T
    more = np.empty(min(form.elements, 2 * len(seen_T) + most), np.int32)
    more[:seen] = seen_T[:seen]
    return more


@helper
def search_one(form, known, query, pools, block_BW, slot_B, seen_T, counts):
    """Answer one query; the room for slots that are seen, which may have grown. Leaves no marks, unless a block is damaged.

    All elements of a block that is read are measured; the one it was read for is expanded, and those that are near enough for the pool.
    (One loop: to call a kernel for each block takes a twelfth longer.)
    """
    codes, parts, table, marks, ef = query.codes, query.parts, query.table, query.marks, query.ef
    pool_d, pool_i, best_d, best_l, todo = pools.d, pools.i, pools.best_d, pools.best_l, pools.todo
    size, seen, evaluations = begin(known, query, pools, seen_T)
    counts[CODES] += evaluations
    held = 0
    while True:
        count = choose(form, marks, pool_i, size, len(slot_B), slot_B)
        if count == 0:
            break
        ask(form, slot_B, count)
        for which in range(count):
            block = slot_B[which] // form.per
            block_W, is_right = bring(form, known.cache_CW, block_BW[which], block)
            counts[BLOCKS] += 1
            if not is_right:
                counts[BAD] = block
                return seen_T
            seen_T = with_room(form, seen_T, seen)
            for place in range(min(form.per, form.elements - block * form.per)):
                slot = block * form.per + place
                held = measure(form, block_W, place, query.vector, query.allowed, slot, best_d, best_l, held)
                counts[EXACT] += 1
                if held < 0:
                    counts[BAD] = block
                    return seen_T
                far = code_distance(codes, parts, slot, table)
                counts[CODES] += 1
                if slot != slot_B[which] and far > pool_d[ef - 1]:
                    continue
                if not has(marks, slot, _SEEN):
                    put(marks, slot, _SEEN)
                    seen_T[seen] = slot
                    seen += 1
                    if far < pool_d[ef - 1]:
                        insert(pool_d, pool_i, size, ef, far, ~slot)
                        size = min(size + 1, ef)
                put(marks, slot, _DONE)
                size, seen, evaluations = expand(
                    form, query, address(block_W), place, pool_d, pool_i, size, seen_T, seen, todo
                )
                if evaluations < 0:
                    counts[BAD] = block
                    return seen_T
                counts[CODES] += evaluations
    forget(marks, seen_T, seen)
    return seen_T


@kernel
def search_many(form, known, room, query_QD, first, last, ef, beam, allowed, id_QK, distance_QK, counts):
    """Search for queries ``first`` ... ``last``; ids and distances must hold -1 and infinity before.

    Args:
        form: of the blocks.
        known: a `Known`.
        room: a `Room`.
        query_QD: float32 [Q, width].
        ef: size of the pool.
        beam: blocks that are asked for together.
        allowed: address of uint8 [N], 0 for all.
        id_QK: int64, written.
        distance_QK: float32, written.
        counts: int64 [4], blocks, codes and vectors measured are added; the last becomes the number of a damaged block, -1 for none.
    """
    counts[BAD] = -1
    pool_d, pool_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    near_d, near_e = np.empty(ENTRY_EF + PADDING, np.float32), np.empty(ENTRY_EF + PADDING, np.int32)
    todo, slot_B = np.empty(form.links + 1, np.int32), np.empty(beam, np.int64)
    seen_T = np.empty(min(form.elements, 4096 + len(known.root_R) + form.per * (form.links + 1)), np.int32)
    table, marks, parts = address(room.table_MK), address(room.marks_B), len(known.centre_MWK)
    for number in range(first, last):
        fill_table(query_QD[number, : form.dim], known.centre_MWK, form.kind == 0, room.table_MK)
        query = Query(address(query_QD[number]), table, marks, known.codes, allowed, parts, ef)
        pools = Pools(pool_d, pool_i, near_d, near_e, distance_QK[number], id_QK[number], todo)
        seen_T = search_one(form, known, query, pools, room.block_BW, slot_B, seen_T, counts)
        if counts[BAD] >= 0:
            return


@kernel
def nearest_codes(codes, centre_MWK, squared, query_D, slot_S, table_MK, near_d, near_i):
    """The nearest of some slots by their codes, into sorted pools whose room (less PADDING) is how many; how many there are."""
    parts, room = len(centre_MWK), len(near_d) - PADDING
    fill_table(query_D, centre_MWK, squared, table_MK)
    clear(near_d, 0)
    size, table = 0, address(table_MK)
    for place in range(len(slot_S)):
        if place + 8 < len(slot_S):
            prefetch(codes + np.int64(slot_S[place + 8]) * parts)
        found = code_distance(codes, parts, np.int64(slot_S[place]), table)
        if found < near_d[room - 1]:
            insert(near_d, near_i, size, room, found, slot_S[place])
            size = min(size + 1, room)
    return size


@kernel
def measure_blocks(form, cache_CW, room_W, block_U, query_QD, first, last, allowed, id_QK, distance_QK, counts):
    """Measure all elements of some blocks that may be results of queries ``first`` ... ``last``, as `search_many`.

    Results that are there already stay among those that it chooses from.
    """
    held_Q = np.zeros(last - first, np.int64)
    counts[BAD] = -1
    for query in range(first, last):
        for place in range(id_QK.shape[1]):
            held_Q[query - first] += id_QK[query, place] >= 0
    for which in range(len(block_U)):
        number = np.int64(block_U[which])
        if which + 1 < len(block_U) and block_U[which + 1] >= form.cached:
            ask_for(form.file, form.place + np.int64(block_U[which + 1]) * form.block, form.block)
        block_W, is_right = bring(form, cache_CW, room_W, number)
        counts[BLOCKS] += 1
        if not is_right:
            counts[BAD] = number
            return
        for place in range(min(form.per, form.elements - number * form.per)):
            slot = number * form.per + place
            for query in range(first, last):
                held_Q[query - first] = held = measure(
                    form,
                    block_W,
                    place,
                    address(query_QD[query]),
                    allowed,
                    slot,
                    distance_QK[query],
                    id_QK[query],
                    held_Q[query - first],
                )
                if held < 0:
                    counts[BAD] = number
                    return
        counts[EXACT] += form.per * (last - first)


@kernel
def gather(form, cache_CW, room_W, slot_S, vector_SD, label_S):
    """Read vectors and labels of slots (rising is quickest); -1, or the number of a block that is damaged."""
    before, block_W = np.int64(-1), room_W
    for place in range(len(slot_S)):
        number = np.int64(slot_S[place]) // form.per
        if number != before:
            block_W, is_right = bring(form, cache_CW, room_W, number)
            if not is_right:
                return number
            before = number
        inner = np.int64(slot_S[place]) - number * form.per
        row = address(block_W) + inner * form.size
        for column in range(vector_SD.shape[1]):
            vector_SD[place, column] = get_f32(row, column)
        label_S[place] = label_of(form, block_W, inner)
    return np.int64(-1)
