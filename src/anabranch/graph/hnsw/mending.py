"""Taking elements out of the graph, and linking what cannot be reached."""
# Shapes: T targets, N slots

import numpy as np

from anabranch.graph.hnsw.layout import CAP0, COUNT, EF, LEVEL, WIDTH, as_query, cap_of, links_of
from anabranch.graph.hnsw.raw import address, get_i32, get_u8, helper, kernel, set_i32, set_u8
from anabranch.graph.hnsw.search import INFINITY, PADDING, clear, descend, insert, next_tag, pool_search
from anabranch.graph.hnsw.selecting import measure, select, write_links
from anabranch.graph.hnsw.suspects import mark_left_out

# Of a slot that no walk over level 0 comes to.
UNREACHED = -1


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
        taken = select(graph, base, count, cap, found_d, found_i, chosen, address(other))
        links = links_of(graph, base, level)
        mark_left_out(graph, links, cap, found_d, found_i, count, chosen, taken)
        write_links(links, cap, chosen, taken)


@kernel
def reach(graph, start, is_reached_N, queue_N):
    """Mark what can be reached on level 0 from ``start``, itself included."""
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


@kernel
def find_ways(graph, start, parent_N, queue_N):
    """As `reach`, and from where each slot is come to first, of those that were not come to before. It takes half as long again.

    Args:
        graph: the row that describes the index.
        start: what leads to it stands in ``parent_N`` already.
        parent_N: int32 [N], `UNREACHED` for slots that were not come to. With no other links than these, all others can be reached.
        queue_N: int32 [N], for its own use.
    """
    queue_N[0], size, at = start, 1, 0
    while at < size:
        held = np.int64(queue_N[at])
        links = links_of(graph, held, 0)
        at += 1
        for place in range(graph[CAP0]):
            slot = get_i32(links, place)
            if slot < 0:
                break
            if parent_N[slot] == UNREACHED:
                parent_N[slot] = held
                queue_N[size] = slot
                size += 1


@helper
def room_in(graph, held, parent_N):
    """Whether a list on level 0 takes one more link: 2 where it has room, 1 where it has a link that may go, which is no way to others."""
    links, cap = links_of(graph, held, 0), graph[CAP0]
    if get_i32(links, cap - 1) < 0:
        return 2
    for place in range(cap):
        if parent_N[get_i32(links, place)] != held:
            return 1
    return 0


@helper
def give_room(graph, held, parent_N, query, scale, norm):
    """The place in the list of ``held`` for one more link: behind the last, or that of the farthest that may go. There is one."""
    links, cap, found, most = links_of(graph, held, 0), graph[CAP0], 0, -INFINITY
    for place in range(cap):
        slot = get_i32(links, place)
        if slot < 0:
            return place
        if parent_N[slot] != held:
            distance = measure(graph, query, scale, norm, slot)
            if distance > most:
                found, most = place, distance
    return found


@kernel
def repair_links(graph, visited, parent_N, queue_N, begin, most):
    """Link elements that level 0 does not lead to, each from the nearest list with room that a walk for it comes to. Where none has room,
    from the nearest in place of a link that is no way to others, so that whatever could be reached still can.

    There always is one: of the links in all lists that can be reached, fewer are ways to others than there are lists.

    Args:
        graph: the row that describes the index.
        visited: marks of a search.
        parent_N: as of `find_ways`, kept up to date.
        queue_N: as of `find_ways`.
        begin: the first slot that is looked at.
        most: how many are linked at most.

    Returns:
        How many were linked, and the slot to go on with, N at the end.
    """
    num_slots, ef = graph[COUNT], graph[EF]
    found_d, found_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo, own, other = (
        np.empty(graph[CAP0] + 1, np.int32),
        np.empty(graph[WIDTH], np.float32),
        np.empty(graph[WIDTH], np.float32),
    )
    # Typed: a literal would be compiled as a case of its own.
    linked, slot, ground = 0, begin, np.int64(0)
    while slot < num_slots and linked < most:
        if parent_N[slot] != UNREACHED or get_i32(graph[LEVEL], slot) < 0:
            slot += 1
            continue
        query, scale, norm = as_query(graph, slot, address(own))
        entry, nearest, start, _, _ = descend(graph, query, scale, norm, ground)
        count, _, _ = pool_search(
            graph, query, scale, norm, ground, entry, nearest, start, ef, visited, found_d, found_i, todo
        )
        best, room = np.int64(-1), 0
        for place in range(count):
            near = np.int64(~found_i[place])
            if room < 2 and parent_N[near] != UNREACHED:
                more = room_in(graph, near, parent_N)
                if more > room:
                    best, room = near, more
        if best < 0:
            best = nearest_with_room(graph, query, scale, norm, parent_N)
        query, scale, norm = as_query(graph, best, address(other))
        set_i32(links_of(graph, best, 0), give_room(graph, best, parent_N, query, scale, norm), slot)
        parent_N[slot] = best
        linked += 1
        find_ways(graph, slot, parent_N, queue_N)
    return linked, slot


@helper
def nearest_with_room(graph, query, scale, norm, parent_N):
    """The nearest reached slot whose list takes one more link, of all: for where a walk comes to none."""
    best, closest = np.int64(-1), INFINITY
    for held in range(graph[COUNT]):
        if parent_N[held] != UNREACHED and room_in(graph, np.int64(held), parent_N) > 0:
            found = measure(graph, query, scale, norm, held)
            if best < 0 or found < closest:
                closest, best = found, np.int64(held)
    return best
