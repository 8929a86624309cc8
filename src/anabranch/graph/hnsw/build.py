"""INSERT and SELECT-NEIGHBORS (paper, algorithms 1, 3 and 4), in batches; taking elements out; linking what cannot be reached.

A batch is inserted in two steps. `link_new` searches the graph as it was before the batch and writes the links of the new elements, which
nobody sees yet. `link_back` then adds the batch to the lists of its targets, one list at a time. Either step may be split among threads in
any way: each list is written once, from what the step before left, so the bytes are the same for any number of threads.

Equal vectors would fill each other's lists until nothing leads out of them or to the last that came. So at most half of a list leads to
equals of its element (`select`), and one that finds this half full stands between its equal and another (`stand_between`). Where many are
equal, candidates are of few places, and with few links whole groups may be cut off: `Changes.repair_if_due` looks for that.
"""
# Shapes: B batch, T targets, K candidates

from typing import Any

import numpy as np

from anabranch.graph.hnsw.layout import (
    AUX,
    CAP,
    CAP0,
    COUNT,
    DELETED,
    EF,
    ENTRY,
    EXTEND,
    KEEP,
    KIND,
    LEVEL,
    ROWS,
    SIMPLE,
    STRIDE,
    TOP,
    WIDTH,
    as_query,
    cap_of,
    links_of,
    touch,
)
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import address, get_i32, get_u8, helper, kernel, set_i32, set_u8
from anabranch.graph.hnsw.search import INFINITY, PADDING, clear, descend, insert, is_equal, next_tag, pool_search

NEAR = np.float32(0.0)


@helper
def measure(graph, query, scale, norm, slot):
    """From a query to a slot, of any kind (`raw.distance`)."""
    row = graph[ROWS] + slot * graph[STRIDE]
    return distance(graph[KIND], query, scale, norm, row, graph[AUX], slot, graph[WIDTH])


@helper
def most_equal(most):
    """How many links of so many may lead to equals of their element."""
    return max(most >> 1, 1)


@helper
def select(graph, base, count, most, found_d, found_i, chosen, scratch):
    """SELECT: at most ``most`` of ``count`` candidates, sorted by their distance to the base, into ``chosen``; how many.

    The heuristic takes a candidate if none of those taken is nearer to it than the base is. Equals of the base (`is_equal`) are none that
    others are near to, so it would take all of them, and nothing would lead out of a group that is larger than a list: at most half of the
    links may lead to equals (the paper's algorithm 4 has no such bound).
    """
    taken, rejected = 0, np.empty(count, np.int32)
    num_rejected, num_equal, most_same = 0, 0, most_equal(most)
    is_simple = count <= most or graph[SIMPLE] != 0
    kind, rows, stride, aux, width = graph[KIND], graph[ROWS], graph[STRIDE], graph[AUX], graph[WIDTH]
    for number in range(count):
        if taken == most:
            break
        slot = np.int64(found_i[number])
        if is_equal(graph, base, slot):
            num_equal += 1
            if num_equal <= most_same:
                chosen[taken] = slot
                taken += 1
            continue
        is_diverse = True
        if not is_simple:
            query, scale, norm = as_query(graph, slot, scratch)
            for place in range(taken):
                other = np.int64(chosen[place])
                if distance(kind, query, scale, norm, rows + other * stride, aux, other, width) < found_d[number]:
                    is_diverse = False
                    break
        if is_diverse:
            chosen[taken] = slot
            taken += 1
        else:
            rejected[num_rejected] = slot
            num_rejected += 1
    if graph[KEEP] != 0:
        for number in range(min(num_rejected, most - taken)):
            chosen[taken] = rejected[number]
            taken += 1
    return taken


@helper
def write_links(links, cap, chosen, count):
    """Replace a list of links."""
    for place in range(count):
        set_i32(links, place, chosen[place])
    for place in range(count, cap):
        set_i32(links, place, -1)


@helper
def live_candidates(graph, base, count, found_d, found_i):
    """Unmark what `pool_search` found and leave out the base, and deleted elements unless all are; how many stay."""
    held, num_live = 0, 0
    for place in range(count):
        found_i[place] = ~found_i[place]
        num_live += get_u8(graph[DELETED], found_i[place]) == 0
    for place in range(count):
        slot = found_i[place]
        if slot != base and (num_live == 0 or get_u8(graph[DELETED], slot) == 0):
            found_d[held], found_i[held] = found_d[place], slot
            held += 1
    return held


