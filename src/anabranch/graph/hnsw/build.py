"""INSERT (paper, algorithm 1), in batches; which links an element gets is in `selecting`.

A batch is inserted in two steps. `link_new` searches the graph as it was before the batch and writes the links of the new elements, which
nobody sees yet. `link_back` then adds the batch to the lists of its targets, one list at a time. Either step may be split among threads in
any way: each list is written once, from what the step before left, so the bytes are the same for any number of threads.

A list that finds its half of equals full has the one that came stand between its element and another equal (`stand_between`). Where many
are equal, candidates are of few places, and with few links whole groups may be cut off: `Changes.repair_if_due` looks for that.
"""
# Shapes: B batch, T targets

import numpy as np

from anabranch.graph.hnsw.layout import (
    CAP,
    CAP0,
    EF,
    ENTRY,
    EXTEND,
    LEVEL,
    ROWS,
    STRIDE,
    SUSPECT,
    TOP,
    WIDTH,
    as_query,
    cap_of,
    links_of,
    touch,
)
from anabranch.graph.hnsw.raw import address, get_i32, helper, inlined, kernel, set_i32, set_u8
from anabranch.graph.hnsw.search import INFINITY, PADDING, clear, descend, insert, is_equal, pool_search
from anabranch.graph.hnsw.selecting import (
    extend,
    leads_to_equal,
    live_candidates,
    measure,
    most_equal,
    select,
    write_links,
)
from anabranch.graph.hnsw.suspects import (
    FAR,
    NOW,
    WATCHED,
    behind_gap,
    first_behind,
    has_gaps,
    is_far_off,
    is_found,
    leads_to,
    mark_block,
    mark_left_out,
    measure_links,
)

# How new elements come, see `link_new`.
BESIDE, ONE_BY_ONE, PREPARED = range(3)
NO_LISTS = np.empty((0, 2), np.int64), np.empty((0, 0), np.int32)


@inlined
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


@inlined
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
    taken = select(graph, target, count, cap, found_d, found_i, chosen, address(other))
    mark_left_out(graph, links, cap, found_d, found_i, count, chosen, taken)
    write_links(links, cap, chosen, taken)


@helper
def lead_both_ways(graph, slot_S, number, chosen, taken, own, other):
    """Let a suspect lead to what was chosen, as far as its list on level 0 has room, and that to it. What it leads to already stays."""
    slot, cap = np.int64(slot_S[number]), graph[CAP0]
    links = links_of(graph, slot, 0)
    for place in range(taken):
        target = np.int64(chosen[place])
        # Lists lead to few equals (`stand_between`).
        if is_equal(graph, slot, target):
            continue
        put_last(links, cap, target)
        if not leads_to(links_of(graph, target, 0), cap, slot):
            add_links(graph, np.int64(0), target, links_of(graph, target, 0), slot_S, number, number + 1, own, other)


@helper
def put_in(graph, target, slot, scratch):
    """Let ``target`` lead to a slot on level 0, in place of the farthest before the gap where its list is full: what lies near is led to by
    others near, what lies behind a gap maybe by nothing else."""
    links, cap = links_of(graph, target, 0), graph[CAP0]
    if put_last(links, cap, slot):
        return
    found_d, found_i = np.empty(cap + PADDING, np.float32), np.empty(cap + PADDING, np.int32)
    count = measure_links(graph, target, 0, found_d, found_i, scratch)
    near = first_behind(graph, found_d, count) if has_gaps(graph) else count
    for place in range(cap):
        if get_i32(links, place) == found_i[near - 1]:
            set_i32(links, place, slot)


@kernel
def link_lost(graph, visited, slot_S, begin, end, ef):
    """Let the nearest that a walk for it comes to lead to each of suspects ``begin`` ... ``end`` that it does not come to; how many.

    One after the other: what was linked leads on to others. And as it came, or was left, without most of its neighbours, it is linked to
    those that a walk of ef_construction comes to now. Where no list of those that the walk came to takes it by SELECT, the nearest does.
    """
    most = max(ef, graph[EF])
    found_d, found_i = np.empty(most + PADDING, np.float32), np.empty(most + PADDING, np.int32)
    chosen = np.empty(cap_of(graph, 0), np.int32)
    todo, ground, cap, num_linked = np.empty(graph[CAP0] + 1, np.int32), np.int64(0), graph[CAP0], 0
    own, other, wanted = (
        np.empty(graph[WIDTH], np.float32),
        np.empty(graph[WIDTH], np.float32),
        np.empty(graph[WIDTH], np.float32),
    )
    for number in range(begin, end):
        slot = np.int64(slot_S[number])
        query, scale, norm = as_query(graph, slot, address(wanted))
        entry, nearest, start, _, _ = descend(graph, query, scale, norm, ground)
        count, _, _ = pool_search(
            graph, query, scale, norm, ground, entry, nearest, start, ef, visited, found_d, found_i, todo
        )
        if is_found(graph, query, scale, norm, slot, count, ef, found_d, found_i):
            continue
        is_led_to, place = False, 0
        while place < count and not is_led_to:
            target = np.int64(~found_i[place])
            links = links_of(graph, target, 0)
            is_led_to = leads_to(links, cap, slot)
            if not is_led_to:
                add_links(graph, ground, target, links, slot_S, number, number + 1, own, other)
                is_led_to = leads_to(links, cap, slot)
                num_linked += is_led_to
            place += 1
        if not is_led_to:
            put_in(graph, np.int64(~found_i[0]), slot, address(other))
            num_linked += 1
        count, _, _ = pool_search(
            graph, query, scale, norm, ground, entry, nearest, start, most, visited, found_d, found_i, todo
        )
        count = live_candidates(graph, slot, count, found_d, found_i)
        taken = select(graph, slot, count, graph[CAP], found_d, found_i, chosen, address(other))
        lead_both_ways(graph, slot_S, number, chosen, taken, own, other)
    return num_linked


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


