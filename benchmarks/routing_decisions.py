"""How long does each strategy take to decide, given the query's vector: are 99 of 100 decisions within a millisecond?

Every strategy that is registered and decides by itself has a row, in a pool of 9 models, learned (with few epochs, since what is learned is
not measured) from outcomes of LLMRouter's size: 4,432 queries of 14 tasks, 384 numbers a vector. The outcomes are made: how long a decision
takes depends on sizes, not on what was learned. One thread, processor time of one decision at a time, of queries beside those learned from.

    bar          the 99th percentile against 1 ms: ``peer`` is 1, a ratio of 1 or above passes

`oracle` only plays recorded outcomes, and `prompt` asks a model to decide, so they have no row. `encoder` reads the text itself, by a small
transformer in numpy. `ic_cache` also chooses examples, of 4,432 that it keeps; with an embedding it has a bar of its own (`ic_cache.py`).

    python benchmarks/routing_decisions.py --threads 1 --json benchmarks/results/routing_decisions.json
"""
# Shapes: N queries, M models, D dimensions

import statistics
import sys
import time
from typing import Any

import numpy as np

from _harness import arguments, finish, start
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.money import Price

QUERIES, MODELS, DIM, TASKS, BAR_MS = 4432, 9, 384, 14, 1.0

# Measured after so many that warm up.
ASKED, WARM = 2000, 50
LEFT_OUT = {"oracle": "plays recorded outcomes alone", "prompt": "asks a model to decide"}

# Fitting takes less; all else as it is by default.
FIELDS: dict[str, dict[str, Any]] = {
    "mf": {"epochs": 2},
    "mlp": {"epochs": 2},
    "irt": {"epochs": 2},
    "encoder": {"epochs": 1},
    "cascade": {"num_cuts": 8},
    "cluster": {"num_starts": 1},
    "ic_cache": {"domains": ("*",), "epochs": 1, "least_score": 0.0},
}


def made_outcomes(queries: int, seed: int = 0) -> Recorded:
    """Outcomes of queries near the middle of their task; which model is right depends on the vector."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(7)
    middle_TD = world.standard_normal((TASKS, DIM)) / np.sqrt(DIM)
    task_N = rng.integers(0, TASKS, queries)
    vector_ND = middle_TD[task_N] + 0.8 * rng.standard_normal((queries, DIM)) / np.sqrt(DIM)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    skill_DM = world.standard_normal((DIM, MODELS))
    chance_NM = 1 / (1 + np.exp(-3 * vector_ND @ skill_DM - np.linspace(-0.5, 1, MODELS)))
    score_NM = (rng.random(chance_NM.shape) < chance_NM).astype(float)
    noisy_NM = np.clip(0.3 + 0.4 * score_NM + rng.normal(0, 0.2, score_NM.shape), 0, 1)
    said = ("I am not sure about it", "It is 42, as was asked")
    names = tuple(f"m{model}" for model in range(MODELS))
    return Recorded(
        query=tuple(f"question {seed}.{row}: what is {row} and {task_N[row]}?" for row in range(queries)),
        models=names,
        score_NM=score_NM,
        cost_NM=np.geomspace(1e-5, 1e-2, MODELS) * rng.uniform(0.5, 1.5, (queries, 1)),
        task=tuple(f"task-{task}" for task in task_N),
        vector_ND=vector_ND.astype(np.float32),
        latency_NM=rng.uniform(0.1, 2.0, score_NM.shape),
        answers=tuple({name: said[int(right)] for name, right in zip(names, row, strict=True)} for row in score_NM),
        signals={
            "logprob": noisy_NM - 1.5,
            "votes": np.round(noisy_NM * 8) / 8,
            "agreement": np.round(noisy_NM * 3) / 3,
        },
    )


def decision_row(name: str, data: Recorded, asked: list[Query], pool: Pool) -> dict[str, Any]:
    """Median and 99th percentile of one decision, in milliseconds."""
    strategy = strategies.make(name, **FIELDS.get(name, {})).fit(data)
    times = []
    for number, query in enumerate(asked):
        began = time.process_time_ns()
        decision = strategy.route(query, pool)
        spent = time.process_time_ns() - began
        assert decision.candidates
        if number >= WARM:
            times.append(spent / 1e6)
    p99 = float(np.quantile(times, 0.99))
    row = {
        "case": f"decision of {name}, 99th percentile",
        "ours": round(p99, 4),
        "p50": round(statistics.median(times), 4),
        "peer": BAR_MS,
        "ratio": round(BAR_MS / p99, 3),
        "unit": "ms",
        "peer_name": "bar of 1 ms",
    }
    print(f"{row['case']:<48} {row['ours']:8.4f} ms   p50 {row['p50']:8.4f}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    queries, asked = (400, 100 + WARM) if options.quick else (QUERIES, ASKED + WARM)
    data, other = made_outcomes(queries), made_outcomes(asked, seed=1)
    prices = [Price.of_dollars(cost, 4 * cost) for cost in np.geomspace(0.05, 10, MODELS)]
    pool = Pool(tuple(Model(name=name, price=price) for name, price in zip(data.models, prices, strict=True)))
    wanted = [name for name in strategies.names() if name not in LEFT_OUT and options.only in name]
    finish(
        "routing_decisions",
        [decision_row(name, data, list(other.queries()), pool) for name in wanted],
        options,
        ["numpy"],
    )


if __name__ == "__main__":
    main()
