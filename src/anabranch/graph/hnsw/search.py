"""SEARCH-LAYER and K-NN-SEARCH (paper, algorithms 2 and 5), and the exact scan of few elements.

`pool_search` keeps the ef best in one sorted array, each marked once it was expanded. That is the two heaps of algorithm 2: what falls out
of W lies farther than all of W, and the search would stop before it. Finding a place is one pass of vector compares, making room one move.

`filtered_search` has the two heaps, since W then holds only elements that may be returned, while C holds all. It stops when the nearest of
C is farther than W's farthest and W is full.
"""
# Shapes: Q queries, K neighbours, R room of results per query (at least K)

from typing import Any

import numpy as np

from anabranch.graph.guarded import CHECKED
from anabranch.graph.hnsw.layout import (
    AUX,
    CAP,
    CAP0,
    COUNT,
    ENTRY,
    FULL,
    FULL_STRIDE,
    FULL_WIDTH,
    IP_I8,
    KIND,
    L2_I8,
    ROWS,
    STRIDE,
    TOP,
    WIDTH,
    cap_of,
    links_of,
    touch,
)
from anabranch.graph.hnsw.measuring import AT_ONCE, distance, distances, room_for_some
from anabranch.graph.hnsw.raw import (
    L2_I4,
    L2_I4_GROUPS,
    LANES,
    address,
    count_not_above,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    helper,
    kernel,
    prefetch,
    set_f32,
    set_u8,
    shift_up,
)

INFINITY = np.float32(np.inf)

# Behind the last entry of a pool: its compares and moves go in whole vectors.
PADDING = 2 * LANES

# Above this ef, two heaps are quicker than one sorted array.
POOL = 1024

# A filter that lets a smaller share through is answered by measuring all of it.
SELECTIVE = 0.01

# Results measured again beside 2 k.
EXTRA = 16


def is_selective(number: int, ef: int, count: int) -> bool:
    """Whether a filter that lets ``number`` of ``count`` elements through is answered by measuring all of those."""
    return number <= max(2 * min(ef, count), SELECTIVE * count)


@helper
def is_equal(graph, slot, other):
    """Whether two slots hold the same vector: the same bytes, which is exact for every kind of distance (0 is not, where it rounds)."""
    rows, stride = graph[ROWS], graph[STRIDE]
    one, two = rows + slot * stride, rows + other * stride
    for word in range(stride >> 3):
        if get_i64(one, word) != get_i64(two, word):
            return False
    # Rows of int8 are told apart by their scales too.
    return graph[KIND] < L2_I8 or graph[KIND] > IP_I8 or get_i64(graph[AUX], slot) == get_i64(graph[AUX], other)


@helper
def next_tag(visited):
    """A tag that no mark carries; marks are bytes, the last of ``visited`` is the tag of the search before."""
    tag: Any = np.int64(visited[-1]) + 1
    if tag > 255:
        for slot in range(len(visited)):
            visited[slot] = 0
        tag = np.int64(1)
    visited[-1] = tag
    return tag


@helper
def measure_next(graph, query, scale, norm, slots, begin, count, near):
    """Write the distances of the next of ``count`` slots (int32 at an address), at most AT_ONCE, at ``near``; ask for the rows behind."""
    kind, rows, stride, aux, width = graph[KIND], graph[ROWS], graph[STRIDE], graph[AUX], graph[WIDTH]
    end = min(begin + AT_ONCE, count)
    for place in range(end, min(end + AT_ONCE, count)):
        touch(rows + get_i32(slots, place) * stride, stride)
    if end - begin == AT_ONCE:
        distances(kind, query, scale, norm, rows, stride, aux, slots + 4 * begin, width, near)
    else:
        for place in range(begin, end):
            slot = get_i32(slots, place)
            set_f32(near, place - begin, distance(kind, query, scale, norm, rows + slot * stride, aux, slot, width))


