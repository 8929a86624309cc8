"""Which elements share a block: neighbours do, and blocks that many lead to come first in the file."""
# Shapes: N elements, L room for links, P elements of a block

import numpy as np

from anabranch.graph.hnsw.raw import kernel


def packed(link_NL: np.ndarray, degree_N: np.ndarray, per: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements by slot, int32 [N], and slots by element, int32 [N].

    Args:
        link_NL: int32, elements + 1; 0 behind the last.
        degree_N: int32, how many lists each stands in.
        per: P.
    """
    count = len(link_NL)
    order_N, slot_N = np.empty(count, np.int32), np.full(count, -1, np.int32)
    fill_blocks(link_NL, per, order_N, slot_N)
    # The last may have fewer: it stays.
    whole = count // per * per
    order_UP = order_N[:whole].reshape(-1, per)
    lead_U = np.zeros(len(order_UP), np.int64)
    for place in range(per):
        lead_U += degree_N[order_UP[:, place]]
    order_N[:whole] = order_UP[np.argsort(-lead_U, kind="stable")].reshape(-1)
    slot_N[order_N] = np.arange(count, dtype=np.int32)
    return order_N, slot_N


@kernel
def fill_blocks(link_NL, per, order_N, slot_N):
    """Begin a block with the first element that is in none, fill it with its neighbours, their neighbours, then what comes next."""
    placed = following = 0
    for row in range(len(link_NL)):
        if slot_N[row] >= 0:
            continue
        begin = at = placed
        order_N[placed], slot_N[row] = row, placed
        placed += 1
        while placed - begin < per and placed < len(link_NL):
            if at < placed:
                here = order_N[at]
                at += 1
                for place in range(link_NL.shape[1]):
                    other = link_NL[here, place] - 1
                    if other < 0 or placed - begin == per:
                        break
                    if slot_N[other] < 0:
                        order_N[placed], slot_N[other] = other, placed
                        placed += 1
                continue
            while slot_N[following] >= 0:
                following += 1
            order_N[placed], slot_N[following] = following, placed
            placed += 1


@kernel
def merge_links(link_NL, degree_N):
    """Bring links (elements + 1, 0 for none) to the front, each once; add to how many lists they stand in; most links of an element.

    -1, and not all is done, where a link leads beyond the last element.
    """
    most = 0
    for row in range(len(link_NL)):
        count = 0
        for place in range(link_NL.shape[1]):
            link = link_NL[row, place]
            if link > len(degree_N):
                return -1
            is_new = link > 0
            for other in range(count):
                is_new = is_new and link_NL[row, other] != link
            if is_new:
                link_NL[row, count] = link
                degree_N[link - 1] += 1
                count += 1
        for place in range(count, link_NL.shape[1]):
            link_NL[row, place] = 0
        most = max(most, count)
    return most
