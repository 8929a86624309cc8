"""What N samples, or N rounds, cost: samples share the prompt, rounds read all that was said before.

    parallel     prompt + N answer                            the prompt is read once, and kept for all
    sequential   sum over rounds of prompt + (t - 1)(answer + feedback) + answer          which grows with N squared

With a prefix cache a round reads again only what came since the last, and the rest at the price of cached tokens. Numbers of tokens are an
engine's ``usage`` (prompt, cached and completion tokens); prices are for one token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anabranch.bounds import finite, whole
from anabranch.errors import InputError
from anabranch.test_time.curves import TTSPM

CostModel = Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What an engine counts.

    Attributes:
        prompt: read, those that were kept among them.
        cached: of those, kept from before.
        completion: written.
    """

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True, kw_only=True)
class ParallelCost:
    """N answers to one prompt.

    Attributes:
        prompt: tokens.
        answer: tokens of each.
        read, cached, write: price of a token that is read, that is kept and read again, that is written. Equal prices count tokens.
        block: tokens that the cache keeps together: of a prompt only whole blocks are kept, and its last token is read again
            in any case, since what comes next is computed from it. 0 where each prompt is counted once for all N (``n`` of one request).
    """

    prompt: int
    answer: float
    read: float = 1.0
    cached: float = 0.0
    write: float = 1.0
    block: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def tokens(self, n: int) -> TokenCounts:
        """Of n samples."""
        n = whole("n", n, 0)
        if not self.block:
            return TokenCounts(prompt=self.prompt if n else 0, cached=0, completion=round(n * self.answer))
        kept = _kept(self.prompt, self.prompt, self.block)
        return TokenCounts(prompt=n * self.prompt, cached=max(0, n - 1) * kept, completion=round(n * self.answer))

    def __call__(self, n: int) -> float:
        """Price of n samples."""
        return _cost(self, n)


@dataclass(frozen=True, kw_only=True)
class SequentialCost:
    """N rounds, each of which reads all before.

    Attributes:
        prompt, answer, read, cached, write: see `ParallelCost`.
        feedback: tokens that are said to a draft before the next round.
        block: see `ParallelCost`; 0 where nothing is kept.
    """

    prompt: int
    answer: int
    feedback: int = 0
    read: float = 1.0
    cached: float = 0.0
    write: float = 1.0
    block: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def tokens(self, n: int) -> TokenCounts:
        """Of n rounds."""
        n = whole("n", n, 0)
        step = self.answer + self.feedback
        read = [self.prompt + at * step for at in range(n)]
        # A round finds what the one before read and wrote; of its last token no keys were computed.
        kept = [
            _kept(read[at - 1] + self.answer - 1, read[at], self.block) if at and self.block else 0 for at in range(n)
        ]
        return TokenCounts(prompt=sum(read), cached=sum(kept), completion=n * self.answer)

    def __call__(self, n: int) -> float:
        """Price of n rounds."""
        return _cost(self, n)


def _cost(model: ParallelCost | SequentialCost, n: int) -> float:
    told = model.tokens(n)
    return model.read * (told.prompt - told.cached) + model.cached * told.cached + model.write * told.completion


def _kept(there: int, wanted: int, block: int) -> int:
    """Tokens of a prompt that are found: whole blocks, and not its last token."""
    return max(0, min(there, wanted - 1)) // block * block


def _check(model: ParallelCost | SequentialCost) -> None:
    for name, value in vars(model).items():
        finite(name, value, 0.0, 1e15)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """So many chains side by side, each so many rounds deep.

    Attributes:
        chains, depth: none at all where no sample pays.
        solved: share of questions that it solves.
        cost: of all of it.
        worth: v times ``solved`` less ``cost``.
    """

    chains: int
    depth: int
    solved: float
    cost: float
    worth: float


def best_mix(
    parallel: TTSPM,
    sequential: TTSPM,
    cost: Callable[[int, int], float],
    v: float,
    *,
    most: int = 64,
) -> Mix:
    """The chains and rounds that are worth most, of all with at most ``most`` answers.

    A chain's first answer is right with the p of ``parallel``, and each round puts a wrong one right with that of ``sequential``;
    chains are independent, below the ceiling of ``parallel``.

    Args:
        parallel, sequential: fitted, with numbers as parameters.
        cost: of (chains, depth).
        v: worth of a solved question, in the same money.
        most: answers in all.

    Raises InputError.
    """
    v, most = finite("v", v, 0.0, 1e300), whole("most", most, 1, 4096)
    p, again = float(parallel.p), float(sequential.p)
    if parallel.kind == sequential.kind:
        raise InputError(f"both curves are {parallel.kind}; one must be parallel and the other sequential")
    best = Mix(chains=0, depth=0, solved=0.0, cost=0.0, worth=0.0)
    for depth in range(1, most + 1):
        left = (1 - p) * (1 - again) ** (depth - 1)
        for chains in range(1, most // depth + 1):
            solved = (
                float(parallel.f_max) * -float(np.expm1(chains * np.log(left))) if left > 0 else float(parallel.f_max)
            )
            price = float(cost(chains, depth))
            if v * solved - price > best.worth:
                best = Mix(chains=chains, depth=depth, solved=solved, cost=price, worth=v * solved - price)
    return best
