"""How many nodes a set of seeds may have scores for, as far as a short look tells: what an answer may come to before it is computed."""

from collections import deque

import numpy as np

from anabranch.graph.store import Graph

# Entries that are looked at per node that is asked for; behind them the graph is thought to go on.
PATIENCE = 8


def reachable(graph: Graph, ids: np.ndarray, most: int) -> int:
    """Nodes that walks from ``ids`` come to, or ``most`` where they are as many or too many edges lie between. Never too few.

    Reads at most `PATIENCE` times ``most`` entries and rows; a row only as far as it may matter.
    """
    found = set(ids.tolist())
    waiting, left = deque(found), PATIENCE * most
    while waiting and len(found) < most:
        if left <= 0:
            return most
        node = waiting.popleft()
        first = int(graph.indptr[node])
        row = graph.indices[first : min(first + most, int(graph.indptr[node + 1]))].tolist()
        left -= len(row) + 1
        new = [target for target in row if target not in found]
        found.update(new)
        waiting.extend(new)
    return min(len(found), most)
