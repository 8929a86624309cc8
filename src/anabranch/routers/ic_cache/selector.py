"""Which examples go before a request: similar (stage 1), then useful (stage 2), different from each other, the best one last.

stage 1    the ``candidates`` most similar of the pool
stage 2    h >= tau                                               the proxy's utility, `proxy`, and the threshold, `threshold`
order      greedily the largest  mmr h_i - (1 - mmr) max_j cos(i, j)  over those taken so far, while they fit ``max_example_tokens``
show       in rising utility, so that the best lies next to the question
"""
# Shapes: K candidates, D dimensions

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache.example import Example
from anabranch.routers.ic_cache.features import Pairs, pairs
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.proxy import Proxy

CountTokens = Callable[[str], int]


def estimate_tokens(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand: a quarter of its bytes, rounded up."""
    # What is ASCII has as many bytes as characters, and knows it.
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return -(-size // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An example that goes before a request.

    Attributes:
        example: it.
        similarity: cosine with the request.
        utility: h, 0 to 1.
        tokens: it adds to the prompt.
        reason: one sentence for people.
    """

    example: Example
    similarity: float
    utility: float
    tokens: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What was selected, in the order in which it is shown, the best last.

    Attributes:
        chosen: at most ``max_examples``.
        tau: that was asked for.
        is_trial: tau was drawn, to learn which is best.
        rejected: how many candidates fell by each reason.
        took_s: seconds.
        pairs: features and texts of the chosen ones, in order, to learn from.
    """

    chosen: tuple[Chosen, ...] = ()
    tau: float = 0.0
    is_trial: bool = False
    rejected: Mapping[str, int] = field(default_factory=dict)
    took_s: float = 0.0
    pairs: Pairs | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the examples."""
        return tuple(item.example.id for item in self.chosen)

    @property
    def tokens(self) -> int:
        """That they add to the prompt."""
        return sum(item.tokens for item in self.chosen)


class Selector(Part):
    """See the module.

    Args:
        config: how many and which.
        pool: examples.
        proxy: utilities.
        count_tokens: of a text.
    """

    @configclass
    class Config(BaseConfig):
        """How many and which.

        Attributes:
            candidates: of stage 1.
            max_examples: shown; 0 for none.
            max_example_tokens: of all that are shown together.
            min_similarity: candidates below are passed over.
            mmr: weight of utility against being different from what is taken.
        """

        candidates: int = Field(default=50, ge=1)
        max_examples: int = Field(default=5, ge=0)
        max_example_tokens: int = Field(default=1024, ge=0)
        min_similarity: float = Field(default=0.0, ge=-1, le=1)
        mmr: float = Field(default=0.7, ge=0, le=1)

    def __init__(
        self, config: Any, pool: ExamplePool, proxy: Proxy, *, count_tokens: CountTokens = estimate_tokens
    ) -> None:
        self.config, self.pool, self.proxy, self.count_tokens = config, pool, proxy, count_tokens

    def select(
        self, query: Query, vector_D: np.ndarray, model: str, *, tau: float, now_s: float, is_trial: bool = False
    ) -> Selection:
        """Examples for a request.

        Args:
            query: the request.
            vector_D: its unit vector.
            model: that would see them.
            tau: least utility.
            now_s: the time.
            is_trial: passed on.
        """
        started = time.perf_counter()
        if not self.config.max_examples or not len(self.pool):
            return Selection(tau=tau, is_trial=is_trial, took_s=time.perf_counter() - started)
        examples, similarity_K = self.pool.search(query, vector_D, self.config.candidates, now_s=now_s)
        near = int((similarity_K >= self.config.min_similarity).sum())
        found = pairs(query.text, examples[:near], similarity_K[:near], model)
        utility_K = np.nan_to_num(self.proxy.score(found), nan=-1.0) if near else np.zeros(0)
        rejected = Counter({"not similar": len(examples) - near, "not useful": int((utility_K < tau).sum())})
        useful = np.flatnonzero(utility_K >= tau)
        tokens_K = {int(at): self._tokens(examples[at]) for at in useful}
        picked = self._diverse(useful, utility_K, examples, tokens_K, rejected)
        picked.sort(key=lambda at: (utility_K[at], similarity_K[at], -at))
        chosen = tuple(
            Chosen(
                example=examples[at],
                similarity=float(similarity_K[at]),
                utility=float(utility_K[at]),
                tokens=tokens_K[at],
                reason=f"similarity {similarity_K[at]:.2f}, expected use {utility_K[at]:.2f} of at least {tau:.2f}",
            )
            for at in picked
        )
        kept = Pairs(found.feature_KF[picked], [found.texts[at] for at in picked])
        return Selection(
            chosen=chosen,
            tau=tau,
            is_trial=is_trial,
            rejected={name: count for name, count in rejected.items() if count},
            took_s=time.perf_counter() - started,
            pairs=kept,
        )

    def _tokens(self, example: Example) -> int:
        return self.count_tokens(example.request) + self.count_tokens(example.response)

    def _diverse(
        self,
        useful: np.ndarray,
        utility_K: np.ndarray,
        examples: list[Example],
        tokens_K: dict[int, int],
        rejected: Counter[str],
    ) -> list[int]:
        """Greedy maximal marginal relevance under the budget of tokens."""
        if not len(useful):
            return []
        vector_UD = self.pool.index.vectors([examples[at].id for at in useful])
        places = pick_diverse(
            utility_K[useful],
            vector_UD,
            [tokens_K[int(at)] for at in useful],
            mmr=self.config.mmr,
            most=self.config.max_examples,
            budget=self.config.max_example_tokens,
        )
        spare = self.config.max_example_tokens - sum(tokens_K[int(useful[place])] for place in places)
        left = [at for place, at in enumerate(useful) if place not in places]
        rejected["too long"] += sum(tokens_K[int(at)] > spare for at in left)
        rejected["others are better"] += sum(tokens_K[int(at)] <= spare for at in left)
        return [int(useful[place]) for place in places]


def pick_diverse(
    utility_K: np.ndarray,
    vector_KD: np.ndarray,
    tokens_K: list[int],
    *,
    mmr: float,
    most: int,
    budget: float = math.inf,
) -> list[int]:
    """Rows in the order in which they are taken: largest ``mmr * utility - (1 - mmr) * nearest taken`` that fits, ties by row."""
    nearest_K = np.zeros(len(utility_K))
    is_open_K = np.ones(len(utility_K), bool)
    taken: list[int] = []
    while len(taken) < most:
        is_open_K &= np.asarray(tokens_K) <= budget
        if not is_open_K.any():
            break
        at = int(np.argmax(np.where(is_open_K, mmr * utility_K - (1 - mmr) * nearest_K, -np.inf)))
        similarity_K = vector_KD @ vector_KD[at]
        nearest_K = np.maximum(nearest_K, similarity_K) if taken else similarity_K
        is_open_K[at] = False
        budget -= tokens_K[at]
        taken.append(at)
    return taken
