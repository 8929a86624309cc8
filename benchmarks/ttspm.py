"""How long do fits of curves of samples take, a thousand at once, and how long does the budget controller take to decide?

Curves are those of mixed questions, at 16 and at 64 samples, with the noise of 100 questions. The peer of fits is scipy's `curve_fit`,
curve by curve, from one start; ours searches a grid of starts first. A decision of the controller is a look at what became of a batch,
and how much more to draw; one of `best_of` is its `route`, of names of tasks that nobody has seen and right after a score was learned,
while fits go on beside it. One thread, processor time; of `route` that of its own thread.

    bar          a thousand fits within a second, 99 of 100 decisions within 0.2 ms: ``peer`` is the bar, a ratio of 1 or above passes

    python benchmarks/ttspm.py --threads 1 --json benchmarks/results/ttspm.json
"""
# Shapes: C curves, N points of each

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from _harness import arguments, finish, start
from anabranch.routers import Outcome, Query, strategies
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.money import Price
from anabranch.test_time import BetaTTSPM, BudgetController, fit_many

CURVES, BAR_FIT_S, BAR_DECISION_MS, QUESTIONS = 1000, 1.0, 0.2, 100


def made_curves(num_points: int, count: int) -> np.ndarray:
    """Shares solved by n of 100 questions, with their noise: float64 ``[C, N]``."""
    rng = np.random.default_rng(num_points)
    n = np.arange(1, num_points + 1)
    drawn = zip(rng.uniform(0.5, 1, count), rng.uniform(0.3, 3, count), rng.uniform(0.5, 6, count), strict=True)
    clean_CN = np.stack([BetaTTSPM(*each).value(n) for each in drawn])
    return np.clip(clean_CN + rng.normal(0, 1, clean_CN.shape) * np.sqrt(clean_CN * (1 - clean_CN) / QUESTIONS), 0, 1)


def scipy_fits(curve_CN: np.ndarray) -> None:
    """One p below a ceiling, curve by curve."""
    from scipy.optimize import curve_fit

    n = np.arange(1, curve_CN.shape[1] + 1)
    for curve_N in curve_CN:
        curve_fit(lambda n, f_max, p: f_max * (1 - (1 - p) ** n), n, curve_N, p0=(0.8, 0.3), bounds=(1e-9, 1))


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Processor seconds of each round; one before does not count."""
    work()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return found


def fit_rows(num_points: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """Both models against the bar, and one p against scipy."""
    curve_CN = made_curves(num_points, count)
    rows = []
    for model in ("single", "mixed"):
        seconds = timed(lambda model=model: fit_many(curve_CN, model, num_questions=QUESTIONS), rounds)  # type: ignore[misc]
        median = statistics.median(seconds)
        name = {"single": "one p", "mixed": "the mixture"}[model]
        rows.append(
            {
                "case": f"{count:,} fits of {name}, {num_points} points",
                "ours": round(median, 4),
                "peer": BAR_FIT_S * count / CURVES,
                "ratio": round(BAR_FIT_S * count / CURVES / median, 3),
                "unit": "s",
                "peer_name": "bar of 1 s a thousand",
            }
        )
    ours, theirs = rows[0]["ours"], statistics.median(timed(lambda: scipy_fits(curve_CN[: count // 10]), 1)) * 10
    rows.append(
        {
            "case": f"{count:,} fits of one p, {num_points} points, against scipy",
            "ours": ours,
            "peer": round(theirs, 4),
            "ratio": round(theirs / ours, 3),
            "unit": "s",
            "peer_name": "scipy.optimize.curve_fit, curve by curve",
        }
    )
    return rows


def decision_row(questions: int) -> dict[str, Any]:
    """Of a question that nothing solves, batch by batch."""
    rules = BudgetController(curve=BetaTTSPM(0.9, 1.0, 1.0), value=1.0, cost=0.001)
    times = []
    for number in range(questions + 1):
        question = rules.begin()
        count = question.next()
        while count:
            began = time.process_time_ns()
            question.told(count, verified=[False] * count)
            count = question.next()
            if number:
                times.append((time.process_time_ns() - began) / 1e6)
    return _decision("decision of the budget controller, 99th percentile", times)


def _decision(case: str, times_ms: list[float]) -> dict[str, Any]:
    """The row of a decision's time, beside its bar."""
    p99 = float(np.quantile(times_ms, 0.99))
    return {
        "case": case,
        "ours": round(p99, 4),
        "p50": round(statistics.median(times_ms), 4),
        "peer": BAR_DECISION_MS,
        "ratio": round(BAR_DECISION_MS / p99, 3),
        "unit": "ms",
        "peer_name": "bar of 0.2 ms",
    }


def route_row(requests: int) -> dict[str, Any]:
    """Of requests whose tasks are new each time, with a score learned before each."""
    pool = Pool(
        (Model(name="small", price=Price.of_dollars(1, 2)), Model(name="large", price=Price.of_dollars(10, 20)))
    )
    program = strategies.make("best_of", tasks=("math",))
    times = []
    for number in range(requests + 20):
        task = f"new {number}" if number % 2 else "math"
        program.observe(Outcome(query=Query(text="q", task=task), model="small", quality=float(number % 3 == 0)))
        query = Query(text="how many?", task=task)
        began = time.thread_time_ns()
        program.route(query, pool)
        if number >= 20:
            times.append((time.thread_time_ns() - began) / 1e6)
    return _decision("decision of best_of, tasks that nobody has seen, 99th percentile", times)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    count = 100 if options.quick else CURVES
    rows = [row for num_points in (16, 64) for row in fit_rows(num_points, count, options.rounds)]
    rows.append(decision_row(10 if options.quick else 200))
    rows.append(route_row(50 if options.quick else 2000))
    rows = [row for row in rows if options.only in row["case"]]
    for row in rows:
        print(f"{row['case']:<56} {row['ours']:9.4f} {row['unit']:<3} {row['ratio']:8.2f}", file=sys.stderr, flush=True)
    finish("ttspm", rows, options, ["numpy", "scipy"])


if __name__ == "__main__":
    main()
