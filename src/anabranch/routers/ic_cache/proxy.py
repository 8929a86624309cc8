"""Stage 2 of selection: a small model that says how much an example would help, h(q, (q_i, a_i)) between 0 and 1.

Similarity alone tells little of helpfulness (the paper finds correlations of 0.04 to 0.22). A proxy learns from sampled outcomes: answers
that were given with an example, and how good they were.
"""
# Shapes: N outcomes, K candidates, F features

from typing import Any, ClassVar, Self

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.ic_cache.features import NAMES, Pairs
from anabranch.routers.ic_cache.mlp import Network
from anabranch.routers.logistic import fit_logistic, sigmoid
from anabranch.routers.score_scale import ScoreScale


class Proxy(Part, family="utility_proxy"):
    """Interface.

    Attributes:
        needs_fit: `score` is a guess until `fit`.
        is_fitted: `fit` has been called.
    """

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    needs_fit: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config
        self.is_fitted = False

    def score(self, pairs: Pairs) -> np.ndarray:
        """h of each candidate, float64 [K] between 0 and 1; the cosine, cut off at 0, before it has learned."""
        if not self.is_fitted:
            return np.clip(pairs.feature_KF[:, 0], 0, 1)
        return self._score(pairs)

    def _score(self, pairs: Pairs) -> np.ndarray:
        raise NotImplementedError

    def fit(self, pairs: Pairs, helped_N: np.ndarray, *, seed: int = 0) -> Self:
        """Learn from outcomes.

        Args:
            pairs: requests with one example each.
            helped_N: how good the answers were, 0 (it misled) to 1.
            seed: of what is random.

        Raises InputError for outcomes outside 0 to 1 or another number of them.
        """
        helped_N = np.asarray(helped_N, np.float64)
        if helped_N.shape != (len(pairs),) or not len(pairs):
            raise InputError(f"{list(helped_N.shape)} outcomes of {len(pairs)} pairs; give one for each, at least one")
        odd_N = ScoreScale().is_beyond(helped_N) | np.isnan(helped_N)
        if odd_N.any():
            raise InputError(f"{float(helped_N[odd_N][0])!r} is among the outcomes; each must be between 0 and 1")
        self._fit(pairs, np.clip(helped_N, 0.0, 1.0), seed)
        self.is_fitted = True
        return self

    def _fit(self, pairs: Pairs, helped_N: np.ndarray, seed: int) -> None:
        raise NotImplementedError

    def state(self) -> tuple[Arrays, Facts]:
        """What it learned."""
        return {}, {"is_fitted": self.is_fitted}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.is_fitted = facts["is_fitted"]


class Similarity(Proxy, kind="similarity"):
    """No stage 2: the cosine itself."""

    needs_fit = False

    def _score(self, pairs: Pairs) -> np.ndarray:
        return np.clip(pairs.feature_KF[:, 0], 0, 1)

    def _fit(self, pairs: Pairs, helped_N: np.ndarray, seed: int) -> None:
        pass


class _OnFeatures(Proxy):
    """Of standardised features."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._mean_F, self._scale_F = np.zeros(len(NAMES)), np.ones(len(NAMES))

    def _standardise(self, feature_KF: np.ndarray) -> np.ndarray:
        return (feature_KF - self._mean_F) / self._scale_F

    def _measure(self, feature_NF: np.ndarray) -> np.ndarray:
        self._mean_F = feature_NF.mean(0)
        deviation_F = feature_NF.std(0)
        # What never varied says nothing.
        self._scale_F = np.where(deviation_F > 1e-9, deviation_F, np.inf)
        return self._standardise(feature_NF)

    def state(self) -> tuple[Arrays, Facts]:
        """With means and scales of the features."""
        arrays, facts = super().state()
        return arrays | {"mean_F": self._mean_F, "scale_F": self._scale_F}, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take it back."""
        super().load_state(arrays, facts)
        self._mean_F, self._scale_F = arrays["mean_F"], arrays["scale_F"]


class Logistic(_OnFeatures, kind="logistic"):
    """Logistic regression by Newton's method: exact, and the same for the same data."""

    @configclass
    class Config(Proxy.Config):
        """How much to hold back.

        Attributes:
            penalty: ridge on the weights of standardised features, over all outcomes together.
            rounds: of Newton's method at most.
        """

        penalty: float = Field(default=1.0, gt=0)
        rounds: int = Field(default=50, ge=1)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The last is the constant.
        self.weight_F1 = np.zeros(len(NAMES) + 1)

    def _score(self, pairs: Pairs) -> np.ndarray:
        return sigmoid(self._standardise(pairs.feature_KF) @ self.weight_F1[:-1] + self.weight_F1[-1])

    def _fit(self, pairs: Pairs, helped_N: np.ndarray, seed: int) -> None:
        # The constant has next to no penalty, which keeps it finite where all outcomes are alike.
        x_N1 = np.hstack([np.ones((len(pairs), 1)), self._measure(pairs.feature_KF)])
        theta_F1 = fit_logistic(x_N1, helped_N, penalty=self.config.penalty, free=1, steps=self.config.rounds)
        self.weight_F1 = np.roll(theta_F1, -1)

    def state(self) -> tuple[Arrays, Facts]:
        """With the weights."""
        arrays, facts = super().state()
        return arrays | {"weight_F1": self.weight_F1}, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take it back."""
        super().load_state(arrays, facts)
        self.weight_F1 = arrays["weight_F1"]


class Mlp(_OnFeatures, kind="mlp"):
    """One hidden layer, trained by Adam on the logistic loss."""

    @configclass
    class Config(Proxy.Config):
        """Size and training.

        Attributes:
            hidden: units.
            epochs: over the outcomes.
            batch_size: outcomes per step.
            learning_rate: of Adam.
            weight_decay: decoupled.
        """

        hidden: int = Field(default=32, ge=1)
        epochs: int = Field(default=60, ge=1)
        batch_size: int = Field(default=64, ge=1)
        learning_rate: float = Field(default=3e-3, gt=0)
        weight_decay: float = Field(default=1e-2, ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.network = self._fresh(0)

    def _fresh(self, seed: int) -> Network:
        config = self.config
        return Network(
            (len(NAMES), config.hidden, 1),
            seed=seed,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )

    def _score(self, pairs: Pairs) -> np.ndarray:
        return sigmoid(self.network(self._standardise(pairs.feature_KF))[:, 0].astype(np.float64))

    def _fit(self, pairs: Pairs, helped_N: np.ndarray, seed: int) -> None:
        x_NF, random = self._measure(pairs.feature_KF), np.random.default_rng(seed)
        self.network = self._fresh(seed)
        for _ in range(self.config.epochs):
            order = random.permutation(len(x_NF))
            for start in range(0, len(order), self.config.batch_size):
                at = order[start : start + self.config.batch_size]
                slope_N1 = (sigmoid(self.network(x_NF[at])[:, 0]) - helped_N[at])[:, None] / len(at)
                self.network.step(x_NF[at], slope_N1)

    def state(self) -> tuple[Arrays, Facts]:
        """With the network."""
        arrays, facts = super().state()
        return arrays | {f"network.{name}": value for name, value in self.network.state().items()}, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take it back."""
        super().load_state(arrays, facts)
        self.network.load_state(
            {name.partition(".")[2]: value for name, value in arrays.items() if name.startswith("network.")}
        )


def merge(parts: list[Pairs]) -> Pairs:
    """All rows of several, in order."""
    return Pairs(
        np.concatenate([part.feature_KF for part in parts]) if parts else np.zeros((0, len(NAMES))),
        [text for part in parts for text in part.texts],
    )
