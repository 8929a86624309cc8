"""`Rewiring`: how routers are turned to a text while it goes on."""

from typing import Literal

from anabranch.bounds import shown
from anabranch.config import Config, Field, Size, configclass
from anabranch.errors import ConfigError

__all__ = ["Rewiring"]

# Usual values of what tells how layers are chosen.
_CHOICE: Literal["hard"] = "hard"
_R = 0.5


@configclass
class Rewiring(Config):
    """Settings; defaults are the paper's, and what we add to them (guard, scaled step) is on.

    Attributes:
        eta: step size, before it is scaled.
        steps: n, gradient steps in each phase 1.
        interval: m, tokens that are generated between two phases 1; None adapts to the prompt alone.
        optimizer: ``adam`` (0.9, 0.999), which begins anew in each phase 1, or ``sgd``.
        select: layers that are updated: ``all``; ``uncertain``, those whose chosen experts have small probabilities (the paper's formula as
            printed); ``decisive``, those where they are large (the paper's words). None: ``all`` with the guard, ``uncertain`` without.
        r: share of the layers that are updated where some are chosen (``hard``), at least one.
        choice: where layers are chosen by confidence, ``hard`` updates the r share alone; ``soft`` updates all, each scaled by its
            confidence as a share of the greatest.
        guard: fit the first part of the context, and take of the change what helps the part that was held back: all, half or nothing.
        tail: share of the context that is held back.
        least_tail: least tokens that are held back.
        scale_step: scale eta by min(1, T / ``full_step_at``) for a context of T tokens: short ones overfit.
        full_step_at: T from which eta is whole.
        window: fit the last so many tokens alone; None for all.
        cache: keys and values after a change: ``recompute`` runs the context again, ``keep`` goes on with those of the old vectors.
        checkpointing: keep no activations of blocks for the backward pass, run them again: for long contexts.
        most_steps: gradient steps of a request, of all its phases; None for no limit.
        most_seconds: time that a request may spend in phases 1, looked at before each step; None for no limit.

    Raises ConfigError for values outside of their ranges, a window that leaves nothing to fit, and another ``r`` or ``choice`` than the
    usual one where it would change nothing: all layers are updated, or ``soft`` takes no share of them.
    """

    eta: float = Field(default=0.05, gt=0)
    steps: Size = Field(default=5, ge=1)
    interval: Size | None = Field(default=128, ge=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    select: Literal["all", "uncertain", "decisive"] | None = None
    r: float = Field(default=_R, gt=0, le=1)
    choice: Literal["hard", "soft"] = _CHOICE
    guard: bool = True
    tail: float = Field(default=0.3, gt=0, lt=1)
    least_tail: Size = Field(default=16, ge=1)
    scale_step: bool = True
    full_step_at: Size = Field(default=512, ge=1)
    window: Size | None = Field(default=None, ge=2)
    cache: Literal["recompute", "keep"] = "recompute"
    checkpointing: bool = False
    most_steps: Size | None = Field(default=None, ge=0)
    most_seconds: float | None = Field(default=None, ge=0)

    def __post_init__(self) -> None:
        if self.guard and self.window is not None and self.window < self.least_tail + 2:
            raise ConfigError(
                f"window is {self.window}, of which the guard holds back {self.least_tail} (least_tail): nothing is left to fit; "
                f"use at least {self.least_tail + 2}, or guard=False"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        """Raise ConfigError for settings of chosen layers that are told where none is chosen."""
        usual = (("choice", self.choice, _CHOICE), ("r", self.r, _R))
        told = [f"{name} is {shown(value)}" for name, value, plain in usual if value != plain]
        if told and self.layers == "all":
            why = "as it is with the guard" if self.select is None else "as select says"
            raise ConfigError(
                f"{told[0]}, and all layers are updated alike ({why}): give select=uncertain or select=decisive beside it, or leave it out"
            )
        if self.choice == "soft" and self.r != _R:
            raise ConfigError(f"{told[-1]}, and choice=soft updates all layers: use choice=hard, or leave r out")

    @property
    def layers(self) -> Literal["all", "uncertain", "decisive"]:
        """Which layers are updated."""
        return self.select or ("all" if self.guard else "uncertain")

    def step_size(self, length: int) -> float:
        """Eta for a context of ``length`` tokens."""
        return self.eta * (min(1.0, length / self.full_step_at) if self.scale_step else 1.0)

    def held_back(self, length: int) -> int:
        """Tokens at the end of a context of ``length`` that the guard keeps from being fitted; 0 without it."""
        return max(self.least_tail, round(self.tail * length)) if self.guard else 0
