"""Semantic routes: a query goes the way of the example utterances it resembles, if it resembles them enough.

    s_r(x)  = max, or mean, of the k largest cosines of x with the examples of route r
    route   = the r of largest s_r among those with s_r >= threshold_r,    else the default

The scheme of aurelio-labs/semantic-router, which also fits thresholds; "similarity learning" in the survey (Varangot-Reille et al.
2025, arXiv 2502.00409).

Routes come from the config, as texts that the gateway's embedder turns into vectors (`connect`), or from recorded outcomes
(`fit`): a route per task, or where the data names no tasks a route per model, made of the queries it is best on. `fit` orders the
models of each route by mean score, keeps up to ``max_examples`` of its queries, and chooses each threshold on the other queries:
the one that earns most, default taken below it.
"""
# Shapes: N queries, E examples, R routes, M models, D dimensions

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Decision, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Embed, Facts, Strategy, ordered
from anabranch.routers.strategies.knn import top_k
from anabranch.routers.strategies.training import means, training_set


@configclass
class Route(BaseConfig):
    """One way to go.

    Attributes:
        name: told in the reason.
        models: tried in this order; the rest of the pool follows as fallback.
        utterances: examples of what goes this way.
        threshold: least similarity; None for that of the strategy.
    """

    name: str
    models: tuple[str, ...]
    utterances: tuple[str, ...]
    threshold: float | None = Field(default=None, ge=-1, le=1)

    def __post_init__(self) -> None:
        if not self.models or not self.utterances:
            raise ConfigError(f"route {self.name!r} needs at least one model and one utterance")


class Semantic(Strategy, kind="semantic"):
    """The most similar route, above its threshold."""

    @configclass
    class Config(Strategy.Config):
        """Routes and how similarity is measured.

        Attributes:
            routes: written down; empty to take them from data by ``fit``.
            aggregate: of the k largest cosines with a route's examples.
            top_k: k.
            threshold: least similarity of routes without one of their own.
            default: models where no route is similar enough, in order; empty for the order of ``fit``, or of the pool.
            max_examples: of a route taken from data.
        """

        routes: tuple[Route, ...] = ()
        aggregate: Literal["max", "mean"] = "mean"
        top_k: int = Field(default=5, ge=1)
        threshold: float = Field(default=0.3, ge=-1, le=1)
        default: tuple[str, ...] = ()
        max_examples: int = Field(default=100, ge=1)

        def __post_init__(self) -> None:
            names = [route.name for route in self.routes]
            if len(set(names)) < len(names):
                raise ConfigError(f"semantic.routes has a name twice: {', '.join(names)}")

    needs_vector = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.names: list[str] = [route.name for route in config.routes]
        self.models: list[list[str]] = [list(route.models) for route in config.routes]
        self.default: list[str] = list(config.default)
        self.threshold_R = np.array([config.threshold if r.threshold is None else r.threshold for r in config.routes])
        self.example_ED, self.route_E = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)

    @property
    def learned_dim(self) -> int | None:
        """See `Strategy`."""
        return self.example_ED.shape[1] or None

    def connect(self, *, embed: Embed | None = None) -> None:
        """Embed the utterances of the config. Vectors that were read from a file stay."""
        if embed is None or not self.config.routes or len(self.route_E):
            return
        texts = [text for route in self.config.routes for text in route.utterances]
        self.example_ED = np.asarray(embed(texts), np.float32)
        self.route_E = np.repeat(np.arange(len(self.names)), [len(route.utterances) for route in self.config.routes])

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Routes and thresholds from outcomes; of written routes, thresholds alone. ``seed`` draws the examples.

        Raises InputError if the utterances of written routes have not been embedded, or a written route names no recorded model.
        """
        training_set(data, "semantic")
        rng = np.random.default_rng(seed)
        mean_M = means(data.score_NM)
        by_mean = [data.models[at] for at in np.argsort(-np.nan_to_num(mean_M, nan=-np.inf), kind="stable")]
        self.default = list(self.config.default) or by_mean
        checked_N = np.arange(len(data))
        if not self.config.routes:
            checked_N = self._learn_routes(data, rng)
        elif not len(self.route_E):
            raise InputError("semantic has utterances that are not embedded; connect an embedder before fit")
        if len(checked_N):
            self._learn_thresholds(data.take(checked_N))
        return self

    def _learn_routes(self, data: Recorded, rng: np.random.Generator) -> np.ndarray:
        """Examples, models and starting thresholds; the rows that are left to check thresholds on."""
        label = _labels(data)
        self.names = sorted({name for name in label if name is not None})
        self.models, rows, route = [], [], []
        for at, name in enumerate(self.names):
            own = np.array([row for row, one in enumerate(label) if one == name], np.int64)
            mean_M = np.nan_to_num(means(data.score_NM[own]), nan=-np.inf)
            self.models.append([data.models[model] for model in np.argsort(-mean_M, kind="stable")])
            # Half stay to check on.
            kept = rng.permutation(own)[: min(self.config.max_examples, (len(own) + 1) // 2)]
            rows.append(np.sort(kept))
            route.append(np.full(len(kept), at))
        row_E = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        self.route_E = np.concatenate(route) if route else np.zeros(0, np.int64)
        self.example_ED = np.asarray(data.vector_ND[row_E], np.float32)  # type: ignore[index]
        self.threshold_R = np.full(len(self.names), self.config.threshold)
        return np.setdiff1d(np.arange(len(data)), row_E)

    def _learn_thresholds(self, data: Recorded) -> None:
        """Of the rows most similar to a route, cut where the route's model gains most on the default's. Unknown scores count as equal."""
        similarity_NR = self.similarities(np.asarray(data.vector_ND, np.float32))
        nearest_N = similarity_NR.argmax(axis=1)
        default = next((name for name in self.default if name in data.models), None)
        for route, models in enumerate(self.models):
            own = next((name for name in models if name in data.models), None)
            if own is None or default is None:
                raise InputError(
                    f"route {self.names[route]!r} or the default names none of the recorded models {', '.join(data.models)}"
                )
            rows = np.flatnonzero(nearest_N == route)
            gain_N = data.score_NM[rows, data.models.index(own)] - data.score_NM[rows, data.models.index(default)]
            self.threshold_R[route] = best_cut(
                similarity_NR[rows, route], np.nan_to_num(gain_N), float(self.threshold_R[route])
            )

    def similarities(self, vector_ND: np.ndarray) -> np.ndarray:
        """s ``[N, R]``. Raises InputError for vectors of another length than the examples'."""
        if vector_ND.shape[1] != self.example_ED.shape[1]:
            raise InputError(
                f"semantic has examples of {self.example_ED.shape[1]} dimensions and was given {vector_ND.shape[1]}; use one embedder"
            )
        cosine_NE = vector_ND @ self.example_ED.T if len(vector_ND) > 1 else (self.example_ED @ vector_ND[0])[None]
        similarity_NR = np.empty((len(vector_ND), len(self.names)))
        for route in range(len(self.names)):
            own_NE = cosine_NE[:, self.route_E == route]
            if self.config.aggregate == "max":
                similarity_NR[:, route] = own_NE.max(axis=1)
            else:
                similarity_NR[:, route] = top_k(own_NE, min(self.config.top_k, own_NE.shape[1]))[1].mean(axis=1)
        return similarity_NR

    def route(self, query: Query, pool: Pool) -> Decision:
        """Raises InputError without a vector, or before there are examples."""
        if query.vector_D is None:
            raise InputError("semantic needs the vector of a query; give the gateway an embedder")
        if not len(self.route_E):
            raise InputError(
                "semantic has no examples yet: write routes and connect an embedder, or fit it on recorded outcomes"
            )
        similarity_R = self.similarities(np.asarray(query.vector_D, np.float32)[None])[0]
        passing_R = np.where(similarity_R >= self.threshold_R, similarity_R, -np.inf)
        best = int(passing_R.argmax())
        found = bool(np.isfinite(passing_R[best]))
        models = self.models[best] if found else self.default
        nearest = int(similarity_R.argmax())
        reason = (
            f"like {self.names[best]!r}: {similarity_R[best]:.2f}"
            if found
            else f"unlike any route; nearest {self.names[nearest]!r}"
        )
        top = {self.names[at]: round(float(similarity_R[at]), 4) for at in np.argsort(-similarity_R, kind="stable")[:5]}
        return Decision(
            candidates=ordered(pool, listed(models, pool)),
            strategy=self.name,
            reason=reason,
            confidence=float(np.clip(similarity_R[best], 0, 1)) if found else None,
            details={"route": self.names[best] if found else None, "similarities": top},
            probability=1.0,
        )

    def state(self) -> tuple[Arrays, Facts]:
        """Examples, thresholds, routes."""
        arrays: Arrays = {"example_ED": self.example_ED, "route_E": self.route_E, "threshold_R": self.threshold_R}
        return arrays, {"names": self.names, "models": self.models, "default": self.default}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.example_ED, self.route_E, self.threshold_R = (
            arrays[name] for name in ("example_ED", "route_E", "threshold_R")
        )
        self.names, self.models, self.default = (
            list(facts["names"]),
            [list(one) for one in facts["models"]],
            list(facts["default"]),
        )


