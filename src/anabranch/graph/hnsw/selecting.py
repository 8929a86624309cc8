"""SELECT-NEIGHBORS (paper, algorithms 3 and 4): which of some candidates an element is linked to.

Equal vectors would fill each other's lists until nothing leads out of them or to the last that came. So at most half of a list leads to
equals of its element.
"""
# Shapes: K candidates

import numpy as np

from anabranch.graph.hnsw.layout import (
    AUX,
    DELETED,
    EF,
    KEEP,
    KIND,
    ROWS,
    SIMPLE,
    STRIDE,
    WIDTH,
    as_query,
    cap_of,
    links_of,
)
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import address, get_i32, get_u8, helper, inlined, set_i32, set_u8
from anabranch.graph.hnsw.search import clear, insert, is_equal, next_tag


@inlined
def measure(graph, query, scale, norm, slot):
    """From a query to a slot, of any kind (`raw.distance`)."""
    row = graph[ROWS] + slot * graph[STRIDE]
    return distance(graph[KIND], query, scale, norm, row, graph[AUX], slot, graph[WIDTH])


@inlined
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


@inlined
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


@inlined
def leads_to_equal(graph, base, chosen, count):
    """Whether one of ``count`` slots is equal to the base."""
    for place in range(count):
        if is_equal(graph, base, np.int64(chosen[place])):
            return True
    return False