@helper
def extend(graph, base, level, query, scale, norm, count, visited, found_d, found_i):
    """Add the neighbours of candidates to them (paper, algorithm 4), up to ef_construction; how many there are."""
    marks, tag, most = address(visited), next_tag(visited), graph[EF]
    given = np.empty(count, np.int32)
    set_u8(marks, base, tag)
    for place in range(count):
        given[place] = found_i[place]
        set_u8(marks, given[place], tag)
    clear(found_d, count)
    for slot in given:
        links = links_of(graph, np.int64(slot), level)
        for place in range(cap_of(graph, level)):
            other = get_i32(links, place)
            if other < 0:
                break
            if get_u8(marks, other) != tag and get_u8(graph[DELETED], other) == 0:
                set_u8(marks, other, tag)
                found = measure(graph, query, scale, norm, other)
                if found < found_d[most - 1]:
                    insert(found_d, found_i, count, most, found, other)
                    count = min(count + 1, most)
    return count


@helper
def leads_to_equal(graph, base, chosen, count):
    """Whether one of ``count`` slots is equal to the base."""
    for place in range(count):
        if is_equal(graph, base, np.int64(chosen[place])):
            return True
    return False


@kernel
def link_new(graph, visited, slot_B, begin, end):
    """Write the links of new elements ``begin`` ... ``end`` of a batch on every level that the graph has and they have.

    Returns how many of them lead to an equal.
    """
    num_copies = 0
    ef = graph[EF]
    found_d, found_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo = np.empty(graph[CAP0] + 1, np.int32)
    chosen = np.empty(graph[CAP] + 1, np.int32)
    own, other = np.empty(graph[WIDTH], np.float32), np.empty(graph[WIDTH], np.float32)
    for number in range(begin, end):
        base = np.int64(slot_B[number])
        query, scale, norm = as_query(graph, base, address(own))
        top = get_i32(graph[LEVEL], base)
        entry, nearest, _, _, _ = descend(graph, query, scale, norm, min(top, graph[TOP]))
        for level in range(min(top, graph[TOP]), -1, -1):
            count, _, _ = pool_search(
                graph, query, scale, norm, level, entry, nearest, INFINITY, ef, visited, found_d, found_i, todo
            )
            entry, nearest = np.int64(~found_i[0]), found_d[0]
            count = live_candidates(graph, base, count, found_d, found_i)
            if graph[EXTEND] != 0:
                count = extend(graph, base, level, query, scale, norm, count, visited, found_d, found_i)
            count = select(graph, base, count, graph[CAP], found_d, found_i, chosen, address(other))
            write_links(links_of(graph, base, level), cap_of(graph, level), chosen, count)
            num_copies += level == 0 and leads_to_equal(graph, base, chosen, count)
    return num_copies


@helper
def is_first_equal(graph, slot, level, other):
    """Whether ``other`` is the first in the list of ``slot`` that is equal to it."""
    links = links_of(graph, slot, level)
    for place in range(cap_of(graph, level)):
        link = get_i32(links, place)
        if link < 0:
            return False
        if is_equal(graph, slot, link):
            return bool(link == other)
    return False


@helper
def put_last(links, cap, slot):
    """Put a slot that a list has not behind its last; False where there is no room."""
    for place in range(cap):
        link = get_i32(links, place)
        if link == slot:
            return True
        if link < 0:
            set_i32(links, place, slot)
            return True
    return False


@helper
def stand_between(graph, level, target, links, source):
    """Bring ``source`` into the list at ``links`` of its equal ``target``; False where it comes among others, as less than half are equals.

    It takes the place of the first equal, which it leads to itself from now on: whatever could be reached still can, however large the
    group. That is for the first of its own equals alone, since others need not lead to it; they stay as they are.
    """
    cap = cap_of(graph, level)
    first, last, num_equal = -1, -1, 0
    for place in range(cap):
        link = get_i32(links, place)
        if link < 0:
            break
        last = place
        if is_equal(graph, target, link):
            num_equal += 1
            if first < 0:
                first = place
    if num_equal < most_equal(cap):
        return False
    if is_first_equal(graph, source, level, target) and put_last(
        links_of(graph, source, level), cap, get_i32(links, first)
    ):
        for place in range(first, last):
            set_i32(links, place, get_i32(links, place + 1))
        set_i32(links, last, source)
    return True


