"""FrugalGPT: ask cheap models first, and let a learned scorer say whether the answer will do.

    g(q, a) = expected score of answer a to query q                   accept if g(q, a_j) >= t_j

Source: Chen, Zaharia and Zou 2023, FrugalGPT (arXiv 2305.05176, section 3, strategy 3): the scorer is learned per model on
recorded answers, chains are at most three long, thresholds come from the constrained search in `escalate`. The paper's scorer is a
DistilBERT; here it is a ridge regression on

    the query's vector,  hashed words of the answer,  length, digits, code, refusals and hedges in it,  and recorded signals (mean
    log-probability, ...)

whichever there are. Without recorded answers it is the expected score of the model on the query, and the cascade a pre-generation
router that hedges. Thresholds are chosen on leave-one-out predictions, since a scorer is too sure of what it has seen.
"""
# Shapes: N queries, M models, C features, V dimensions of a vector

import asyncio
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.program import Answered, Ask, ProgramRequest
from anabranch.routers.contract.query import Decision, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.strategies.chained import Chained
from anabranch.routers.strategies.ridge import ridge_left_out

# Characters of an answer.
LOOKED_AT = 20_000
ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_WORD = re.compile(r"\w+")
_REFUSES = re.compile(
    r"\b(?:i can(?:no|')t|i am unable|i'm unable|i'm sorry|as an ai|i do not have|i don't have|cannot (?:help|assist|provide))\b",
    re.I,
)
_HEDGES = re.compile(
    r"\b(?:maybe|perhaps|not sure|unclear|it depends|might|possibly|i think|i believe|approximately|unknown)\b", re.I
)
NUM_CUES = 6


