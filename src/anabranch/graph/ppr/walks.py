"""Monte Carlo: scores as frequencies of what random walks visit.

After Fogaras et al. (2005) for end points and Avrachenkov et al. (2007) for full paths:

    endpoint   pi(v) ~ (walks that end at v) / W
    fullpath   pi(v) ~ (visits of v) / (visits of all nodes), or alpha (visits of v) / W, which is unbiased

One walk visits 1/alpha nodes on average, so full paths need fewer walks for the same error.
"""
# Shapes: N nodes, W walks, S seeds

from typing import Any, Literal

import numpy as np

from anabranch.bounds import is_whole, shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_one_of
from anabranch.graph.counters import add_walks
from anabranch.graph.ppr.power import as_transition
from anabranch.graph.ppr.rules import CODES, Dangling, answer, parse_seeds
from anabranch.graph.random import stream, to_unit
from anabranch.graph.rows import check_top_k, order_top
from anabranch.graph.walk import walk_arrays

Mode = Literal["fullpath", "endpoint"]


def monte_carlo(
    graph: Any,
    seeds: Any,
    alpha: float = 0.15,
    *,
    walks: int = 10_000,
    mode: Mode = "fullpath",
    unbiased: bool = False,
    dangling: Dangling = "restart",
    max_steps: int | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (int64 ids, or names where seeds are) and scores (float64), by falling score, of one query by random walks.

    Args:
        graph: whatever `as_graph` takes, or its `Transition` (whose alpha and policy then count).
        seeds: see `parse_seeds`; walks are shared out among them by weight, what is left over by systematic sampling.
        alpha: probability to end a walk.
        walks: W.
        mode: count every visit, or the end of each walk.
        unbiased: with full paths, scale by alpha / W instead of making the scores sum to 1.
        dangling: policy.
        max_steps: longest walk; None for no limit. Cutting biases scores by at most 2 (1 - alpha)^max_steps in L1.
        top_k: only the largest scores; None for all positive ones.
        seed: of the walks.

    Raises:
        InputError: a bad argument.
    """
    transition = as_transition(graph, alpha, dangling)
    ids, share = parse_seeds(transition.graph, seeds)
    check_count("walks", walks)
    if max_steps is not None:
        check_count("max_steps", max_steps)
    kept, full = check_top_k(top_k), check_mode(mode) == "fullpath"
    arrays = tuple(walk_arrays(transition.graph))
    num_nodes, done = transition.num_nodes, 0
    count_N, touched_N, touched = np.zeros(num_nodes, np.int32), np.empty(num_nodes, np.int64), 0
    # Systematic sampling: seed i gets floor or ceil of W share_i walks, right in expectation.
    offset = float(to_unit(np.uint64(stream(check_seed(seed), num_nodes, 1))))
    ends = np.floor(np.cumsum(transition.finished(ids, share)) * walks + offset).astype(np.int64)
    ends[-1] = walks
    longest = int(np.diff(ends, prepend=0).max(initial=1))
    left_W, at_W = np.empty(longest, np.int64), np.empty(longest, np.int64)
    for node, end in zip(ids, ends, strict=True):
        count, done = int(end) - done, int(end)
        if count:
            counts = (left_W[:count], at_W[:count], count_N, touched_N)
            code = CODES[transition.dangling]
            touched, _ = add_walks(seed, node, 0, transition.alpha, code, full, max_steps or 0, arrays, counts, touched)
    found = touched_N[:touched].copy()
    value = count_N[found].astype(np.float64)
    value *= transition.alpha / walks if full and unbiased else 1.0 / value.sum()
    kept = order_top(found, value, len(found), kept)
    return answer(transition.graph, found[:kept], seeds), value[:kept]


def check_count(name: str, value: Any) -> int:
    """Raises InputError unless ``value`` is a whole number of at least 1, and less than 2^31."""
    if not is_whole(value) or not 1 <= int(value) < 2**31:
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of at least 1, and less than 2^31")
    return int(value)


def check_seed(seed: Any) -> int:
    """Raises InputError unless ``seed`` is a whole number of at least 0, and less than 2^63."""
    if not is_whole(seed) or not 0 <= int(seed) < 2**63:
        raise InputError(f"seed is {shown(seed)}; it must be a whole number of at least 0, and less than 2^63")
    return int(seed)


def check_mode(mode: str) -> Mode:
    """Raises InputError for a mode that is not known."""
    check_one_of("mode", mode, ("fullpath", "endpoint"))
    return mode  # type: ignore[return-value]
