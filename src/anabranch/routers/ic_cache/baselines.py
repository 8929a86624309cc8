"""What IC-Cache is measured against, behind the same faces: other ways to select, to route, and to reuse answers.

selectors    `NoExamples`, `RandomExamples`, `TopSimilar`
routers      `Always` (small or large), `StaticThreshold` (a classifier of "the small one will do", RouteLLM's way)
reuse        `SemanticCache`: the nearest stored answer above a threshold (GPTCache's rule)
"""
# Shapes: N requests, D dimensions

from typing import Any

import numpy as np

from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.selector import Chosen, Selection, estimate_tokens
from anabranch.routers.logistic import fit_logistic, sigmoid


def _shown(examples: list[Any], similarity: Any, reason: str) -> Selection:
    return Selection(
        chosen=tuple(
            Chosen(
                example=example,
                similarity=float(cosine),
                utility=float(cosine),
                reason=reason,
                tokens=estimate_tokens(example.request) + estimate_tokens(example.response),
            )
            for example, cosine in zip(examples, similarity, strict=True)
        )
    )


class NoExamples:
    """Nothing is shown."""

    def select(self, query: Query, vector_D: np.ndarray, *, now_s: float) -> Selection:
        """Empty."""
        return Selection()


class RandomExamples:
    """Any examples the query may see.

    Args:
        pool: examples.
        count: shown.
        seed: of the draws.
    """

    def __init__(self, pool: ExamplePool, count: int = 5, *, seed: int = 0) -> None:
        self.pool, self.count, self._random = pool, count, np.random.default_rng(seed)

    def select(self, query: Query, vector_D: np.ndarray, *, now_s: float) -> Selection:
        """Drawn alike among those of the tenant and domain."""
        examples, similarity_K = self.pool.search(query, vector_D, max(len(self.pool), 1), now_s=now_s)
        at = self._random.permutation(len(examples))[: self.count]
        return _shown([examples[place] for place in at], similarity_K[at], "drawn at random")


class TopSimilar:
    """The most similar ones, the nearest last.

    Args:
        pool: examples.
        count: shown.
    """

    def __init__(self, pool: ExamplePool, count: int = 5) -> None:
        self.pool, self.count = pool, count

    def select(self, query: Query, vector_D: np.ndarray, *, now_s: float) -> Selection:
        """By cosine alone."""
        examples, similarity_K = self.pool.search(query, vector_D, self.count, now_s=now_s)
        return _shown(examples[::-1], similarity_K[::-1], "among the most similar")


class SemanticCache:
    """The answer of the nearest request, where it is near enough: nobody is asked.

    Args:
        pool: requests with answers.
        threshold: least cosine.
    """

    def __init__(self, pool: ExamplePool, threshold: float = 0.8) -> None:
        self.pool, self.threshold = pool, threshold

    def lookup(self, query: Query, vector_D: np.ndarray, *, now_s: float) -> tuple[str | None, float]:
        """The stored answer, None for a miss; and the cosine of the nearest, -1 if there is none."""
        examples, similarity_K = self.pool.search(query, vector_D, 1, now_s=now_s)
        if not examples:
            return None, -1.0
        hit = float(similarity_K[0]) >= self.threshold
        return examples[0].response if hit else None, float(similarity_K[0])


class Always:
    """One arm for all.

    Args:
        arm: its name.
    """

    def __init__(self, arm: str) -> None:
        self.arm = arm

    def choose(self, x_D: np.ndarray, load: float = 0.0) -> str:
        """It."""
        return self.arm


class StaticThreshold:
    """Logistic regression of "the small arm's answer will do" on the request, and a threshold that never moves. It does not see load.

    Args:
        small: arm that is asked where it will do.
        large: arm that is asked otherwise.
        threshold: least probability.
        penalty: ridge on the weights.
    """

    def __init__(self, small: str, large: str, *, threshold: float = 0.5, penalty: float = 1.0) -> None:
        self.small, self.large, self.threshold, self.penalty = small, large, threshold, penalty
        self.weight_D1 = np.zeros(1)

    def fit(self, x_ND: np.ndarray, will_do_N: np.ndarray) -> "StaticThreshold":
        """Learn from requests and whether the small arm's answer did, 0 to 1. Newton's method."""
        x_N1 = np.hstack([np.asarray(x_ND, np.float64), np.ones((len(x_ND), 1))])
        self.weight_D1 = fit_logistic(x_N1, np.asarray(will_do_N, np.float64), penalty=self.penalty)
        return self

    def probability(self, x_D: np.ndarray) -> float:
        """That the small arm will do."""
        return float(sigmoid(np.append(x_D, 1.0) @ self.weight_D1))

    def choose(self, x_D: np.ndarray, load: float = 0.0) -> str:
        """By the threshold."""
        return self.small if self.probability(x_D) >= self.threshold else self.large