@helper
def add_links(graph, level, target, links, source_B, begin, end, own, other):
    """Add ``source_B[begin:end]`` to the links of ``target``, or to a copy of them, at ``links``; select again where they are too many.

    At most one of them is equal to ``target`` (`linking` sees to it), and nobody else has its list meanwhile.
    """
    cap = cap_of(graph, level)
    # One that is left out of the others: behind the last where there is none.
    out = end
    for number in range(begin, end):
        source = np.int64(source_B[number])
        if is_equal(graph, target, source):
            if stand_between(graph, level, target, links, source):
                out = number
            break
    held = 0
    while held < cap and get_i32(links, held) >= 0:
        held += 1
    count = held + end - begin - (out < end)
    if count <= cap:
        for number in range(begin, end):
            if number != out:
                set_i32(links, held, source_B[number])
                held += 1
        return
    query, scale, norm = as_query(graph, target, address(own))
    found_d, found_i = np.empty(count + PADDING, np.float32), np.empty(count + PADDING, np.int32)
    clear(found_d, 0)
    for number in range(held):
        touch(graph[ROWS] + get_i32(links, number) * graph[STRIDE], graph[STRIDE])
    for number in range(count):
        place = begin + number - held
        slot = get_i32(links, number) if number < held else np.int64(source_B[place + (place >= out)])
        insert(found_d, found_i, number, count, measure(graph, query, scale, norm, slot), slot)
    chosen = np.empty(cap, np.int32)
    write_links(links, cap, chosen, select(graph, target, count, cap, found_d, found_i, chosen, address(other)))


@kernel
def link_back(graph, level, target_T, start_T, source_B, begin, end):
    """Add sources ``start_T[t]`` ... ``start_T[t + 1]`` to the links of each target t of ``begin`` ... ``end``."""
    own, other = np.empty(graph[WIDTH], np.float32), np.empty(graph[WIDTH], np.float32)
    for number in range(begin, end):
        target = target_T[number]
        links = links_of(graph, target, level)
        add_links(graph, level, target, links, source_B, start_T[number], start_T[number + 1], own, other)


@helper
def copy_links(links, into, cap):
    """Write a list of links over another."""
    for place in range(cap):
        set_i32(into, place, get_i32(links, place))


@helper
def prepare(graph, slot_B, number, target_TP, list_TC):
    """See `prepare_singly`."""
    own, other = np.empty(graph[WIDTH], np.float32), np.empty(graph[WIDTH], np.float32)
    base, done = np.int64(slot_B[number]), 0
    for level in range(min(get_i32(graph[LEVEL], base), graph[TOP]) + 1):
        links, count, cap = links_of(graph, base, level), 0, cap_of(graph, level)
        while count < cap and get_i32(links, count) >= 0:
            count += 1
        # An equal may put another behind these, which is none that was chosen.
        for place in range(count):
            target = np.int64(get_i32(links, place))
            changed = address(list_TC[done])
            copy_links(links_of(graph, target, level), changed, cap)
            add_links(graph, level, target, changed, slot_B, number, number + 1, own, other)
            target_TP[done, 0], target_TP[done, 1] = level, target
            done += 1
    return done


@helper
def lead_to(graph, slot_B, number, target_TP, list_TC, count):
    """See `come_prepared`."""
    for done in range(count):
        level, target = target_TP[done, 0], target_TP[done, 1]
        copy_links(address(list_TC[done]), links_of(graph, target, level), cap_of(graph, level))
    base = np.int64(slot_B[number])
    top = get_i32(graph[LEVEL], base)
    if graph[ENTRY] < 0 or top > graph[TOP]:
        graph[ENTRY], graph[TOP] = base, top


@kernel
def prepare_singly(graph, slot_B, number, target_TP, list_TC):
    """Work out the lists that are to lead to element ``number``, whose own links are written: the second step of a batch of one.

    Lists of other elements stay as they are, so searches may go on.

    Args:
        graph: the row that describes the index.
        slot_B: int64 [B].
        number: of the element in it.
        target_TP: int64 [T, 2], written: level and slot of each list. T is at least 2 M, and M more for each level above 0.
        list_TC: int32 [T, 2 M], written: the lists.

    Returns:
        How many they are.
    """
    return prepare(graph, slot_B, number, target_TP, list_TC)


@kernel
def come_prepared(graph, slot_B, number, target_TP, list_TC, count):
    """Let the graph lead to element ``number`` by the lists that `prepare_singly` wrote: its last step, some microseconds."""
    lead_to(graph, slot_B, number, target_TP, list_TC, count)


@kernel
def insert_singly(graph, visited, slot_B, begin, end):
    """Insert elements one after the other: batches of one. Returns as `link_new`."""
    num_copies = 0
    for number in range(begin, end):
        if graph[ENTRY] >= 0:
            num_copies += link_new(graph, visited, slot_B, number, number + 1)
        most = graph[CAP0] + graph[CAP] * max(graph[TOP], 0)
        target_TP, list_TC = np.empty((most, 2), np.int64), np.empty((most, graph[CAP0]), np.int32)
        count = prepare(graph, slot_B, number, target_TP, list_TC)
        lead_to(graph, slot_B, number, target_TP, list_TC, count)
    return num_copies


