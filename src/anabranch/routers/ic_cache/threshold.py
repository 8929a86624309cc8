"""How useful an example must be: tau, chosen while serving.

On a small sample of requests another tau of the grid is tried, and the mean efficiency gain under each is kept; all other requests use the
best so far.
"""
# Shapes: T values of tau

from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import ConfigError
from anabranch.routers.contract.strategy import Arrays, Facts


class Threshold(Part):
    """The value in use, and what each has brought."""

    @configclass
    class Config(BaseConfig):
        """What is tried, and how often.

        Attributes:
            grid: values of tau.
            start: in use until every value has been tried ``min_count`` times; one of the grid.
            share: of requests that try a value drawn at random.
            min_count: trials of a value before its mean counts.
            forget: weight that an earlier trial keeps when a new one of the same value comes; 1 forgets nothing.
        """

        grid: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
        start: float = 0.5
        share: float = Field(default=0.05, ge=0, le=1)
        min_count: int = Field(default=20, ge=1)
        forget: float = Field(default=1.0, gt=0, le=1)

        def __post_init__(self) -> None:
            if self.start not in self.grid:
                raise ConfigError(f"start is {self.start}; it must be one of the grid, {list(self.grid)}")

    def __init__(self, config: Any) -> None:
        self.config = config
        self.count_T = np.zeros(len(config.grid), np.int64)
        self.weight_T, self.sum_T = np.zeros(len(config.grid)), np.zeros(len(config.grid))

    @property
    def best(self) -> float:
        """The value of the largest mean gain, the smaller one of equals; ``start`` while one has too few trials."""
        if (self.count_T < self.config.min_count).any():
            return self.config.start
        return self.config.grid[int(np.argmax(self.sum_T / self.weight_T))]

    def draw(self, random: np.random.Generator) -> tuple[float, bool]:
        """The value for a request, and whether it is a trial, to be told of by `record`."""
        if random.random() < self.config.share:
            return self.config.grid[int(random.integers(len(self.config.grid)))], True
        return self.best, False

    def record(self, tau: float, gain: float) -> None:
        """What a trial brought."""
        at = self.config.grid.index(tau)
        self.count_T[at] += 1
        self.weight_T[at] = self.weight_T[at] * self.config.forget + 1
        self.sum_T[at] = self.sum_T[at] * self.config.forget + gain

    def state(self) -> tuple[Arrays, Facts]:
        """Counts and sums."""
        return {"count_T": self.count_T, "weight_T": self.weight_T, "sum_T": self.sum_T}, {}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take them back."""
        self.count_T, self.weight_T, self.sum_T = (arrays[name].copy() for name in ("count_T", "weight_T", "sum_T"))
