"""Best of N in the engine: answers to many prompts are drawn in batches until more of a prompt's do not pay, and the best is given.

All prompts that still want answers are continued together, so a step of the engine is as full as it can be, and the prefix cache reads
each prompt once. Rules and curve: `anabranch.test_time` (TTSPM, arXiv 2505.20522).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from anabranch.bounds import MOST_SEED
from anabranch.errors import InputError
from anabranch.serving.core.request import Sampling
from anabranch.test_time import Allowance, BudgetController, Sample, Sampled, majority
from anabranch.test_time.runners import choose, take, votes_of
from anabranch.test_time.selectors import Chosen

Select = Callable[[Sequence[Sample]], Chosen | None]

# Prompt's place among those asked for, and its new answers, to whether each is right; None where that cannot be told.
Verify = Callable[[int, Sequence[Sample]], Sequence[bool | None]]


class Generates(Protocol):
    """What `LLM` has of use here."""

    def generate(self, prompts: Sequence[Any], sampling: Any = None, **request: Any) -> Sequence[Any]:
        """See `LLM.generate`."""


def best_of(
    llm: Generates,
    prompts: Sequence[Any],
    rules: BudgetController,
    sampling: Sampling | None = None,
    *,
    select: Select = majority,
    same: Callable[[str], str] = str.strip,
    verify: Verify | None = None,
    **request: Any,
) -> list[Sampled]:
    """See `LLM.best_of`."""
    sampling = sampling or Sampling()
    if sampling.temperature == 0:
        raise InputError("temperature is 0, at which all answers to a prompt are the same; set it above 0")
    found = [Sampled(verified=None if verify is None else []) for _ in prompts]
    allowances = [rules.begin() for _ in prompts]
    while True:
        wanted = [(at, number) for at, allowance in enumerate(allowances) for number in _next(allowance)]
        if not wanted:
            break
        began = time.monotonic()
        drawn = llm.generate(
            [prompts[at] for at, _ in wanted], [_seeded(sampling, number) for _, number in wanted], **request
        )
        seconds = time.monotonic() - began
        for at in dict.fromkeys(at for at, _ in wanted):
            came = [_sample(one) for (place, _), one in zip(wanted, drawn, strict=True) if place == at]
            _tell(found[at], allowances[at], came, None if verify is None else verify(at, came), same, seconds)
    for one, allowance in zip(found, allowances, strict=True):
        one.reason = allowance.reason
        choose(one, select)
    return found


def _next(allowance: Allowance) -> range:
    """Numbers of the answers that are to be drawn."""
    count = allowance.next()
    return range(allowance.drawn, allowance.drawn + count)


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """Each answer by a seed of its own, whoever is beside it; the first by the one that was asked for."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % (MOST_SEED + 1))


def _sample(one: Any) -> Sample:
    told = one.output.logprobs
    logprob = sum(token.logprob for token in told) if told else None
    return Sample(text=one.text or " ".join(map(str, one.tokens)), logprob=logprob, tokens=len(one.tokens), body=one)


def _tell(
    found: Sampled,
    allowance: Allowance,
    came: Sequence[Sample],
    right: Sequence[bool | None] | None,
    same: Callable[[str], str],
    seconds: float,
) -> None:
    right = take(found, came, right)
    answers = [same(one.text) for one in votes_of(came, right)]
    allowance.told(len(came), verified=right, answers=[answer for answer in answers if answer], seconds=seconds)