def listed(models: Sequence[str], pool: Pool) -> np.ndarray:
    """Scores that put the named models first, in their order, then the rest in the pool's; names that are not there are passed over."""
    first = [name for name in models if name in pool.names]
    return np.array(
        [-first.index(name) if name in first else -len(first) - at for at, name in enumerate(pool.names)], float
    )


def best_cut(similarity_N: np.ndarray, gain_N: np.ndarray, default: float) -> float:
    """Threshold t of largest sum of gains over similarities of at least t; the largest of those that do equally well, ``default``
    for no rows.

    Halfway between two similarities, so that no row lies on it; above 1 where every cut loses.
    """
    if not len(similarity_N):
        return default
    order = np.argsort(-similarity_N, kind="stable")
    sorted_N = similarity_N[order]
    # Of taking none, the most similar one, ...
    total_N = np.concatenate(([0.0], np.cumsum(gain_N[order])))
    may_cut_N = np.concatenate(([True], np.r_[sorted_N[1:] < sorted_N[:-1], True]))
    taken = int(np.argmax(np.where(may_cut_N, total_N, -np.inf)))
    if taken == 0:
        return 1.001
    if taken == len(sorted_N):
        return -1.0
    return float(0.5 * (sorted_N[taken - 1] + sorted_N[taken]))


def _labels(data: Recorded) -> list[str | None]:
    """The task of each row; where the data names none, the model that alone is best on it, None where several are."""
    if any(task is not None for task in data.task):
        return list(data.task)
    score_NM = np.where(np.isfinite(data.score_NM), data.score_NM, -np.inf)
    best_N1 = score_NM.max(axis=1, keepdims=True)
    alone_N = (score_NM == best_N1).sum(axis=1) == 1
    return [data.models[at] if alone else None for at, alone in zip(score_NM.argmax(1), alone_N, strict=True)]
