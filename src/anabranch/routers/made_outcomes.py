"""Outcomes and a pool that are made up, with all there can be in them: what strategies are checked on."""

from typing import Any

import numpy as np

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.money import Price

DIM = 12


FRUIT = ("apples", "pears", "figs")


MODELS = ("small", "middle", "large", "odd")


PRICES = (0.1, 0.4, 1.5, 0.4)  # dollars per million tokens


def made_outcomes(num_rows: int = 160, *, seed: int = 0) -> Recorded:
    """Outcomes with all there can be: scores that depend on the vector, costs, tasks, tokens, latencies, answers and signals of them."""
    rng = np.random.default_rng(seed)
    # The same for every seed.
    world = np.random.default_rng(7)
    vector_ND = rng.standard_normal((num_rows, DIM)).astype(np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    chance_NM = 1 / (1 + np.exp(-5 * vector_ND @ world.standard_normal((DIM, len(MODELS))) - [-0.5, 0.0, 0.8, 0.0]))
    score_NM = (rng.random(chance_NM.shape) < chance_NM).astype(float)
    tokens_NM2 = np.stack(
        (np.repeat(rng.integers(10, 200, (num_rows, 1)), len(MODELS), 1), rng.integers(20, 400, chance_NM.shape)),
        axis=2,
    ).astype(float)
    noise_NM = rng.normal(0, 0.2, chance_NM.shape)
    task = tuple("abc"[int(at)] for at in (vector_ND[:, :3]).argmax(1))
    texts = [
        f"question {row} of kind {task[row]}: how many {FRUIT[row % 3]} are {row % 7} + {row % 5}?"
        for row in range(num_rows)
    ]
    said = ("I am not sure", "yes")
    return Recorded(
        query=tuple(texts),
        models=MODELS,
        score_NM=score_NM,
        cost_NM=tokens_NM2.sum(2) * np.array(PRICES) / 1e6,
        task=task,
        tokens_NM2=tokens_NM2,
        latency_NM=0.5 + rng.random(chance_NM.shape) * [1, 2, 4, 2],
        vector_ND=vector_ND,
        answers=tuple(
            {name: f"{name} says {said[int(right)]}" for name, right in zip(MODELS, row, strict=True)}
            for row in score_NM
        ),
        signals={
            "logprob": -0.8 + 0.5 * score_NM + noise_NM,
            "entropy": 0.8 - 0.5 * score_NM - noise_NM,
            "quantile": -1.5 + score_NM + noise_NM,
            "votes": np.clip(np.round((0.3 + 0.4 * score_NM + noise_NM) * 8), 0, 8) / 8,
            "agreement": np.clip(np.round((0.4 + 0.5 * score_NM + noise_NM) * 3), 1, 3) / 3,
        },
    )


def made_pool(names: tuple[str, ...] = MODELS, **changes: Any) -> Pool:
    """Models with prices; names that are not of the made outcomes cost a dollar a million tokens."""
    price = dict(zip(MODELS, PRICES, strict=True))
    return Pool(
        tuple(
            Model(name=name, price=Price.of_dollars(price.get(name, 1.0), price.get(name, 1.0)), **changes)
            for name in names
        )
    )
