"""Escalate when several samples of a cheap model disagree.

    confidence = share of m samples whose final answer is the commonest one          accept if at least the threshold

Source: Yue et al. 2023 (arXiv 2310.03094, "Large Language Model Cascades with Mixture of Thought Representations", section 3,
vote-based decision), after self-consistency (Wang et al. 2022, arXiv 2203.11171). m calls of the cheap model are paid for each
query, and the answer that is given is one of the commonest; the last model of the chain is asked once.

Recorded data must carry the signal ``agreement`` (`Recorded.signals`); live, it is a `Program`, which draws its samples itself: one as
the sender asked for it, the others at ``temperature``.
"""
# Shapes: N queries, M models, m samples

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import AnabranchError, DataError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.program import Answered, Ask, ProgramRequest, Step
from anabranch.routers.strategies.chained import Chained, Draft
from anabranch.routers.wording import answer_form

# What is between the mark and what it announces is never given back: shared out anew in every way, white space took time cubic in it.
_MARKED = re.compile(
    r"(?:####|final answer(?: is)?+|answer(?: is)?+)\s*+[:=]?+\s*+\**+\s*+([^\n]{1,200})", re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\{([^{}]{1,200})\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# Characters of an answer without reasoning.
SHORT = 40
_CHOICE = re.compile(r"^\W*([A-J])\b(?:[).:]|\s*$)")


class Consistency(Chained, kind="consistency"):
    """A chain whose answers are given when samples agree."""

    @configclass
    class Config(Chained.Config):
        """Sampling.

        Attributes:
            samples: m, the one that is drawn as the sender asked among them.
            temperature: of the others.
            max_tokens: of the others, where the sender names no end.
        """

        threshold: float = Field(default=0.6, ge=0)
        samples: int = Field(default=3, ge=2)
        temperature: float = Field(default=0.7, gt=0)
        max_tokens: int = Field(default=1024, ge=1)

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

    # -- answering

    async def draft(self, request: ProgramRequest, model: str, earlier: Sequence[Draft], ask: Ask) -> Draft:
        """m samples; one of the commonest, if those are enough. A draw that fails counts as one that disagrees."""
        drawn_m = await self._draw(request, model, ask)
        share, best = commonest(drawn_m)
        is_given = best is not None and await self.will_do(request, model, share, earlier)
        facts = {
            "model": model,
            "samples": len(drawn_m),
            "came": sum(one is not None for one in drawn_m),
            "agreement": round(share, 4),
            **self.bar(request, model),
            "is_given": is_given,
        }
        return Draft(
            model, None if best is None else self.given(request, best), is_given, Step("sampled", facts), share
        )

    async def _draw(self, request: ProgramRequest, model: str, ask: Ask) -> list[Answered | None]:
        """m answers of a model, all at once; None for each that did not come."""
        has_end = any(request.settings.get(name) for name in ("max_tokens", "max_completion_tokens"))
        seed, most = request.settings.get("seed"), None if has_end else self.config.max_tokens

        async def one(number: int) -> Answered | None:
            how: dict[str, Any] = {}
            if number:
                how = {"temperature": self.config.temperature, "max_tokens": most}
                # The same seed would draw the same answer.
                how |= {"seed": seed + number} if isinstance(seed, int) else {}
            try:
                return await ask(request.arm(model), request.messages, purpose="draft", **how)
            except AnabranchError:
                return None

        return list(await asyncio.gather(*(one(number) for number in range(self.config.samples))))


def commonest(drawn_m: Sequence[Answered | None]) -> tuple[float, Answered | None]:
    """The share of samples whose final answer is the commonest one, and the first of them; of equally common ones the earlier.

    What did not come, or says nothing in words (tool calls), agrees with nothing.
    """
    finals = [final_answer(one.text) if one is not None else "" for one in drawn_m]
    said = [final for final in finals if final]
    if not said:
        return 0.0, next((one for one in drawn_m if one is not None), None)
    best = max(dict.fromkeys(said), key=said.count)
    return said.count(best) / len(finals), drawn_m[finals.index(best)]


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
