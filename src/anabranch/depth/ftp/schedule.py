"""Sparsity schedules: how much each block passes over, so that the mean over blocks is what was asked; and the search for a good one.

A chromosome is the sparsity of each block, on a grid, with the given mean. Members of the first generation are uniform, in proportion to
how little blocks change what goes through them, ramps up and down, and random ones. Children are crossed block by block and then exchange
some mass between two blocks.
"""

import math
import random
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.config import Config, Field, configclass
from anabranch.depth.ftp.decider import Schedule
from anabranch.depth.genetic import Evolved, Generation, GeneticConfig, evolve
from anabranch.errors import ConfigError

__all__ = [
    "ScheduleConfig",
    "ScheduleSpace",
    "Searched",
    "check_schedule",
    "check_sparsity",
    "find_schedule",
    "project",
    "uniform_schedule",
]

# Sums of floats may miss by this much; a schedule's mean is exact to it.
EXACT = 1e-9


@configclass
class ScheduleConfig(Config):
    """How schedules are searched.

    Attributes:
        genetic: sizes of the search.
        s_max: most that a block passes over.
        grid: sparsities are multiples of this, but for what the mean needs.
        crossover: probability that a gene is the father's.
        mutation: probability that a child is changed.
        most_moved: mass that moves from one block to another in a change, at most.
        first_dense: the first block passes over nothing. It is so with a router that learned, as there is no attention to look at.
        last_dense: nor does the last.
    """

    genetic: GeneticConfig = GeneticConfig()
    s_max: float = Field(default=0.9, gt=0, lt=1)
    grid: float = Field(default=0.05, gt=0, le=0.5)
    crossover: float = Field(default=0.5, ge=0, le=1)
    mutation: float = Field(default=0.5, ge=0, le=1)
    most_moved: float = Field(default=0.15, gt=0, le=1)
    first_dense: bool = True
    last_dense: bool = False


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        schedule: the best.
        loss: of the pruned model with it, on the items of the search.
        evaluations: schedules that were measured.
        initial: losses of the schedules that the search began with, by name.
        history: of each generation the best loss, the mean and the evaluations so far.
    """

    schedule: Schedule
    loss: float
    evaluations: int
    initial: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def check_sparsity(sparsity: float, s_max: float) -> float:
    """Raises ConfigError, which is a ValueError, for a mean sparsity that is not in [0, s_max)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < s_max:
        raise ConfigError(f"sparsity is {sparsity!r}; it must be at least 0 and below s_max={s_max}")
    return float(sparsity)


def check_schedule(schedule: Iterable[float], num_blocks: int) -> Schedule:
    """The schedule as a tuple. Raises ConfigError, which is a ValueError, for another length than the model has blocks, and for values
    outside [0, 1]."""
    if isinstance(schedule, str | bytes) or not isinstance(schedule, Iterable):
        raise ConfigError(f"schedule is {schedule!r}; give the sparsity of each of the {num_blocks} blocks")
    values = list(schedule)
    if len(values) != num_blocks:
        raise ConfigError(f"schedule has {len(values)} sparsities and the model {num_blocks} blocks; give one for each")
    for block, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"schedule has {value!r} for block {block}; a sparsity is from 0 to 1")
    return tuple(float(value) for value in values)


def uniform_schedule(sparsity: float, num_blocks: int, config: ScheduleConfig | None = None) -> Schedule:
    """The same sparsity in all blocks that are not dense, so that the mean is ``sparsity``."""
    return ScheduleSpace.of(sparsity, num_blocks, config or ScheduleConfig()).exact([sparsity] * num_blocks)


def project(values: Sequence[float], mean: float, low: Sequence[float], high: Sequence[float]) -> Schedule:
    """The values shifted alike, and cut at their bounds, so that their mean is ``mean`` to 1e-9.

    Args:
        values: one for each block.
        mean: wanted.
        low, high: bounds of each block.

    Raises ConfigError where bounds allow no such mean.
    """
    total = mean * len(values)
    least, most = math.fsum(low), math.fsum(high)
    if not least - EXACT <= total <= most + EXACT:
        raise ConfigError(
            f"a mean sparsity of {mean} over {len(values)} blocks cannot be; what each block may pass over allows "
            f"{least / len(values):.4g} to {most / len(values):.4g}"
        )
    total = min(max(total, least), most)

    def shifted(by: float) -> list[float]:
        return [min(max(value + by, a), b) for value, a, b in zip(values, low, high, strict=True)]

    below = min(a - value for value, a in zip(values, low, strict=True))
    above = max(b - value for value, b in zip(values, high, strict=True))
    if abs(math.fsum(shifted(0.0)) - total) <= EXACT / 10:
        below = above = 0.0
    # The sum grows with the shift, from all bounds below to all bounds above.
    for _ in range(100):
        middle = (below + above) / 2
        if math.fsum(shifted(middle)) < total:
            below = middle
        else:
            above = middle
    made = shifted((below + above) / 2)
    for block, value in enumerate(made):
        made[block] = min(max(value + total - math.fsum(made), low[block]), high[block])
    return tuple(made)


