"""Suspects: elements that walks may miss, which are looked for once a change is done, and linked from where walks for them end.

A walk leads to a group that lies far from all else by a few links, and what the group's elements hold of others is of few places. Such
links are lost when elements that have them move or go, or when others come that are nearer and lead there no more; and the first of a
group that come may not find each other, so that it falls into parts that lead nowhere. None of that happens where vectors lie evenly, and
to look for every element that comes would take a third of the time that it takes to link it. So kernels mark what came, or was left
out of a list, beyond a gap: behind something that is less than half as far.

Whoever is looked for by a walk of `LOOKED`, and not found, gets a link from the nearest that the walk came to: nothing in that one's list
is nearer to it, or the walk would have gone on. So it is one that SELECT would choose. And it is linked to what lies about where the walk
ended, so that parts of a group become one (`build.link_lost`).

What comes may also stand in the way of walks that found others before, with no link lost. So what was a suspect once stays watched:
with each look some of these are looked for in turn, and the neighbours of any that are lost (`Linker.look`).

By the nearest alone (`SIMPLE`) a list keeps no link beyond a gap once it is full: each change would lose what the one before had linked.
There nothing is marked, as for inner products: it is only looked whether all can be reached (`mending`), and `repair` looks for all.
"""
# Shapes: S suspects

import math

import numpy as np

from anabranch.graph.hnsw.layout import (
    AUX,
    BLOCK,
    BLOCKS,
    CAP0,
    COSINE,
    IP_F16,
    IP_F32,
    IP_I8,
    KIND,
    LEVEL,
    LINKS,
    ROWS,
    SIMPLE,
    STRIDE,
    SUSPECT,
    WIDTH,
    as_query,
    cap_of,
    links_of,
)
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import HAMMING, address, get_i32, get_u8, helper, inlined, kernel, set_u8
from anabranch.graph.hnsw.search import PADDING, clear, descend, insert, is_equal, pool_search

# What a walk that looks for a suspect holds: half of what a search does unless told otherwise.
LOOKED = 32

# What marks say: it is to be looked for; it came far from all else; it was to be looked for once.
NOW, FAR, WATCHED = 1, 2, 4

# A gap: the next of some sorted distances (squared, as "l2" and in effect "cosine" are; `by_kind`) is more than so many times as large.
# After one, two or three it takes more: in a plane the second nearest is 64 times as far, squared, once in 64.
GAP, GAP_3, GAP_2, GAP_1 = 4.0, 8.0, 16.0, 64.0

# Links of the nearest that tell how far apart elements lie there.
SCALE = 4


@inlined
def has_gaps(graph):
    """Whether distances are such that one may be several times another: all but inner products of vectors of any length."""
    kind = graph[KIND]
    return graph[COSINE] != 0 or not (kind == IP_F32 or kind == IP_F16 or kind == IP_I8)


@inlined
def is_marked(graph):
    """Whether what lies behind gaps is marked."""
    return graph[SIMPLE] == 0 and has_gaps(graph)


@inlined
def by_kind(graph, times):
    """So many times as large, of squared distances, by the distances of an index: those of bits are not squared."""
    return math.sqrt(times) if graph[KIND] == HAMMING else times


@helper
def first_behind(graph, found_d, count):
    """The number of the first of ``count`` rising distances that lies behind a gap; ``count`` where there is none."""
    for number in range(1, count):
        times = GAP
        if number == 1:
            times = GAP_1
        elif number == 2:
            times = GAP_2
        elif number == 3:
            times = GAP_3
        if found_d[number] > by_kind(graph, times) * found_d[number - 1] and found_d[number - 1] > 0:
            return number
    return count


@inlined
def behind_gap(graph, found_d, count):
    """As `first_behind`; ``count`` where nothing is marked: how inner products compare as numbers says nothing."""
    return first_behind(graph, found_d, count) if is_marked(graph) else count


@inlined
def mark_block(graph, slot, mark):
    """Let the block of a slot be looked through for a mark. Threads that do it at once all write the same."""
    block = slot >> BLOCK
    set_u8(graph[BLOCKS], block, np.uint8(get_u8(graph[BLOCKS], block) | mark))


@helper
def add_mark(graph, slot, mark):
    """Mark a slot with more. Threads that do it at once all write the same."""
    set_u8(graph[SUSPECT], slot, np.uint8(get_u8(graph[SUSPECT], slot) | mark))
    mark_block(graph, slot, mark)


@kernel
def add_marks(graph, slot_S, mark):
    """Mark slots with more; -1 is none."""
    for slot in slot_S:
        if slot >= 0:
            add_mark(graph, np.int64(slot), mark)


@kernel
def find_marked(graph, mark, begin, end, slot_S):
    """Write the first of slots ``begin`` ... ``end`` that have a mark, as many as int64 [S] has room for; how many."""
    found, slot = 0, begin
    while slot < end and found < len(slot_S):
        block = slot >> BLOCK
        behind = min((block + 1) << BLOCK, end)
        if get_u8(graph[BLOCKS], block) & mark == 0:
            slot = behind
            continue
        while slot < behind and found < len(slot_S):
            if get_u8(graph[SUSPECT], slot) & mark != 0:
                slot_S[found] = slot
                found += 1
            slot += 1
    return found


