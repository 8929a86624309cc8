"""How fast is the exact balanced assignment, against a min-cost flow (OR-tools)?

Skewed sigmoid scores of T tokens for E destinations, K each: a transportation problem. The peer is a solver made for such, OR-tools'
min-cost flow, on costs rounded to 1e-9, with its graph built in the time that counts. Ours is asked for a relative gap of 1e-9 too (its
default is 1e-4). Both are optimal, and objectives are compared first (1e-7). The bar: 16,384 x 64 in 5 s on two cores. (20 times the
speed of a general linear program was another; it is passed many times over and says little, since such a program knows nothing of
the problem's structure.)

OR-tools is no dependency of ours; without it only the smallest shape is timed, against the linear program (scipy's HiGHS).
``pip install ortools`` has it, or beside an environment that is to stay as it is:

    pip install --no-deps --target ort ortools absl-py protobuf
    PYTHONPATH=ort python benchmarks/balance_audit.py --json benchmarks/results/balance_audit.json
"""
# Shapes: T tokens, E destinations, K per token

import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_matrix, hstack, identity, vstack

from _harness import arguments, compare, finish, start
from anabranch.routing.assignment import price_solve

SHAPES = [(1024, 16, 2), (2048, 32, 4), (16384, 64, 6)]
# Of the integral costs that a min-cost flow takes, and the gap that ours is asked for.
SCALE = 1e9
TOLERANCE = 1 / SCALE
Solver = Callable[[np.ndarray, int], float]


def scores(num_tokens: int, num_destinations: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    logit_TE = generator.normal(size=(num_tokens, num_destinations)) + generator.normal(size=num_destinations)
    return 1 / (1 + np.exp(-logit_TE))


def min_cost_flow(score_TE: np.ndarray, top_k: int) -> float:
    """The optimum by OR-tools: each token sends ``top_k`` units, at most one along each arc, and destinations take equal shares."""
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    num_tokens, num_destinations = score_TE.shape
    token_A, destination_A = np.divmod(np.arange(num_tokens * num_destinations), num_destinations)
    cost_A = -np.rint(score_TE.ravel() * SCALE).astype(np.int64)
    flow = SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(
        token_A, num_tokens + destination_A, np.ones(len(token_A), np.int64), cost_A
    )
    share = top_k * num_tokens // num_destinations
    supply_N = np.concatenate([np.full(num_tokens, top_k), np.full(num_destinations, -share)])
    flow.set_nodes_supplies(np.arange(len(supply_N)), supply_N)
    if flow.solve() != flow.OPTIMAL:
        raise SystemExit(f"OR-tools found no optimum for {num_tokens} tokens and {num_destinations} destinations")
    return -flow.optimal_cost() / SCALE


def linear_program(score_TE: np.ndarray, top_k: int) -> float:
    """The optimum by HiGHS; constraints are sparse, as anyone would write them."""
    num_tokens, num_destinations = score_TE.shape
    rows = block_diag([csr_matrix(np.ones((1, num_destinations)))] * num_tokens)
    columns = hstack([identity(num_destinations)] * num_tokens)
    share = np.full(num_destinations, top_k * num_tokens / num_destinations)
    found = linprog(
        -score_TE.ravel(),
        A_eq=vstack([rows, columns]).tocsr(),
        b_eq=np.concatenate([np.full(num_tokens, top_k), share]),
        bounds=(0, 1),
        method="highs",
    )
    return -float(found.fun)


def time_shape(score_TE: np.ndarray, top_k: int, name: str, solve: Solver, options: Namespace) -> list[dict[str, Any]]:
    """A row of a shape, once the peer's optimum was found to be ours; none where ``--only`` names another case."""
    num_tokens, num_destinations = score_TE.shape
    case = f"{num_tokens} tokens, {num_destinations} destinations, top {top_k}"
    if options.only not in case:
        return []
    found, optimum = price_solve(score_TE, top_k, TOLERANCE), solve(score_TE, top_k)
    if abs(found.objective - optimum) > 1e-7 * abs(optimum):
        raise SystemExit(f"{case}: {found.objective} is not the optimum {optimum} of {name}")
    peers = {name: lambda: solve(score_TE, top_k)}
    shape = {"tokens": num_tokens, "destinations": num_destinations, "top_k": top_k, "gap": found.gap}
    return [{**compare(case, lambda: price_solve(score_TE, top_k, TOLERANCE), peers, rounds=options.rounds), **shape}]


def main() -> None:
    options = arguments(__doc__.split("\n")[0]).parse_args()
    start(options)
    peer, shapes, packages = ("OR-tools min-cost flow", min_cost_flow), SHAPES, ["numpy", "ortools", "anabranch"]
    if find_spec("ortools") is None:
        print("OR-tools is not installed: the larger shapes are left out", file=sys.stderr)
        peer, shapes, packages = ("scipy linprog (HiGHS)", linear_program), SHAPES[:1], ["numpy", "scipy", "anabranch"]
    rows: list[dict[str, Any]] = []
    for num_tokens, num_destinations, top_k in shapes[:1] if options.quick else shapes:
        rows += time_shape(scores(num_tokens, num_destinations), top_k, *peer, options)
    finish("balance_audit", rows, options, packages)


if __name__ == "__main__":
    main()
