"""One query of a graph for which nothing is prepared: forward push, and what it leaves by conjugate gradients on the graph as it is.

A push looks at the neighbourhood that matters and no more, where the tolerance lets it; a narrow tolerance on a graph that mixes well needs
all of the graph many times over, and then the residual of the push is solved for, which takes some ten passes over the edges.
"""
# Shapes: N nodes, M stored edges

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from anabranch.graph.ppr.factor import Factor
from anabranch.graph.ppr.push import PushBuffers, push_into, take_residual, take_sparse
from anabranch.graph.ppr.rules import Transition
from anabranch.graph.ppr.solve import Workspace, solve

# Edges that a push reads at most before it is given up, as a share of those there are.
SHARE = 0.25


class Once(NamedTuple):
    """The leaky solution of one query.

    Attributes:
        ids: int64 nodes of ``value``, in no order; None where ``value`` is of all nodes.
        value: float64 scores.
        reads: edges that were read.
    """

    ids: np.ndarray | None
    value: np.ndarray
    reads: int


def solve_once(
    transition: Transition,
    ids: np.ndarray,
    start: np.ndarray,
    tol: float,
    buffers: PushBuffers,
    fall_back: Callable[[], tuple[Factor, Workspace]],
) -> Once:
    """The leaky solution of ``start`` at ``ids``, within ``tol`` in L1. ``fall_back`` is asked for where the push does not suffice."""
    edges = len(transition.graph.indices)
    touched, error, reads = push_into(transition, ids, start, tol, max(int(SHARE * edges), 1), buffers)
    if error <= tol:
        return Once(*take_sparse(buffers, touched), reads)
    at, rest = take_residual(buffers, touched)
    done, value = take_sparse(buffers, touched)
    factor, workspace = fall_back()
    score_N, _, passes = solve(transition, factor, at, rest, tol, workspace)
    score_N[done] += value
    return Once(None, score_N, reads + passes * edges)
