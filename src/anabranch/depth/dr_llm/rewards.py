"""Rewards of Dr.LLM's search: 1 where the model answers a question rightly on a path, 0 where not; or a user's own number.

A reward is anything that is called with a `Question` and a `PathRun` and gives a finite number, best from 0 to 1. `find_reward` knows the
ones below by name, and any other as ``module:name`` or ``file.py:name``. A file of paths
knows a reward by its attribute ``name``; one from a module or file without that, by the content of the file.
"""
# Shapes: B sequences, L positions, V vocabulary

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from anabranch.bounds import as_finite, shown
from anabranch.data import Tokenizer
from anabranch.depth.dr_llm.masked import takes_masks
from anabranch.depth.dr_llm.questions import Question
from anabranch.depth.dr_llm.runner import PathRun
from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.own_code import own_function
from anabranch.test_time.answers import WAYS, boxed, first_letter

__all__ = [
    "REWARDS",
    "ExactMatch",
    "NextToken",
    "OptionLikelihood",
    "OwnReward",
    "Reward",
    "boxed",
    "checked",
    "find_reward",
    "first_letter",
    "identity_of",
    "name_of",
]


class Named(Protocol):
    """A question as far as errors tell of it."""

    @property
    def id(self) -> str:
        """Its name."""


class Reward(Protocol):
    """How good the answer on a path is."""

    def __call__(self, question: Question, run: PathRun) -> float:
        """A finite number."""


class NextToken:
    """1 where the likeliest token after the prompt is the first of the answer: so many outcomes that luck is negligible."""

    name = "next-token"

    def __call__(self, question: Question, run: PathRun) -> float:
        """0 or 1."""
        logits_BLV = run.logits([question.prompt], last_only=True)
        return float(int(logits_BLV[0, -1].argmax()) == question.answer[0])


