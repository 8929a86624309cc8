"""Escalate when several samples of a cheap model disagree.

    confidence = share of m samples whose final answer is the commonest one          accept if at least the threshold

Source: Yue et al. 2023 (arXiv 2310.03094, "Large Language Model Cascades with Mixture of Thought Representations", section 3,
vote-based decision), after self-consistency (Wang et al. 2022, arXiv 2203.11171). m calls of the cheap model are paid for each
query; the last model of the chain is asked once.

Recorded data must carry the signal ``agreement`` (`Recorded.signals`); live, samples come with the answer
(``details["samples"]``), or further ones are drawn from the same model through the gateway.
"""
# Shapes: N queries, M models

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import AnabranchError, DataError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Complete, Embed
from anabranch.routers.strategies.escalate import Escalating
from anabranch.routers.wording import answer_form

_MARKED = re.compile(r"(?:####|final answer(?: is)?|answer(?: is)?)\s*[:=]?\s*\**\s*([^\n]{1,200})", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]{1,200})\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# Characters of an answer without reasoning.
SHORT = 40
_CHOICE = re.compile(r"^\W*([A-J])\b(?:[).:]|\s*$)")


class Consistency(Escalating, kind="consistency"):
    """A chain whose answers are given when samples agree."""

    @configclass
    class Config(Escalating.Config):
        """Sampling.

        Attributes:
            samples: m, the answer itself among them.
            temperature: of the further ones.
            max_tokens: of the further ones.
        """

        threshold: float = Field(default=0.6, ge=0)
        samples: int = Field(default=3, ge=2)
        temperature: float = Field(default=0.7, gt=0)
        max_tokens: int = Field(default=1024, ge=1)

    is_async = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.complete: Complete | None = None

    def connect(self, *, embed: Embed | None = None, complete: Complete | None = None) -> None:
        """Take the models to draw samples from."""
        self.complete = complete or self.complete

    def calls_for(self, is_last: bool) -> float:
        """m calls of every model but the last."""
        return 1.0 if is_last else float(self.config.samples)

    def confidences(self, data: Recorded) -> np.ndarray:
        """The recorded agreement."""
        if "agreement" not in data.signals:
            raise DataError(
                f"consistency needs the signal 'agreement' of recorded answers; the data have {sorted(data.signals) or 'none'}"
            )
        return data.signals["agreement"]

    def confidence(self, query: Query, model: str, answer: str, details: Mapping[str, Any]) -> float:
        """Agreement of the samples in ``details``; NaN if there are none."""
        if "samples" in details:
            return agreement([answer, *details["samples"]])
        return float(details.get("agreement", np.nan))

    async def aaccept(self, query: Query, model: str, answer: str, details: Mapping[str, Any]) -> bool:
        """Draw what samples are missing, all at once, then `accept`. A draw that fails counts as one that disagrees."""
        is_known = "samples" in details or "agreement" in details
        if is_known or self.threshold_of(model) is None or self.complete is None:
            return self.accept(query, model, answer, details)
        drawn = await asyncio.gather(*(self._sample(model, query.text) for _ in range(self.config.samples - 1)))
        return self.accept(query, model, answer, {**details, "samples": drawn})

    async def _sample(self, model: str, text: str) -> str:
        assert self.complete is not None
        try:
            return await self.complete(
                model, text, max_tokens=self.config.max_tokens, temperature=self.config.temperature
            )
        except AnabranchError:
            return ""


def agreement(answers: Sequence[str]) -> float:
    """Share of answers that come to the same as the first, which is the one that would be given; 0 if that is empty, NaN for no answers."""
    if not answers:
        return float("nan")
    finals = [final_answer(answer) for answer in answers]
    return finals.count(finals[0]) / len(finals) if finals[0] else 0.0


def final_answer(text: str) -> str:
    """What an answer comes to: what is boxed or announced, a choice letter, the last number of a long text, else its words."""
    marked = _BOXED.findall(text) or _MARKED.findall(text)
    last = (marked[-1] if marked else text).strip()
    choice = _CHOICE.match(last)
    if choice:
        return choice[1]
    numbers = _NUMBER.findall(last)
    if numbers and (marked or len(last) > SHORT or numbers[0] == last):
        return _plain(numbers[-1])
    return answer_form(last)


def _plain(number: str) -> str:
    """1,200.0 as 1200."""
    value = number.replace(",", "")
    return value.rstrip("0").rstrip(".") if "." in value else value