@inlined
def prepare(graph, slot_B, number, target_TP, list_TC):
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


@inlined
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
def come_prepared(graph, slot_B, number, target_TP, list_TC, count):
    """Let the graph lead to element ``number`` by the lists that `prepare` wrote: its last step, some microseconds."""
    lead_to(graph, slot_B, number, target_TP, list_TC, count)


@inlined
def find_links(graph, visited, base, found_d, found_i, todo, chosen, own, other):
    """Write the links of a new element on every level that the graph has and it has; whether they lead to an equal."""
    is_copy = False
    query, scale, norm = as_query(graph, base, address(own))
    top = get_i32(graph[LEVEL], base)
    entry, nearest, _, _, _ = descend(graph, query, scale, norm, min(top, graph[TOP]))
    for level in range(min(top, graph[TOP]), -1, -1):
        count, _, _ = pool_search(
            graph, query, scale, norm, level, entry, nearest, INFINITY, graph[EF], visited, found_d, found_i, todo
        )
        entry, nearest = np.int64(~found_i[0]), found_d[0]
        count = live_candidates(graph, base, count, found_d, found_i)
        if graph[EXTEND] != 0:
            count = extend(graph, base, level, query, scale, norm, count, visited, found_d, found_i)
        if level == 0:
            is_far = is_far_off(graph, found_d, found_i, count, address(other))
            is_suspect = is_far or behind_gap(graph, found_d, count) < count
            set_u8(graph[SUSPECT], base, np.uint8(FAR * is_far + (NOW | WATCHED) * is_suspect))
            if is_suspect:
                mark_block(graph, base, NOW | WATCHED)
        count = select(graph, base, count, graph[CAP], found_d, found_i, chosen, address(other))
        write_links(links_of(graph, base, level), cap_of(graph, level), chosen, count)
        is_copy = level == 0 and leads_to_equal(graph, base, chosen, count)
    return is_copy


@kernel
def link_new(graph, visited, slot_B, begin, end, way, target_TP, list_TC):
    """Write the links of new elements ``begin`` ... ``end`` of a batch on every level that the graph has and they have.

    It is one kernel for all ways in which they come, since others would be the same code compiled again.

    Args:
        graph: the row that describes the index.
        visited: marks of a search.
        slot_B: int64 [B], the batch.
        begin, end: numbers in it.
        way: `BESIDE`: no more than that. `ONE_BY_ONE`: the graph leads to each before the next is looked at, batches of one. `PREPARED`:
            the lists that are to lead to the last are worked out (`prepare`), and nothing leads to it yet.
        target_TP, list_TC: as of `prepare`, where it is PREPARED; else not looked at (`NO_LISTS`).

    Returns:
        How many of them lead to an equal, and how many lists were worked out for the last.
    """
    num_copies, count, ef = 0, 0, graph[EF]
    found_d, found_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo = np.empty(graph[CAP0] + 1, np.int32)
    chosen = np.empty(graph[CAP] + 1, np.int32)
    own, other = np.empty(graph[WIDTH], np.float32), np.empty(graph[WIDTH], np.float32)
    for number in range(begin, end):
        if graph[ENTRY] >= 0:
            base = np.int64(slot_B[number])
            num_copies += find_links(graph, visited, base, found_d, found_i, todo, chosen, own, other)
        if way == ONE_BY_ONE:
            most = graph[CAP0] + graph[CAP] * max(graph[TOP], 0)
            target_TP, list_TC = np.empty((most, 2), np.int64), np.empty((most, graph[CAP0]), np.int32)
        if way != BESIDE:
            count = prepare(graph, slot_B, number, target_TP, list_TC)
        if way == ONE_BY_ONE:
            lead_to(graph, slot_B, number, target_TP, list_TC, count)
    return num_copies, count