@helper
def descend(graph, query, scale, norm, to_level):
    """Greedy walk from the entry point down to, and on, ``to_level`` + 1: slot, distance, that of the entry point, hops, evaluations."""
    rows, stride, cap, near = graph[ROWS], graph[STRIDE], graph[CAP], room_for_some()
    at = graph[ENTRY]
    best = distance(graph[KIND], query, scale, norm, rows + at * stride, graph[AUX], at, graph[WIDTH])
    start, hops, evaluations = best, 0, 1
    for level in range(graph[TOP], to_level, -1):
        is_better = True
        while is_better:
            is_better = False
            links, count = links_of(graph, at, level), 0
            while count < cap and get_i32(links, count) >= 0:
                if count < AT_ONCE:
                    touch(rows + get_i32(links, count) * stride, stride)
                count += 1
            hops += 1
            evaluations += count
            for place in range(count):
                if place % AT_ONCE == 0:
                    measure_next(graph, query, scale, norm, links, place, count, near)
                found = get_f32(near, place % AT_ONCE)
                if found < best:
                    best, at, is_better = found, get_i32(links, place), True
    return at, best, start, hops, evaluations


@helper
def unvisited(links, cap, visited, tag, todo, rows, stride):
    """Write the links that carry no mark into ``todo``, mark them and ask for the first rows; how many."""
    count = 0
    for place in range(cap):
        slot = get_i32(links, place)
        if slot < 0:
            break
        # Overwritten by the next where it was seen before: no branch to guess.
        todo[count] = slot
        count += get_u8(visited, slot) != tag
        set_u8(visited, slot, tag)
    for place in range(min(count, AT_ONCE)):
        touch(rows + np.int64(todo[place]) * stride, stride)
    return count


@helper
def clear(pool_d, begin):
    """Fill a pool with infinity from ``begin`` on."""
    for place in range(begin, len(pool_d)):
        pool_d[place] = INFINITY


@helper
def check_pool(place, after, size, room, length_d, length_i):
    """In the checked build: that what `insert` compares, in whole vectors, and what it moves lies in the pool."""
    compared = (size + LANES - 1) // LANES * LANES
    moved = place + 1 + (after + LANES - 1) // LANES * LANES
    if place < 0 or after < 0 or room < 1 or compared > length_d or max(room, moved) > min(length_d, length_i):
        raise IndexError("past the end of a pool")


@helper
def insert(pool_d, pool_i, size, room, key, value):
    """Put an entry behind those of at most its key in a sorted pool, whose last falls out if it is full; where it stands."""
    distances, slots = address(pool_d), address(pool_i)
    # The compare goes in whole vectors, so a key that is infinite would come out behind the padding.
    place = min(np.int64(count_not_above(distances, size, key)), min(size, room - 1))
    after = min(size, room - 1) - place
    if CHECKED:
        check_pool(place, after, size, room, len(pool_d), len(pool_i))
    shift_up(distances + 4 * place, after)
    shift_up(slots + 4 * place, after)
    pool_d[place], pool_i[place] = key, value
    return place


@helper
def pool_search(graph, query, scale, norm, level, entry, nearest, start, ef, visited, pool_d, pool_i, todo):
    """The ``ef`` nearest on a level into the sorted ``pool_d``, ``pool_i`` [>= ef + PADDING]; count, hops, evaluations.

    It begins at ``entry``, and on level 0 also at the entry point of the graph at the distance ``start`` (infinity: not), so that whatever
    can be reached from there is found if ``ef`` is large enough. Slots come back as ~slot, which marks those that were expanded: all.
    """
    rows, stride, near = graph[ROWS], graph[STRIDE], room_for_some()
    cap, marks, tag = cap_of(graph, level), address(visited), next_tag(visited)
    clear(pool_d, 0)
    pool_d[0], pool_i[0] = nearest, entry
    set_u8(marks, entry, tag)
    size, at, hops, evaluations = 1, 0, 0, 0
    if start < INFINITY and graph[ENTRY] != entry and ef > 1:
        set_u8(marks, graph[ENTRY], tag)
        insert(pool_d, pool_i, size, ef, start, graph[ENTRY])
        size = 2
    while at < size:
        if pool_i[at] < 0:
            at += 1
            continue
        links = links_of(graph, pool_i[at], level)
        pool_i[at] = ~pool_i[at]
        count = unvisited(links, cap, marks, tag, todo, rows, stride)
        hops += 1
        evaluations += count
        lowest = at + 1
        for number in range(count):
            if number % AT_ONCE == 0:
                measure_next(graph, query, scale, norm, address(todo), number, count, near)
            found = get_f32(near, number % AT_ONCE)
            if found < pool_d[ef - 1]:
                slot = np.int64(todo[number])
                place = insert(pool_d, pool_i, size, ef, found, slot)
                size = min(size + 1, ef)
                if place < lowest:
                    lowest = place
                    prefetch(links_of(graph, slot, level))
        at = lowest
    return size, hops, evaluations


