"""Which elements of a batch are closer to others of it than to what the graph had: they must not come side by side.

Elements that come side by side see the graph of before alone. Where most of a group of neighbours comes in one batch (rows sorted by a
label, a group far from all else), none of its lists would lead to another of the group, and the few old lists that lead there drop most
of them again: they could not be reached. So these come one after the other, each finding those before, as in the paper.
"""
# Shapes: B batch

import numpy as np

from anabranch.graph.hnsw.layout import CAP0, WIDTH, as_query, links_of
from anabranch.graph.hnsw.raw import address, get_i32, kernel
from anabranch.graph.hnsw.selecting import measure

# Others of the batch that an element is held against: so many before it and behind it, as groups mostly come together, and so many at even
# steps over all of the batch. A walk measures thousands.
BESIDE, OVER_ALL = 32, 64

# Closer than this of its links, counted from the nearest.
PLACE = 2

# Every so many of a batch are tried first; where half of them are close, the others need not be.
TRIED, LEAST_TRIED = 16, 256


@kernel
def find_close(graph, slot_B, begin, end, step, is_close_B):
    """Mark elements ``begin``, ``begin + step`` ... before ``end`` of a batch whose links of level 0 are written and lead to nothing of it.

    Args:
        graph: the row that describes the index.
        slot_B: int64 [B], the batch.
        begin, end, step: numbers in it.
        is_close_B: uint8 [B], 1 is written where another of the batch is closer than the link at `PLACE`, or where there are no links.
    """
    size = len(slot_B)
    own = np.empty(graph[WIDTH], np.float32)
    distance_C = np.empty(graph[CAP0], np.float32)
    for number in range(begin, end, step):
        base = np.int64(slot_B[number])
        query, scale, norm = as_query(graph, base, address(own))
        links, count = links_of(graph, base, 0), 0
        while count < graph[CAP0] and get_i32(links, count) >= 0:
            distance_C[count] = measure(graph, query, scale, norm, np.int64(get_i32(links, count)))
            count += 1
        if count == 0:
            is_close_B[number] = 1
            continue
        least = np.sort(distance_C[:count])[min(PLACE, count) - 1]
        stride = max(size // OVER_ALL, 1)
        for turn in range(2 * BESIDE + OVER_ALL):
            if turn < 2 * BESIDE:
                other = number + (turn >> 1) + 1 if turn & 1 == 0 else number - (turn >> 1) - 1
            else:
                other = (number + (turn - 2 * BESIDE + 1) * stride) % size
            if other < 0 or other >= size or other == number:
                continue
            if measure(graph, query, scale, norm, np.int64(slot_B[other])) < least:
                is_close_B[number] = 1
                break
