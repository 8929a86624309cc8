"""Taking elements out of the graph, and linking what cannot be reached."""
# Shapes: T targets, N slots

from typing import Any

import numpy as np

from anabranch.graph.hnsw.layout import CAP0, COUNT, EF, ENTRY, LEVEL, WIDTH, as_query, cap_of, links_of
from anabranch.graph.hnsw.raw import address, get_i32, get_u8, helper, kernel, set_i32, set_u8
from anabranch.graph.hnsw.search import INFINITY, PADDING, clear, descend, insert, next_tag, pool_search
from anabranch.graph.hnsw.selecting import measure, select, write_links
from anabranch.graph.hnsw.suspects import mark_left_out


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