@helper
def push(keys, values, size, key, value):
    """Put an entry into a heap with the smallest key on top; the new size."""
    place = size
    while place > 0:
        above = (place - 1) >> 1
        if keys[above] <= key:
            break
        keys[place], values[place] = keys[above], values[above]
        place = above
    keys[place], values[place] = key, value
    return size + 1


@helper
def pop(keys, values, size):
    """Take the top off a heap; the new size."""
    size -= 1
    key, value = keys[size], values[size]
    place = 0
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and keys[below + 1] < keys[below]:
            below += 1
        if keys[below] >= key:
            break
        keys[place], values[place] = keys[below], values[below]
        place = below
    keys[place], values[place] = key, value
    return size


@helper
def filtered_search(
    graph, query, scale, norm, entry, nearest, start, ef, flags, kept_out, visited, heap_d, heap_i, best_d, best_i, todo
):
    """As `pool_search` on level 0, of slots whose flag (address of uint8 [N]) is not ``kept_out``; results in rising order, as ~slot."""
    rows, stride, near = graph[ROWS], graph[STRIDE], room_for_some()
    cap, marks, tag = graph[CAP0], address(visited), next_tag(visited)
    size, held, hops, evaluations = 0, 0, 0, 0
    for number in range(1 if graph[ENTRY] == entry or ef == 1 else 2):
        slot, found = (entry, nearest) if number == 0 else (graph[ENTRY], start)
        size = push(heap_d, heap_i, size, found, slot)
        if get_u8(flags, slot) != kept_out:
            held = push(best_d, best_i, held, -found, slot)
        set_u8(marks, slot, tag)
    while size > 0:
        if held == ef and heap_d[0] > -best_d[0]:
            break
        links = links_of(graph, heap_i[0], 0)
        size = pop(heap_d, heap_i, size)
        count = unvisited(links, cap, marks, tag, todo, rows, stride)
        hops += 1
        evaluations += count
        for number in range(count):
            if number % AT_ONCE == 0:
                measure_next(graph, query, scale, norm, address(todo), number, count, near)
            found = get_f32(near, number % AT_ONCE)
            if held < ef or found < -best_d[0]:
                slot = np.int64(todo[number])
                size = push(heap_d, heap_i, size, found, slot)
                if get_u8(flags, slot) != kept_out:
                    if held == ef:
                        held = pop(best_d, best_i, held)
                    held = push(best_d, best_i, held, -found, slot)
    # The farthest goes behind the rest.
    for place in range(held - 1, -1, -1):
        key, value = best_d[0], best_i[0]
        pop(best_d, best_i, place + 1)
        best_d[place], best_i[place] = -key, ~value
    return held, hops, evaluations


@helper
def label_of(labels, slot):
    """The id of a slot outside."""
    return get_i64(labels, np.int64(slot))


@helper
def sort_ties(distance_R, slot_R, count, labels):
    """Bring entries that are sorted by distance, or nearly so, into the order of (distance, label); ``labels`` is an address."""
    for end in range(1, count):
        key, value = distance_R[end], slot_R[end]
        place = end
        while place > 0 and (
            distance_R[place - 1] > key
            or (distance_R[place - 1] == key and label_of(labels, slot_R[place - 1]) > label_of(labels, value))
        ):
            distance_R[place], slot_R[place] = distance_R[place - 1], slot_R[place - 1]
            place -= 1
        distance_R[place], slot_R[place] = key, value


@helper
def at_least_zero(kind, found_d, count):
    """Raise squared distances to zero that came out below it: of rows of few bits they are sums of products, which do not quite cancel."""
    if kind == L2_I8 or kind == L2_I4 or kind == L2_I4_GROUPS:
        for place in range(count):
            if found_d[place] < np.float32(0.0):
                found_d[place] = np.float32(0.0)


@helper
def finish(graph, full_query, count, keep, labels, found_d, found_i, id_K, distance_K):
    """Measure the nearest ``keep`` again where rows are not final, sort, and write the nearest K with their labels; how many these are."""
    if graph[FULL] != 0:
        count = min(count, keep)
        for place in range(count):
            row = graph[FULL] + np.int64(found_i[place]) * graph[FULL_STRIDE]
            zero = np.float32(0.0)
            found_d[place] = distance(graph[KIND] & 1, full_query, zero, zero, row, 0, 0, graph[FULL_WIDTH])
    else:
        at_least_zero(graph[KIND], found_d, count)
    sort_ties(found_d, found_i, count, labels)
    count = min(count, len(id_K))
    for place in range(count):
        id_K[place] = label_of(labels, found_i[place])
        distance_K[place] = found_d[place]
    return count