@helper
def leads_to(links, cap, slot):
    """Whether a slot is in the list at ``links``."""
    for place in range(cap):
        if get_i32(links, place) == slot:
            return True
    return False


@inlined
def mark_left_out(graph, links, cap, found_d, found_i, count, chosen, taken):
    """Suspect those of ``count`` candidates behind a gap that are in the list at ``links``, and not among the ``taken`` that were chosen
    for another."""
    for number in range(behind_gap(graph, found_d, count), count):
        is_left_out = leads_to(links, cap, found_i[number])
        for place in range(taken):
            is_left_out = is_left_out and chosen[place] != found_i[number]
        if is_left_out:
            add_mark(graph, found_i[number], NOW | WATCHED)


@helper
def measure_links(graph, slot, level, found_d, found_i, scratch):
    """The links of a slot with their distances, rising; how many."""
    cap, count, links = cap_of(graph, level), 0, links_of(graph, slot, level)
    query, scale, norm = as_query(graph, slot, scratch)
    clear(found_d, 0)
    while count < cap and get_i32(links, count) >= 0:
        other = np.int64(get_i32(links, count))
        row = graph[ROWS] + other * graph[STRIDE]
        found = distance(graph[KIND], query, scale, norm, row, graph[AUX], other, graph[WIDTH])
        insert(found_d, found_i, count, cap, found, other)
        count += 1
    return count


@kernel
def mark_leads(graph, level, slot_S):
    """Suspect what lists of slots lead to beyond a gap: maybe nothing else does, and they go."""
    cap, own = cap_of(graph, level), np.empty(graph[WIDTH], np.float32)
    found_d, found_i = np.empty(cap + PADDING, np.float32), np.empty(cap + PADDING, np.int32)
    for number in range(len(slot_S)):
        count = measure_links(graph, np.int64(slot_S[number]), level, found_d, found_i, address(own))
        for place in range(behind_gap(graph, found_d, count), count):
            add_mark(graph, found_i[place], NOW | WATCHED)


@kernel
def watch_gaps(graph, begin, end):
    """Watch those of slots ``begin`` ... ``end`` whose lists on level 0 have a gap, and what is behind it, as what was looked for."""
    cap, own = graph[CAP0], np.empty(graph[WIDTH], np.float32)
    found_d, found_i = np.empty(cap + PADDING, np.float32), np.empty(cap + PADDING, np.int32)
    for slot in range(begin, end):
        if get_i32(graph[LEVEL], slot) < 0:
            continue
        count = measure_links(graph, np.int64(slot), 0, found_d, found_i, address(own))
        first = behind_gap(graph, found_d, count)
        for number in range(first, count):
            add_mark(graph, found_i[number], WATCHED)
        if first < count:
            add_mark(graph, slot, WATCHED)


@inlined
def is_far_off(graph, found_d, found_i, count, scratch):
    """Whether the nearest of ``count`` candidates is far, by what lies about that one."""
    if count == 0 or not is_marked(graph):
        return False
    near, most = np.int64(found_i[0]), np.float32(0.0)
    query, scale, norm = as_query(graph, near, scratch)
    for place in range(min(SCALE, graph[CAP0])):
        other = np.int64(get_i32(graph[LINKS], near * graph[CAP0] + place))
        if other < 0:
            break
        row = graph[ROWS] + other * graph[STRIDE]
        most = max(most, distance(graph[KIND], query, scale, norm, row, graph[AUX], other, graph[WIDTH]))
    return most > 0 and found_d[0] > by_kind(graph, GAP) * most


@helper
def is_found(graph, query, scale, norm, slot, count, most, found_d, found_i):
    """Whether a walk for a slot, which held ``most`` and came to ``count``, came to it or to an equal of it.

    Also where so many are nearer that it would not be held: by the inner product no vector need be the nearest of itself.
    """
    for place in range(count):
        if ~found_i[place] == slot:
            return True
    if count == 0:
        return False
    row = graph[ROWS] + slot * graph[STRIDE]
    own = distance(graph[KIND], query, scale, norm, row, graph[AUX], slot, graph[WIDTH])
    return (count == most and own >= found_d[count - 1]) or is_equal(graph, slot, np.int64(~found_i[0]))


@kernel
def find_lost(graph, visited, slot_S, begin, end, ef, is_lost_S):
    """Mark, as 1 in uint8 [S], which of suspects ``begin`` ... ``end`` a walk that holds ``ef`` does not come to."""
    found_d, found_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo, own, ground = np.empty(graph[CAP0] + 1, np.int32), np.empty(graph[WIDTH], np.float32), np.int64(0)
    for number in range(begin, end):
        slot = np.int64(slot_S[number])
        if get_i32(graph[LEVEL], slot) < 0:
            continue
        query, scale, norm = as_query(graph, slot, address(own))
        entry, nearest, start, _, _ = descend(graph, query, scale, norm, ground)
        count, _, _ = pool_search(
            graph, query, scale, norm, ground, entry, nearest, start, ef, visited, found_d, found_i, todo
        )
        is_lost_S[number] = not is_found(graph, query, scale, norm, slot, count, ef, found_d, found_i)