class OptionLikelihood:
    """1 where the right option is the likeliest of a question's.

    Args:
        share_prompt: all options in one sequence that has the prompt once; an option sees the prompt and itself. Otherwise each option is a
            sequence with a prompt of its own: the same scores, the prompt computed once per option. So it is done anyway where attention
            has windows.
        per_token: divide the log-likelihood of an option by its number of tokens.
    """

    def __init__(self, *, share_prompt: bool = True, per_token: bool = True) -> None:
        self.share_prompt, self.per_token = share_prompt, per_token
        self.name = "options" + ("" if share_prompt else "-apart") + ("" if per_token else "-sum")

    def __call__(self, question: Question, run: PathRun) -> float:
        """0 or 1. Raises DataError for a question without options."""
        if question.correct is None:
            raise DataError(
                f"question {question.id!r} has no options, which this reward compares; give options, or another reward"
            )
        return float(self.scores(question, run).argmax() == question.correct)

    def scores(self, question: Question, run: PathRun) -> Tensor:
        """Log-likelihood of each option in nats, float64."""
        shares = self.share_prompt and takes_masks(run.stack)
        found = self._in_one(question, run) if shares else self._apart(question, run)
        if self.per_token:
            found = [total / len(option) for total, option in zip(found, question.options, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def _in_one(self, question: Question, run: PathRun) -> list[float]:
        token_L, mask_LL, position_L, start_O = shared_prompt(question)
        device = run.stack.device
        logits_LV = run.logits(
            [token_L],
            attention_mask=mask_LL.unsqueeze(0).to(device),
            position_BL=position_L.unsqueeze(0).to(device),
        )[0]
        last = len(question.prompt) - 1
        found = []
        for option, start in zip(question.options, start_O, strict=True):
            # The first token of an option is foretold at the end of the prompt.
            places = [last, *range(start, start + len(option) - 1)]
            found.append(_log_likelihood(logits_LV[places], option))
        return found

    def _apart(self, question: Question, run: PathRun) -> list[float]:
        logits_BLV = run.logits([(*question.prompt, *option) for option in question.options])
        last = len(question.prompt) - 1
        return [
            _log_likelihood(logits_LV[last : last + len(option)], option)
            for logits_LV, option in zip(logits_BLV, question.options, strict=True)
        ]


def shared_prompt(question: Question) -> tuple[list[int], Tensor, Tensor, list[int]]:
    """(tokens, mask_LL True where a row sees a column, position_L, where each option starts) of a prompt and all options behind it.

    Options stand at the positions that follow the prompt, as if each were alone.
    """
    length, tokens = len(question.prompt), list(question.prompt)
    owner, position, starts = [-1] * length, list(range(length)), []
    for number, option in enumerate(question.options):
        starts.append(len(tokens))
        tokens += option
        owner += [number] * len(option)
        position += range(length, length + len(option))
    owner_L = torch.tensor(owner)
    causal_LL = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    mask_LL = causal_LL & ((owner_L[None] == -1) | (owner_L[None] == owner_L[:, None]))
    return tokens, mask_LL, torch.tensor(position), starts


def _log_likelihood(logits_LV: Tensor, tokens: Sequence[int]) -> float:
    log_p_LV = logits_LV.float().log_softmax(-1)
    place_L = torch.tensor(list(tokens), device=log_p_LV.device)
    return float(log_p_LV.gather(1, place_L.unsqueeze(1)).double().sum())


class ExactMatch:
    """1 where what is extracted of the greedy answer equals what is extracted of the right one.

    Args:
        tokenizer: of the model.
        max_tokens: of the answer (the paper: 10 for letters of a chat model, 2 of a base model, 15 for mathematics).
        extract: text -> what is compared; None for no answer, which is never right. Default: the text without blanks around it.
        name: of the reward, in files.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 10,
        extract: Callable[[str], str | None] = str.strip,
        name: str = "exact",
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        self._tokenizer, self._max_tokens, self._extract = tokenizer, max_tokens, extract
        self.name = f"{name}-{max_tokens}"

    def __call__(self, question: Question, run: PathRun) -> float:
        """0 or 1. Raises DataError where nothing can be extracted of the right answer."""
        right = self._extract(question.answer_text)
        if right is None:
            raise DataError(
                f"question {question.id!r}: nothing can be extracted of its answer {question.answer_text[:80]!r}"
            )
        said = run.generate(question.prompt, self._max_tokens, self._tokenizer.stop_ids)
        return float(self._extract(self._tokenizer.decode(said)) == right)


REWARDS = ("next-token", "options", *WAYS)


def find_reward(name: str, tokenizer: Tokenizer, *, max_tokens: int | None = None) -> Reward:
    """The reward of a name; or of ``module:name`` or ``file.py:name``, which is called with question and run.

    Args:
        name: one of `REWARDS`, or where a reward of one's own is.
        tokenizer: of the model, for those that compare text.
        max_tokens: of an answer in text; None for 10, with ``boxed`` 15.

    Raises ConfigError for a name that there is not, or something that cannot be called.
    """
    if name == "next-token":
        return NextToken()
    if name == "options":
        return OptionLikelihood()
    if name in WAYS:
        return ExactMatch(
            tokenizer, max_tokens=max_tokens or (15 if name == "boxed" else 10), extract=WAYS[name], name=name
        )
    if ":" not in name:
        raise ConfigError(
            f"there is no reward {name!r}; use {', '.join(REWARDS)}, or your own as module:name or file.py:name"
        )
    found, version = own_function(name, what="reward", called_with="a question and a run")
    return OwnReward(name, found, version=version)


class OwnReward:
    """A function of a user's, whose errors say that they are its own.

    Args:
        name: where it is from.
        function: (question, run) -> number.
        version: another whenever it changes; empty where ``name`` says it already.
    """

    def __init__(self, name: str, function: Reward, *, version: str = "") -> None:
        self.name, self.version, self._function = name, version, function

    def __call__(self, question: Question, run: PathRun) -> float:
        """What the function gives. Raises DataError for what it raises, unless that is an error of anabranch's."""
        try:
            return self._function(question, run)
        except AnabranchError:
            raise
        except Exception as error:
            raise DataError(
                f"reward {self.name!r} fails on question {question.id!r}: {type(error).__name__}: {error}"
            ) from error


def name_of(reward: Reward) -> str:
    """What a file says of a reward."""
    told = getattr(reward, "name", None) or getattr(reward, "__qualname__", None) or type(reward).__qualname__
    return str(told)


def identity_of(reward: Reward) -> str:
    """What tells a reward from another, so that a file of paths holds none of both: its ``name``, and its ``version`` where it has one.

    Raises ConfigError for one without a name: a function is called the same after it has been changed.
    """
    told = getattr(reward, "name", None)
    if not isinstance(told, str) or not told:
        raise ConfigError(
            f"reward {name_of(reward)!r} has no attribute name, by which a file of paths knows it; set one, and another whenever it changes"
        )
    version = getattr(reward, "version", "")
    return f"{told} {version}" if version else told


def checked(value: object, question: Named) -> float:
    """A reward as a finite float: a number, True or False, of Python, numpy or torch. Raises DataError for anything else."""
    if isinstance(value, Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    found = as_finite(int(value) if isinstance(value, bool) else value)
    if found is None:
        raise DataError(f"the reward of question {question.id!r} is {shown(value)}; it must be a finite number")
    return found