@kernel
def search_many(
    graph, label_N, visited, query_Q, aux_Q, full_Q, begin, end, ef, keep, allowed, id_QK, distance_QK, counts
):
    """K-NN-SEARCH of queries ``begin`` ... ``end``; ids and distances must hold -1 and infinity before.

    Args:
        graph: the row that describes the index.
        label_N: int64, ids outside.
        visited: uint8 [C + 1], marks.
        query_Q: uint8 [Q, bytes], queries as rows are (bits too); float32 for those of float16.
        aux_Q: float32 [Q, 2], their scales and squared norms.
        full_Q: float32 [Q, FULL_WIDTH], queries to measure again by.
        begin: the first query.
        end: behind the last.
        ef: how many to hold.
        keep: how many of them to measure again.
        allowed: address of uint8 [N], 0 for all.
        id_QK: int64, written.
        distance_QK: float32, written.
        counts: int64 [2], hops and evaluations are added.
    """
    best_d, best_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    heap_room = graph[COUNT] + 1 if allowed != 0 else 1
    heap_d, heap_i = np.empty(heap_room, np.float32), np.empty(heap_room, np.int32)
    todo = np.empty(graph[CAP0] + 1, np.int32)
    # Typed: a literal would be compiled as a case of its own.
    ground = np.int64(0)
    for number in range(begin, end):
        query, scale, norm = address(query_Q[number]), aux_Q[number, 0], aux_Q[number, 1]
        entry, nearest, start, hops, evaluations = descend(graph, query, scale, norm, ground)
        if allowed == 0:
            count, more_hops, more = pool_search(
                graph, query, scale, norm, ground, entry, nearest, start, ef, visited, best_d, best_i, todo
            )
        else:
            count, more_hops, more = filtered_search(
                graph,
                query,
                scale,
                norm,
                entry,
                nearest,
                start,
                ef,
                allowed,
                ground,
                visited,
                heap_d,
                heap_i,
                best_d,
                best_i,
                todo,
            )
        counts[0] += hops + more_hops
        counts[1] += evaluations + more
        for place in range(count):
            best_i[place] = ~best_i[place]
        full, labels = address(full_Q[number]), address(label_N)
        finish(graph, full, count, keep, labels, best_d, best_i, id_QK[number], distance_QK[number])


@kernel
def scan_many(graph, label_N, slot_S, query_Q, aux_Q, full_Q, begin, end, id_QK, distance_QK, counts):
    """The nearest K of the slots ``slot_S`` (rising by label) by measuring all, exactly where there are full vectors; as `search_many`."""
    room = min(id_QK.shape[1], len(slot_S))
    best_d, best_i = np.empty(room + PADDING, np.float32), np.empty(room + PADDING, np.int32)
    zero = np.float32(0.0)
    is_full = graph[FULL] != 0
    kind = graph[KIND] & 1 if is_full else graph[KIND]
    rows, stride = (graph[FULL], graph[FULL_STRIDE]) if is_full else (graph[ROWS], graph[STRIDE])
    width, aux = (graph[FULL_WIDTH], 0) if is_full else (graph[WIDTH], graph[AUX])
    for number in range(begin, end):
        query = address(full_Q[number]) if is_full else address(query_Q[number])
        scale, norm = (zero, zero) if is_full else (aux_Q[number, 0], aux_Q[number, 1])
        clear(best_d, 0)
        size = 0
        for place in range(len(slot_S)):
            slot = np.int64(slot_S[place])
            found = distance(kind, query, scale, norm, rows + slot * stride, aux, slot, width)
            if found < best_d[room - 1]:
                insert(best_d, best_i, size, room, found, slot)
                size = min(size + 1, room)
        at_least_zero(kind, best_d, size)
        sort_ties(best_d, best_i, size, address(label_N))
        for place in range(size):
            id_QK[number, place] = label_N[best_i[place]]
            distance_QK[number, place] = best_d[place]
        counts[1] += len(slot_S)