class Cascade(Chained, kind="cascade"):
    """Ordered models, a learned scorer of answers, thresholds under a budget."""

    @configclass
    class Config(Chained.Config):
        """The scorer.

        Attributes:
            uses_vector: of the query.
            buckets: that words of an answer are hashed into; 0 to leave them out.
        """

        max_length: int = Field(default=3, ge=1, le=3)
        uses_vector: bool = True
        buckets: int = Field(default=128, ge=0)

    needs_fit = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.models: tuple[str, ...] = ()
        self.beta_MC, self.offset_M = np.zeros((0, 0)), np.zeros(0)
        self.dim, self.reads_text = 0, False
        self.signals: list[str] = []
        self.signal_scale_S2 = np.zeros((0, 2))

    @property
    def needs_vector(self) -> bool:  # type: ignore[override]
        """Where it uses one."""
        return self.config.uses_vector

    @property
    def learned_dim(self) -> int | None:
        """See `Strategy`."""
        return self.dim or None

    def route(self, query: Query, pool: Pool) -> Decision:
        """The chain. Raises InputError before ``fit``, or without a vector like those it learned from."""
        if self.frontier and self.dim and (query.vector_D is None or len(query.vector_D) != self.dim):
            given = "none" if query.vector_D is None else f"{len(query.vector_D)}"
            raise InputError(
                f"cascade judges answers with vectors of {self.dim} dimensions and was given {given}; use its embedder"
            )
        return super().route(query, pool)

    def learn(self, data: Recorded, *, seed: int) -> np.ndarray:
        """A scorer per model on the rows whose score is known."""
        self.models = data.models
        self.dim = data.vector_ND.shape[1] if self.config.uses_vector and data.vector_ND is not None else 0
        self.reads_text = bool(data.answers)
        self.signals = sorted(data.signals)
        known = [data.signals[name][np.isfinite(data.signals[name])] for name in self.signals]
        self.signal_scale_S2 = np.array(
            [[one.mean(), one.std() or 1.0] if len(one) else [0.0, 1.0] for one in known]
        ).reshape(-1, 2)
        left_out_NM = np.full(data.score_NM.shape, np.nan)
        self.beta_MC = np.zeros((len(self.models), self._width()))
        self.offset_M = np.full(len(self.models), np.nan)
        for model in range(len(self.models)):
            rows = np.flatnonzero(np.isfinite(data.score_NM[:, model]))
            if len(rows):
                found = ridge_left_out(self._features(data, model)[rows], data.score_NM[rows, model], ALPHAS)
                self.beta_MC[model], self.offset_M[model], left_out_NM[rows, model] = found
        return left_out_NM

    def confidences(self, data: Recorded) -> np.ndarray:
        """g of every recorded answer. Raises InputError for vectors of another length, or none."""
        confidence_NM = np.full(data.score_NM.shape, np.nan)
        for column, name in enumerate(data.models):
            if name in self.models:
                model = self.models.index(name)
                confidence_NM[:, column] = self._features(data, column) @ self.beta_MC[model] + self.offset_M[model]
        return confidence_NM

    def confidence(self, query: Query, model: str, answer: str, details: Mapping[str, Any]) -> float:
        """g of a live answer."""
        if model not in self.models:
            return float("nan")
        signals = {name: np.full((1, 1), float(details.get(name, np.nan))) for name in self.signals}
        vector_1V = None if query.vector_D is None else np.asarray(query.vector_D, np.float32)[None]
        one = Recorded(
            query=(query.text,),
            models=(model,),
            score_NM=np.full((1, 1), np.nan),
            vector_ND=vector_1V,
            signals=signals,
            answers=({model: answer},),
        )
        return float(self.confidences(one)[0, 0])

    # -- answering

    step_name = "scored"

    async def examine(self, request: ProgramRequest, model: str, found: Answered, ask: Ask) -> tuple[float, Facts]:
        """g of the draft: its words are looked at in a thread, for there may be many."""
        return await asyncio.to_thread(self.confidence, request.query, model, found.text, {}), {}

    # -- the scorer

    def _width(self) -> int:
        return self.dim + (self.config.buckets + NUM_CUES if self.reads_text else 0) + len(self.signals)

    def _features(self, data: Recorded, model: int) -> np.ndarray:
        """Of the answers of one model, float64 ``[N, C]``."""
        parts = []
        if self.dim:
            if data.vector_ND is None or data.vector_ND.shape[1] != self.dim:
                given = "none" if data.vector_ND is None else data.vector_ND.shape[1]
                raise InputError(f"cascade learned from vectors of {self.dim} dimensions and was given {given}")
            parts.append(np.asarray(data.vector_ND, float))
        if self.reads_text:
            answers = [one.get(data.models[model], "") for one in data.answers] or [""] * len(data)
            parts += [
                np.stack([answer_cues(text) for text in answers]),
                np.stack([hashed_words(text, self.config.buckets) for text in answers]),
            ]
        for name, (mean, scale) in zip(self.signals, self.signal_scale_S2, strict=True):
            value_NM = data.signals.get(name)
            value_N = np.full(len(data), np.nan) if value_NM is None else value_NM[:, model]
            parts.append(np.nan_to_num((value_N - mean) / scale)[:, None])
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(data), 0))

    def state(self) -> tuple[Arrays, Facts]:
        """Frontier and scorers."""
        arrays = {"beta_MC": self.beta_MC, "offset_M": self.offset_M, "signal_scale_S2": self.signal_scale_S2}
        facts = {"models": list(self.models), "dim": self.dim, "reads_text": self.reads_text, "signals": self.signals}
        return arrays, {**super().state()[1], **facts}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        super().load_state(arrays, facts)
        self.beta_MC, self.offset_M, self.signal_scale_S2 = (
            arrays[name] for name in ("beta_MC", "offset_M", "signal_scale_S2")
        )
        self.models, self.dim, self.reads_text = tuple(facts["models"]), int(facts["dim"]), bool(facts["reads_text"])
        self.signals = list(facts["signals"])


def answer_cues(text: str) -> np.ndarray:
    """Signs of how an answer went, each of about size 1: emptiness, length, digits, code, refusal, hedges."""
    text = text[:LOOKED_AT]
    digits = sum(character.isdigit() for character in text)
    return np.array(
        [
            float(not text.strip()),
            np.log1p(len(text)) / 8,
            np.log1p(digits) / 4,
            float("```" in text),
            float(_REFUSES.search(text) is not None),
            min(3, len(_HEDGES.findall(text))) / 3,
        ]
    )


def hashed_words(text: str, buckets: int) -> np.ndarray:
    """Signed counts of words in buckets, of length 1; zeros for no words."""
    count = np.zeros(buckets)
    if buckets:
        for word in _WORD.findall(text[:LOOKED_AT].casefold()):
            hashed = zlib.crc32(word.encode())
            count[(hashed >> 1) % buckets] += 1 if hashed & 1 else -1
    length = np.sqrt(count @ count)
    return count / length if length else count
