"""A genetic search over anything that can be crossed, changed and measured; what a chromosome is, the caller says.

    generation 0: the members given, filled up by changed ones
    next:         the best ``elitism`` as they are; the rest are children: two winners of tournaments crossed, then changed

A chromosome is measured once: its fitness is kept under its key, also from call to call where the caller gives the memo. With one seed and
one fitness the search takes the same way again, so a memo on disk makes it stoppable: what it knows counts against ``max_evaluations`` like
what is measured anew.
"""

import math
import random
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError, NotFiniteError

C = TypeVar("C")

__all__ = ["Evolved", "Generation", "GeneticConfig", "evolve"]


@configclass
class GeneticConfig(Config):
    """The sizes of a search.

    Attributes:
        population: members of a generation.
        generations: how many follow the first.
        tournament: members that are drawn, the best of which becomes a parent.
        elitism: the best members that go on unchanged.
        max_evaluations: different chromosomes that a search comes to at most, measured or known to its memo; it ends early where the next
            would exceed it.
    """

    population: int = Field(default=24, ge=2, le=10**5)
    generations: int = Field(default=20, ge=0, le=10**5)
    tournament: int = Field(default=3, ge=1)
    elitism: int = Field(default=2, ge=0)
    max_evaluations: int = Field(default=500, ge=1)

    def __post_init__(self) -> None:
        if self.elitism >= self.population:
            raise ConfigError(
                f"elitism is {self.elitism}; it must be below population={self.population}, or nothing would change"
            )


@dataclass(frozen=True)
class Generation:
    """What a generation came to.

    Attributes:
        number: from 0.
        best: highest fitness in it.
        mean: of the finite ones.
        evaluations: chromosomes measured so far, in this search.
    """

    number: int
    best: float
    mean: float
    evaluations: int


@dataclass(frozen=True)
class Evolved(Generic[C]):
    """The outcome of a search.

    Attributes:
        best: the chromosome of highest fitness that was measured.
        fitness: its fitness.
        evaluations: chromosomes measured in this search; those that the memo knew do not count.
        history: one entry for each generation.
    """

    best: C
    fitness: float
    evaluations: int
    history: list[Generation] = field(default_factory=list)


class _Spent(Exception):  # noqa: N818
    """Ends the search: no evaluation is left."""


def evolve(
    initial: Sequence[C],
    fitness: Callable[[C], float],
    *,
    cross: Callable[[C, C, random.Random], C],
    mutate: Callable[[C, random.Random], C],
    config: GeneticConfig | None = None,
    seed: int = 0,
    key: Callable[[C], Hashable] = lambda chromosome: chromosome,
    memo: MutableMapping[Any, float] | None = None,
    on_generation: Callable[[Generation], None] | None = None,
) -> Evolved[C]:
    """The best chromosome of a genetic search.

    Args:
        initial: members of generation 0; those beyond the population are left out, and changed ones fill it up.
        fitness: the higher the better. One that is NaN counts as the worst.
        cross: (mother, father, random) -> child.
        mutate: (chromosome, random) -> chromosome; it decides itself whether anything changes.
        config: sizes.
        seed: of all draws.
        key: what chromosomes that are the same have in common.
        memo: fitness by key, read and written; None for one of this search alone.
        on_generation: told of each generation when it has been measured.

    Raises ConfigError without initial members, NotFiniteError where no chromosome has a finite fitness.
    """
    config = config or GeneticConfig()
    if not initial:
        raise ConfigError("the search has no initial members; give at least one chromosome")
    draw = random.Random(seed)
    search = _Search(fitness, key, {} if memo is None else memo, config.max_evaluations)
    members = list(initial[: config.population])
    while len(members) < config.population:
        members.append(mutate(draw.choice(list(initial)), draw))
    history: list[Generation] = []
    # Without an evaluation left, the best of what was measured is what the search has found.
    with suppress(_Spent):
        for number in range(config.generations + 1):
            if number:
                members = _next(members, search, cross, mutate, config, draw)
            values = [search(member) for member in members]
            finite = [value for value in values if math.isfinite(value)]
            mean = sum(finite) / len(finite) if finite else math.nan
            history.append(Generation(number, max(values), mean, search.evaluations))
            if on_generation is not None:
                on_generation(history[-1])
    if search.best is None:
        raise NotFiniteError("no chromosome of the search has a finite fitness; is the model, or the data, broken?")
    return Evolved(search.best[0], search.best[1], search.evaluations, history)


class _Search(Generic[C]):
    """Measures chromosomes, each once."""

    def __init__(
        self, fitness: Callable[[C], float], key: Callable[[C], Hashable], memo: MutableMapping[Any, float], most: int
    ) -> None:
        self.evaluations = 0
        self.best: tuple[C, float] | None = None
        self._fitness, self._key, self._memo, self._most = fitness, key, memo, most
        # All that this search has come to, also what a stopped one had measured: both end at the same chromosome.
        self._seen: set[Hashable] = set()

    def __call__(self, chromosome: C) -> float:
        name = self._key(chromosome)
        if name not in self._seen:
            if len(self._seen) >= self._most:
                raise _Spent
            self._seen.add(name)
        if name not in self._memo:
            self.evaluations += 1
            value = float(self._fitness(chromosome))
            self._memo[name] = -math.inf if math.isnan(value) else value
        value = self._memo[name]
        if math.isfinite(value) and (self.best is None or value > self.best[1]):
            self.best = chromosome, value
        return value


def _next(
    members: Sequence[C],
    search: _Search[C],
    cross: Callable[[C, C, random.Random], C],
    mutate: Callable[[C, random.Random], C],
    config: GeneticConfig,
    draw: random.Random,
) -> list[C]:
    """The members of the next generation."""
    # Sorting keeps the order of equals, so the same seed has the same elite.
    children = sorted(members, key=search, reverse=True)[: config.elitism]

    def parent() -> C:
        return max((draw.choice(members) for _ in range(config.tournament)), key=search)

    while len(children) < len(members):
        children.append(mutate(cross(parent(), parent(), draw), draw))
    return children