@dataclass(frozen=True)
class ScheduleSpace:
    """All schedules with one mean.

    Attributes:
        mean: S.
        low, high: bounds of each block.
        config: how they are crossed and changed.
    """

    mean: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    config: ScheduleConfig

    @classmethod
    def of(cls, sparsity: float, num_blocks: int, config: ScheduleConfig) -> "ScheduleSpace":
        """The space for a model. Raises ConfigError for a sparsity that is not in [0, s_max), or that its blocks do not allow."""
        check_sparsity(sparsity, config.s_max)
        dense = {0} if config.first_dense else set()
        dense |= {num_blocks - 1} if config.last_dense else set()
        high = tuple(0.0 if block in dense else config.s_max for block in range(num_blocks))
        space = cls(float(sparsity), (0.0,) * num_blocks, high, config)
        space.exact([sparsity] * num_blocks)
        return space

    @property
    def free(self) -> list[int]:
        """Blocks that may pass over something."""
        return [block for block, (a, b) in enumerate(zip(self.low, self.high, strict=True)) if a < b]

    def exact(self, values: Sequence[float]) -> Schedule:
        """`project` onto this space."""
        return project(values, self.mean, self.low, self.high)

    def on_grid(self, values: Sequence[float]) -> Schedule:
        """A schedule of this space whose sparsities are on the grid, near ``values``; what the grid does not hold is shifted alike."""
        grid, wanted = self.config.grid, self.exact(values)
        made = [max(math.floor(value / grid + EXACT) * grid, a) for value, a in zip(wanted, self.low, strict=True)]
        by_rest = sorted(self.free, key=lambda block: (made[block] - wanted[block], block))
        rest = self.mean * len(made) - math.fsum(made)
        for block in by_rest * math.ceil(1 / grid):
            if rest < grid - EXACT:
                break
            if made[block] + grid <= self.high[block] + EXACT:
                made[block] += grid
                rest -= grid
        # Multiples of a grid that is no power of two miss by some bits, each by its own way there.
        return self.exact([round(value, 12) for value in made])

    def cross(self, mother: Schedule, father: Schedule, draw: random.Random) -> Schedule:
        """Each gene is one of the two."""
        pairs = zip(mother, father, strict=True)
        return self.on_grid([b if draw.random() < self.config.crossover else a for a, b in pairs])

    def mutate(self, schedule: Schedule, draw: random.Random, scale: float = 1.0) -> Schedule:
        """With some probability, mass moves from one block to another."""
        if draw.random() >= self.config.mutation or len(self.free) < 2:
            return schedule
        taker, giver = draw.sample(self.free, 2)
        moved = draw.uniform(0.0, self.config.most_moved * scale)
        made = list(schedule)
        moved = min(moved, made[giver] - self.low[giver], self.high[taker] - made[taker])
        made[taker] += moved
        made[giver] -= moved
        return self.on_grid(made)

    def initial(self, influence: Sequence[float] | None, draw: random.Random, count: int) -> dict[str, Schedule]:
        """Named schedules that a search begins with, and random ones up to ``count``."""
        blocks = len(self.low)
        span = max(blocks - 1, 1)
        made = {"uniform": self.on_grid([self.mean] * blocks)}
        if influence is not None:
            most = max(influence)
            weight = [max(most - value, 0.0) for value in influence]
            scale = self.mean * blocks / (sum(weight) or 1.0)
            made["influence"] = self.on_grid([value * scale for value in weight])
        made["rising"] = self.on_grid([2 * self.mean * block / span for block in range(blocks)])
        made["falling"] = self.on_grid([2 * self.mean * (span - block) / span for block in range(blocks)])
        for number in range(max(0, count - len(made))):
            drawn = [draw.uniform(a, b) for a, b in zip(self.low, self.high, strict=True)]
            made[f"random {number}"] = self.on_grid(drawn)
        return made


def find_schedule(
    space: ScheduleSpace,
    loss: Callable[[Schedule], float],
    *,
    initial: dict[str, Schedule],
    seed: int = 0,
    scale: float = 1.0,
    memo: MutableMapping[Any, float] | None = None,
    on_generation: Callable[[Generation], None] | None = None,
) -> Searched:
    """The schedule of least loss that a genetic search finds.

    Args:
        space: of schedules.
        loss: of a schedule; each is measured once.
        initial: schedules to begin with, by name.
        seed: of all draws.
        scale: of changes, see `ScheduleSpace.mutate`.
        memo: minus the loss by schedule, read and written.
        on_generation: told of each generation; its fitness is minus the loss.
    """
    known: MutableMapping[Any, float] = {} if memo is None else memo
    found: Evolved[Schedule] = evolve(
        list(initial.values()),
        lambda schedule: -loss(schedule),
        cross=space.cross,
        mutate=lambda schedule, draw: space.mutate(schedule, draw, scale),
        config=space.config.genetic,
        seed=seed,
        key=key_of,
        memo=known,
        on_generation=on_generation,
    )
    begun = {name: -known[key_of(one)] for name, one in initial.items() if key_of(one) in known}
    history = [
        {"generation": one.number, "loss": -one.best, "mean": -one.mean, "evaluations": one.evaluations}
        for one in found.history
    ]
    return Searched(found.best, -found.fitness, found.evaluations, begun, history)


def key_of(schedule: Schedule) -> Schedule:
    """What schedules that are the same have in common."""
    return tuple(round(value, 9) + 0.0 for value in schedule)
