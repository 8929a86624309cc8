"""Graphs that are made, to see how time and memory grow.

Barabasi and Albert, "Emergence of scaling in random networks", Science 286, 1999: nodes come one by one, each with m edges to distinct
nodes that are there, chosen in proportion to their degree. Degrees fall off as a power law with exponent 3.
"""
# Shapes: E edges

import numba as nb
import numpy as np

from anabranch.errors import InputError
from anabranch.graph.random import mix, next_bits
from anabranch.graph.store import Graph


def barabasi_albert(num_nodes: int, edges_each: int, seed: int = 0) -> Graph:
    """A graph of ``edges_each`` * (``num_nodes`` - ``edges_each``) edges, undirected, without weights or self-loops.

    The first node that comes with edges has them to all of the ``edges_each`` nodes before it. The same on every machine.

    Raises InputError unless 1 <= edges_each < num_nodes.
    """
    if not 1 <= edges_each < num_nodes:
        raise InputError(f"edges_each is {edges_each}; it must be 1 to {num_nodes - 1}, below the number of nodes")
    ids = np.int32 if 2 * num_nodes * edges_each < 2**31 else np.int64
    end_E2 = np.empty((edges_each * (num_nodes - edges_each), 2), ids)
    _attach(end_E2, edges_each, np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    return Graph.from_edges(end_E2[:, 0], end_E2[:, 1], num_nodes=num_nodes)


@nb.njit(cache=True, nogil=True)
def _attach(end_E2, edges_each, seed):
    state = mix(seed)
    filled = 0
    for node in range(edges_each, edges_each + len(end_E2) // edges_each):
        first = filled
        for place in range(edges_each):
            target = place  # of the first node: all before it
            fresh = first == 0
            while not fresh:
                state, bits = next_bits(state)
                draw = np.int64(bits % np.uint64(2 * first))  # an end of an earlier edge: in proportion to degrees
                target = end_E2[draw >> 1, draw & 1]
                fresh = True
                for before in range(first, filled):
                    fresh = fresh and end_E2[before, 1] != target
            end_E2[filled, 0] = node
            end_E2[filled, 1] = target
            filled += 1