@kernel
def points_at(graph, level, gone_N, begin, end, is_hit_N):
    """Mark the slots ``begin`` ... ``end`` that stay and have a link to one that goes on a level."""
    cap = cap_of(graph, level)
    for slot in range(begin, end):
        is_hit_N[slot] = 0
        if gone_N[slot] != 0 or get_i32(graph[LEVEL], slot) < level:
            continue
        links = links_of(graph, slot, level)
        for place in range(cap):
            other = get_i32(links, place)
            if other < 0:
                break
            if gone_N[other] != 0:
                is_hit_N[slot] = 1
                break


@kernel
def bridge(graph, level, visited, gone_N, slot_T, begin, end):
    """Select the links of slots anew, from those that stay and those that can be reached through what goes (at most ef_construction)."""
    most = max(graph[EF], graph[CAP0])
    found_d, found_i = np.empty(most + PADDING, np.float32), np.empty(most + PADDING, np.int32)
    own, other = np.empty(graph[WIDTH], np.float32), np.empty(graph[WIDTH], np.float32)
    cap, marks = cap_of(graph, level), address(visited)
    chosen, through = np.empty(cap, np.int32), np.empty(most + 1, np.int32)
    for number in range(begin, end):
        base, tag = np.int64(slot_T[number]), next_tag(visited)
        query, scale, norm = as_query(graph, base, address(own))
        clear(found_d, 0)
        set_u8(marks, base, tag)
        through[0], size, at, count = base, 1, 0, 0
        while at < size:
            links = links_of(graph, np.int64(through[at]), level)
            at += 1
            for place in range(cap):
                slot = get_i32(links, place)
                if slot < 0:
                    break
                if get_u8(marks, slot) == tag:
                    continue
                set_u8(marks, slot, tag)
                if gone_N[slot] == 0:
                    found = measure(graph, query, scale, norm, slot)
                    if found < found_d[most - 1]:
                        insert(found_d, found_i, count, most, found, slot)
                        count = min(count + 1, most)
                elif size <= most:
                    through[size] = slot
                    size += 1
        count = select(graph, base, count, cap, found_d, found_i, chosen, address(other))
        write_links(links_of(graph, base, level), cap, chosen, count)


@kernel
def reach(graph, start, is_reached_N, queue_N):
    """Mark what can be reached on level 0 from ``start``, itself included; how many were not marked before."""
    if is_reached_N[start] != 0:
        return 0
    is_reached_N[start] = 1
    queue_N[0], size, at = start, 1, 0
    while at < size:
        links = links_of(graph, np.int64(queue_N[at]), 0)
        at += 1
        for place in range(graph[CAP0]):
            slot = get_i32(links, place)
            if slot < 0:
                break
            if is_reached_N[slot] == 0:
                is_reached_N[slot] = 1
                queue_N[size] = slot
                size += 1
    return size


@helper
def has_room(graph, slot):
    """Whether a list on level 0 takes one more link."""
    return get_i32(links_of(graph, slot, 0), graph[CAP0] - 1) < 0


@kernel
def repair_links(graph, visited, is_reached_N):
    """Link every element that level 0 does not lead to from the nearest reached list with room; how many were linked, how many remain."""
    num_slots, ef = graph[COUNT], graph[EF]
    queue = np.empty(num_slots + 1, np.int32)
    found_d, found_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo, own = np.empty(graph[CAP0] + 1, np.int32), np.empty(graph[WIDTH], np.float32)
    reach(graph, graph[ENTRY], is_reached_N, queue)
    # Typed: a literal would be compiled as a case of its own.
    linked, left, ground = 0, 0, np.int64(0)
    for slot in range(num_slots):
        if is_reached_N[slot] != 0 or get_i32(graph[LEVEL], slot) < 0:
            continue
        query, scale, norm = as_query(graph, slot, address(own))
        entry, nearest, start, _, _ = descend(graph, query, scale, norm, ground)
        count, _, _ = pool_search(
            graph, query, scale, norm, ground, entry, nearest, start, ef, visited, found_d, found_i, todo
        )
        best: Any = np.int64(-1)
        place = 0
        while place < count and best < 0:
            near = np.int64(~found_i[place])
            if is_reached_N[near] != 0 and has_room(graph, near):
                best = near
            place += 1
        if best < 0:
            closest: Any = INFINITY
            for held in range(num_slots):
                if is_reached_N[held] != 0 and has_room(graph, held):
                    found = measure(graph, query, scale, norm, held)
                    if found < closest:
                        closest, best = found, np.int64(held)
        if best < 0:
            left += 1
            continue
        links, end = links_of(graph, best, 0), 0
        while get_i32(links, end) >= 0:
            end += 1
        set_i32(links, end, slot)
        linked += 1
        reach(graph, slot, is_reached_N, queue)
    return linked, left
