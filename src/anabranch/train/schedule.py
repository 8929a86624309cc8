"""Learning-rate schedules: a factor on the peak learning rate for every optimizer step.

Lengths (``warmup``, ``decay``) are a fraction of training where they are below 1 and a number of steps where they are whole
numbers, so one config fits a short and a long run.
"""

import math
from typing import Literal

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import ConfigError


class Schedule(Part, family="schedule"):
    """Interface: ``factor(step, steps)``. All schedules rise linearly over ``warmup`` first."""

    @configclass
    class Config(BaseConfig):
        """What every schedule has.

        Attributes:
            warmup: steps (a whole number) or fraction of training (below 1) of the linear rise.
        """

        warmup: int | float = Field(default=0.02, ge=0)

        def __post_init__(self) -> None:
            _check_length("warmup", self.warmup)

    def __init__(self, config: "Schedule.Config") -> None:
        self.config = config

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update after ``step`` finished ones, in a training of ``steps``; in [0, 1]."""
        warmup = _length(self.config.warmup, steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step - warmup, max(steps - warmup, 1), steps)

    def after_warmup(self, step: int, rest: int, steps: int) -> float:
        """The factor ``step`` updates after warmup, of ``rest`` there are."""
        raise NotImplementedError  # abstract


class Constant(Schedule, kind="constant"):
    """The peak learning rate throughout."""

    def after_warmup(self, step: int, rest: int, steps: int) -> float:
        """1."""
        return 1.0


class Cosine(Schedule, kind="cosine"):
    """final + (1 - final) (1 + cos(pi t)) / 2, with t from 0 to 1 over what follows warmup (Loshchilov and Hutter, arXiv 1608.03983)."""

    @configclass
    class Config(Schedule.Config):
        """`Schedule.Config` and ``final``, the factor at the end (default 0.1)."""

        final: float = Field(default=0.1, ge=0, le=1)

    config: Config

    def after_warmup(self, step: int, rest: int, steps: int) -> float:
        """See the class."""
        final = self.config.final
        return final + (1 - final) * (1 + math.cos(math.pi * min(step / rest, 1.0))) / 2


class WarmupStableDecay(Schedule, kind="wsd"):
    """The peak until the last ``decay`` of training, then down to ``final`` (arXiv 2404.06395; shapes of arXiv 2405.18392)."""

    @configclass
    class Config(Schedule.Config):
        """`Schedule.Config` and how it ends.

        Attributes:
            decay: steps or fraction of training of the descent.
            final: the factor at the end.
            shape: ``linear``, or ``sqrt``: 1 - sqrt(t).
        """

        decay: int | float = Field(default=0.2, ge=0)
        final: float = Field(default=0.0, ge=0, le=1)
        shape: Literal["linear", "sqrt"] = "linear"

        def __post_init__(self) -> None:
            _check_length("warmup", self.warmup)
            _check_length("decay", self.decay)

    config: Config

    def after_warmup(self, step: int, rest: int, steps: int) -> float:
        """See the class."""
        decay = min(_length(self.config.decay, steps), rest)
        passed = step - (rest - decay)
        if passed < 0 or decay == 0:
            return 1.0
        t = min(passed / decay, 1.0)
        return 1 - (1 - self.config.final) * (t if self.config.shape == "linear" else math.sqrt(t))


def _check_length(name: str, value: int | float) -> None:
    if isinstance(value, float) and value > 1:
        raise ConfigError(f"{name} is {value}; use a fraction up to 1.0, or a whole number of steps")


def _length(value: int | float, steps: int) -> int:
    """Steps of a length that is given in steps or as a fraction."""
    return value if isinstance(value, int) else round(value * steps)
