"""Scoring a text while routers are turned to it: each token is foretold by vectors that were fitted to what stands before it alone.

    read the first tokens          foretold by the model as it is
    phase 1 on all that was read, then the next tokens are foretold with these vectors; again, to the end

It is generation in two phases in which the text says what comes. What is measured comes behind a phase, and is never what it was fitted to.
"""
# Shapes: B texts, L positions, V vocabulary, M measured tokens

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.adapters.rewiring.measure import token_losses
from anabranch.adapters.rewiring.state import Phase, RewiringState
from anabranch.adapters.rewiring.vectors import Texts, Vectors, run
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.generate import evaluating

if TYPE_CHECKING:
    from anabranch.adapters.rewiring.rerouter import Rerouter

__all__ = ["Comparison", "Scored", "score"]


@dataclass(frozen=True)
class Scored:
    """What texts of one length cost, token by token, with and without turned routers.

    Attributes:
        starts: the tokens that were read at each phase 1.
        plain_BL: nats ``[B, L - 1]`` of the tokens at positions 1 and up, by the model as it is.
        rewired_BL: the same with vectors; of what stands before the first phase these are those of ``plain_BL``.
        states: of the texts, with a report of each phase.
    """

    starts: tuple[int, ...]
    plain_BL: Tensor
    rewired_BL: Tensor
    states: list[RewiringState]


@torch.no_grad()
def score(rerouter: "Rerouter", token_BL: Tensor, first: int | None = None) -> Scored:
    """See `Rerouter.score`."""
    length, config = token_BL.shape[1], rerouter.config
    first = first or config.interval or length // 2
    if not 1 <= first < length:
        raise ConfigError(
            f"the text has {length} tokens, of which the first {first} are read before routers are turned; nothing is left to measure"
        )
    starts = tuple(range(first, length, config.interval or length))
    states = [rerouter.new_state() for _ in token_BL]
    token_BL = token_BL.to(rerouter.model.embedding.weight.device)
    texts = token_BL.tolist()
    with evaluating(rerouter.model):
        reading = _Reading(rerouter, token_BL)
        plain_BL = reading.losses(states, 1, length)
        rewired_BL = plain_BL.clone()
        if config.cache == "keep":
            reading.keep(states, first)
        for start, end in zip(starts, (*starts[1:], length), strict=True):
            rerouter.adapt([text[:start] for text in texts], states)
            rewired_BL[:, start - 1 : end - 1] = reading.losses(states, start, end)
    return Scored(starts, plain_BL, rewired_BL, states)


class _Reading:
    """Passes over texts, with the vectors of each: from the beginning, or with the keys and values of before."""

    def __init__(self, rerouter: "Rerouter", token_BL: Tensor) -> None:
        self._rerouter, self._token_BL = rerouter, token_BL
        self._cache: KeyValueCache | None = None

    def keep(self, states: Sequence[RewiringState], first: int) -> None:
        """Go on with keys and values from here: those of the tokens before the last of the ``first`` are of these vectors."""
        self._cache = self._rerouter.model.new_cache(self._token_BL.shape[1])
        if first > 1:
            self._run(states, 0, first - 1, last=1)

    def losses(self, states: Sequence[RewiringState], start: int, end: int) -> Tensor:
        """nats ``[B, end - start]`` of the tokens at these positions."""
        begin = 0 if self._cache is None else start - 1
        logits_BLV = self._run(states, begin, end - 1, last=end - start)
        return token_losses(logits_BLV, self._token_BL[:, start - 1 : end])

    def _run(self, states: Sequence[RewiringState], begin: int, end: int, *, last: int) -> Tensor:
        token_BL, layers = self._token_BL[:, begin:end], self._rerouter.layers
        delta = [torch.stack(of_layer) for of_layer in zip(*(state.delta for state in states), strict=True)]
        vectors = Vectors(layers, [delta_BE.to(token_BL.device) for delta_BE in delta], end - begin)
        texts = Texts.all(len(states))
        return run(self._rerouter.model, token_BL, None, vectors, texts, cache=self._cache, last=last)


