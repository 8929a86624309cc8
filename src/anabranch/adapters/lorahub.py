"""LoRAHub: what trained adapters weigh for a new task, found without gradients from a few of its rows.

"LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (Huang et al. 2023, arXiv 2307.13269):

    w = argmin of  L(rows; (sum_i w_i A_i)(sum_i w_i B_i)) + 0.05 mean_i |w_i|,   |w_i| <= 1.5,   from w = 0, in 40 steps

Departures: the search is CMA-ES (Hansen 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772), where the paper takes Shiwa of
the package nevergrad, which chooses among several by the budget; halves are mixed as peft's ``linear`` does, of square roots of weights, so
that a weight means the same for one adapter as it does in a sum; and any method of `combine` may take its place. The best weights that were
tried are given, the base alone (all 0) among them.
"""
# Shapes: K adapters, M weights of a generation

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anabranch.adapters.adapt.measuring import measure_rows
from anabranch.adapters.adapt.rows import Row
from anabranch.adapters.algebra import Method, combine
from anabranch.adapters.attach import load_peft, unload
from anabranch.adapters.peft_folder import Adapter, write_peft
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.lm.decoder import Decoder

__all__ = ["Found", "lorahub_weights", "search"]

_BOUND, _PENALTY, _STEPS = 1.5, 0.05, 40
# Of the first generation, in units of weights.
_SPREAD = 0.5


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        weights: of each adapter.
        loss: of the rows with these, in nats per token, without the penalty.
        base_loss: with none.
        tried: how many weights were.
    """

    weights: tuple[float, ...]
    loss: float
    base_loss: float
    tried: int


def search(
    loss: Callable[[Sequence[float]], float],
    count: int,
    *,
    steps: int = _STEPS,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, best: None,
) -> Found:
    """The best of ``steps`` weights, all 0 the first of them.

    Args:
        loss: of weights; one that is not finite counts as the worst.
        count: K.
        steps: weights that are tried.
        seed: of what is tried.
        on_step: called with the step and the best loss so far.

    Raises ConfigError for no adapter or no step, DataError where the loss of the base is not finite.
    """
    if count < 1 or steps < 1:
        raise ConfigError(f"{steps} steps for {count} adapters; there must be at least one of each")
    base = loss([0.0] * count)
    if not math.isfinite(base):
        raise DataError(f"the loss of the model without adapters is {base}, so nothing can be compared with it")
    best, best_K, kept = base, np.zeros(count), base
    on_step(1, base)
    strategy, step = _Strategy(count, np.random.default_rng(seed)), 1
    while step < steps:
        drawn_MK = strategy.ask()[: steps - step]
        scores = []
        for drawn_K in drawn_MK:
            # Beyond the bound is as at it, and worse the farther it is.
            tried_K = drawn_K.clip(-_BOUND, _BOUND)
            found = loss(tried_K.tolist())
            found = found if math.isfinite(found) else math.inf
            total = found + _PENALTY * float(np.abs(tried_K).mean())
            scores.append(total + float(np.square(drawn_K - tried_K).sum()))
            if total < best:
                best, best_K, kept = total, tried_K, found
            step += 1
            on_step(step, kept)
        if len(drawn_MK) == strategy.size:
            strategy.tell(drawn_MK, np.array(scores))
    return Found(tuple(best_K.tolist()), kept, base, step)


class _Strategy:
    """CMA-ES with the constants of its tutorial (table 1), weights of the better half alone."""

    def __init__(self, count: int, random: np.random.Generator) -> None:
        self.size = 4 + int(3 * math.log(count)) if count > 1 else 4
        half = self.size // 2
        weight_M = np.log((self.size + 1) / 2) - np.log(np.arange(1, half + 1))
        self._weight_M = weight_M / weight_M.sum()
        self._mass = 1 / float(np.square(self._weight_M).sum())
        mass, self._count, self._random = self._mass, count, random
        self._c_sigma = (mass + 2) / (count + mass + 5)
        self._damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (count + 1)) - 1) + self._c_sigma
        self._c_path = (4 + mass / count) / (count + 4 + 2 * mass / count)
        self._c_one = 2 / ((count + 1.3) ** 2 + mass)
        self._c_mass = min(1 - self._c_one, 2 * (mass - 2 + 1 / mass) / ((count + 2) ** 2 + mass))
        # E ||N(0, I)||
        self._usual = math.sqrt(count) * (1 - 1 / (4 * count) + 1 / (21 * count**2))
        self._mean_K, self._sigma = np.zeros(count), _SPREAD
        self._covariance_KK = np.eye(count)
        self._path_K, self._sigma_path_K, self._generation = np.zeros(count), np.zeros(count), 0

    def ask(self) -> np.ndarray:
        """Weights of the next generation, ``[M, K]``."""
        value_K, vector_KK = np.linalg.eigh(self._covariance_KK)
        root_K = np.sqrt(value_K.clip(1e-20))
        self._root_KK = vector_KK * root_K
        self._back_KK = (vector_KK / root_K) @ vector_KK.T
        drawn_MK = self._random.standard_normal((self.size, self._count))
        return self._mean_K + self._sigma * drawn_MK @ self._root_KK.T

    def tell(self, drawn_MK: np.ndarray, score_M: np.ndarray) -> None:
        """How good they were, less being better."""
        order_M = np.argsort(score_M, kind="stable")[: len(self._weight_M)]
        step_MK = (drawn_MK[order_M] - self._mean_K) / self._sigma
        step_K = self._weight_M @ step_MK
        self._generation += 1
        self._mean_K = self._mean_K + self._sigma * step_K
        c, mass = self._c_sigma, self._mass
        self._sigma_path_K = (1 - c) * self._sigma_path_K + math.sqrt(c * (2 - c) * mass) * self._back_KK @ step_K
        length = float(np.linalg.norm(self._sigma_path_K))
        grown = length / math.sqrt(1 - (1 - c) ** (2 * self._generation))
        is_short = grown < (1.4 + 2 / (self._count + 1)) * self._usual
        c = self._c_path
        self._path_K = (1 - c) * self._path_K + is_short * math.sqrt(c * (2 - c) * mass) * step_K
        lost = (1 - is_short) * c * (2 - c)
        self._covariance_KK = (
            (1 - self._c_one - self._c_mass + self._c_one * lost) * self._covariance_KK
            + self._c_one * np.outer(self._path_K, self._path_K)
            + self._c_mass * (step_MK.T * self._weight_M) @ step_MK
        )
        self._sigma *= math.exp(min(1.0, self._c_sigma / self._damping * (length / self._usual - 1)))


def lorahub_weights(
    adapters: Sequence[Adapter],
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    method: Method = "linear",
    steps: int = _STEPS,
    search_seed: int = 0,
    template: str = "{prompt}\n",
    most_tokens: int | None = None,
    batch_size: int = 16,
    on_step: Callable[[int, float], None] = lambda step, best: None,
    **options: object,
) -> Found:
    """What ``adapters`` weigh for the task of ``rows``, few of which are enough (5 in the paper).

    Args:
        adapters: of one base.
        model: that base, with nothing on it, as it is left.
        tokenizer: of it.
        rows: of the new task.
        method: how they are combined, with ``options`` of `combine`.
        steps, on_step: as of `search`; ``search_seed`` is its seed.
        template, most_tokens, batch_size: as of `measure_rows`.

    Raises as `search`, `combine`, `load_peft` and `measure_rows`, ConfigError for ``mean``, which has no negative weights.
    """
    if method == "mean":
        raise ConfigError("weights that are found may be negative, which those of method 'mean' are not; use 'linear'")

    def loss(weights: Sequence[float]) -> float:
        told = {"template": template, "most_tokens": most_tokens, "batch_size": batch_size}
        if not any(weights):
            return measure_rows(model, tokenizer, rows, **told).all.nats_per_token  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "mixed"
            write_peft(place, combine(adapters, weights, method, **options).adapter)  # type: ignore[arg-type]
            load_peft(place, model)
            try:
                return measure_rows(model, tokenizer, rows, **told).all.nats_per_token  # type: ignore[arg-type]
            finally:
                unload(model)

    return search(loss, len(adapters), steps=steps, seed=search_seed, on_step=on_step)
