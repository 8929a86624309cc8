"""How fast is the exact balanced assignment, against the same problem as a linear program (scipy's HiGHS)?

Skewed sigmoid scores of T tokens for E destinations, K each; both optimal, objectives compared first (1e-7). Bars: 16,384 x 64 to a
relative gap of 1e-4 in 5 s on two cores, and 20 times faster than the linear program. ``--large`` runs that at 16,384 x 64 too (hours).

    python benchmarks/balance_audit.py --json benchmarks/results/balance_audit.json
"""
# Shapes: T tokens, E destinations, K per token

from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_matrix, hstack, identity, vstack

from _harness import arguments, compare, finish, start
from anabranch.routing.assignment import price_solve

SHAPES = [(1024, 16, 2), (2048, 32, 4)]
LARGE = (16384, 64, 6)


def scores(num_tokens: int, num_destinations: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    logit_TE = generator.normal(size=(num_tokens, num_destinations)) + generator.normal(size=num_destinations)
    return 1 / (1 + np.exp(-logit_TE))


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


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--large", action="store_true", help="the linear program at 16,384 x 64 too (hours)")
    options = parser.parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    for num_tokens, num_destinations, top_k in [*(SHAPES[:1] if options.quick else SHAPES), LARGE]:
        case = f"{num_tokens} tokens, {num_destinations} destinations, top {top_k}"
        if options.only not in case:
            continue
        score_TE = scores(num_tokens, num_destinations)
        found = price_solve(score_TE, top_k)
        shape = {"tokens": num_tokens, "destinations": num_destinations, "top_k": top_k, "gap": found.gap}
        large = (num_tokens, num_destinations, top_k) == LARGE

        def ours(score_TE: np.ndarray = score_TE, top_k: int = top_k) -> None:
            price_solve(score_TE, top_k)

        def program(score_TE: np.ndarray = score_TE, top_k: int = top_k) -> float:
            return linear_program(score_TE, top_k)

        if large and not options.large:
            # No peer in reach: ours against itself, for the time alone.
            rows.append({**compare(f"{case} (time alone)", ours, {"ours again": ours}, rounds=options.rounds), **shape})
            continue
        optimum = program()
        if abs(found.objective - optimum) > 1e-7 * abs(optimum):
            raise SystemExit(f"{case}: {found.objective} is not the optimum {optimum}")
        rounds = 1 if large else min(options.rounds, 3 if num_tokens > 2000 else 5)
        rows.append({**compare(case, ours, {"scipy linprog (HiGHS)": program}, rounds=max(rounds, 2)), **shape})
    finish("balance_audit", rows, options, ("numpy", "scipy", "anabranch"))


if __name__ == "__main__":
    main()