@dataclass
class _Sums:
    """Of texts, one entry each: measured tokens, and nats of them without and with vectors."""

    tokens: list[int] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    rewired: list[float] = field(default_factory=list)

    def add(self, plain_BM: Tensor, rewired_BM: Tensor) -> None:
        self.tokens += [plain_BM.shape[1]] * len(plain_BM)
        self.plain += plain_BM.double().sum(1).tolist()
        self.rewired += rewired_BM.double().sum(1).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Nats per token; the error is that of a ratio, over texts: tokens of one text are not drawn one by one."""
        tokens, texts = sum(self.tokens), len(self.tokens)
        mean = (sum(self.rewired) - sum(self.plain)) / tokens if tokens else math.nan
        away = [
            (rewired - plain - mean * count) ** 2
            for plain, rewired, count in zip(self.plain, self.rewired, self.tokens, strict=True)
        ]
        error = math.sqrt(sum(away) * texts / (texts - 1)) / tokens if texts > 1 else None
        return {
            "texts": texts,
            "tokens": tokens,
            "plain": sum(self.plain) / tokens if tokens else math.nan,
            "rewired": sum(self.rewired) / tokens if tokens else math.nan,
            "difference": mean,
            "standard_error": error,
        }


class Comparison:
    """What turning routers came to over many texts: in all, by kind of text, and by how much had been read.

    Args:
        domains: names of the kinds.
    """

    def __init__(self, domains: Sequence[str] = ("all",)) -> None:
        self._domains = tuple(domains)
        self._by_domain = {name: _Sums() for name in self._domains}
        self._all, self._by_phase, self._reports = _Sums(), dict[int, _Sums](), dict[int, list[Phase]]()
        self._seconds = 0.0

    def add(self, scored: Scored, domain_B: Tensor | None = None) -> None:
        """Texts of one length; ``domain_B`` int64, which kind each is, None for the first."""
        first, length = scored.starts[0], scored.plain_BL.shape[1] + 1
        plain_BL, rewired_BL = scored.plain_BL.cpu(), scored.rewired_BL.cpu()
        self._all.add(plain_BL[:, first - 1 :], rewired_BL[:, first - 1 :])
        places = [0] * len(plain_BL) if domain_B is None else domain_B.tolist()
        for row, place in enumerate(places):
            own = slice(row, row + 1)
            self._by_domain[self._domains[place]].add(plain_BL[own, first - 1 :], rewired_BL[own, first - 1 :])
        for number, (start, end) in enumerate(zip(scored.starts, (*scored.starts[1:], length), strict=True)):
            here = slice(start - 1, end - 1)
            self._by_phase.setdefault(start, _Sums()).add(plain_BL[:, here], rewired_BL[:, here])
            reports = [state.phases[number] for state in scored.states]
            self._reports.setdefault(start, []).extend(reports)
            # Each has what its whole batch took.
            self._seconds += max(report.seconds for report in reports)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``plain``, ``rewired`` and ``difference`` in nats per measured token, ``standard_error`` of the last over texts.

        ``by_domain`` has the same of each kind, where there are several, and ``phases`` of what followed each phase 1, beside what that
        phase did in the mean.
        """
        parts = {name: sums.to_dict() for name, sums in self._by_domain.items() if sums.tokens}
        phases = [
            {"read": start, **sums.to_dict(), **_told(self._reports[start])}
            for start, sums in sorted(self._by_phase.items())
        ]
        by_domain = {"by_domain": parts} if len(parts) > 1 else {}
        return {**self._all.to_dict(), "seconds": self._seconds, **by_domain, "phases": phases}


def _told(reports: Sequence[Phase]) -> dict[str, Any]:
    """What one phase 1 did, of several texts: means of what each report has, and how many took what share of the change."""
    scales = [report.scale for report in reports if report.tail_after is not None]
    means = ("steps", "loss_before", "loss_after", "tail_before", "tail_after")
    lists = ("norms", "overlap", "load_change")
    skipped: dict[str, int] = {}
    for report in reports:
        if report.skipped is not None:
            skipped[report.skipped] = skipped.get(report.skipped, 0) + 1
    return {
        **{name: _mean([getattr(report, name) for report in reports]) for name in means},
        "kept": {_SHARES[scale]: scales.count(scale) for scale in _SHARES} if scales else None,
        **{name: _mean([value for report in reports for value in getattr(report, name)]) for name in lists},
        "new_experts": _mean([sum(map(len, report.new_experts)) for report in reports]),
        "skipped": skipped,
    }


# How much of a change the guard took, in words; None is the way back to no vectors.
_SHARES = {0.0: "none", 0.5: "half", 1.0: "all", None: "reset"}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
