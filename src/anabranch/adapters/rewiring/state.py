"""What a request keeps: its vectors, what they cost, and a report of each phase 1."""
# Shapes: E destinations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from anabranch.bounds import LARGEST_INT, shown
from anabranch.errors import ConfigError

__all__ = ["MOST_SECONDS", "MOST_SHIFT", "MOST_STEPS", "Phase", "RewiringState"]

# What a vector adds to a logit at most, up or down. Long before it an expert is chosen for certain, or never; logits in float16, which
# end at 65,504, stay numbers with it, whatever steps came to and whoever wrote a state.
MOST_SHIFT = 1e4
# What a conversation has taken at most, as a state says it. A century of seconds is still counted by the microsecond.
MOST_STEPS, MOST_SECONDS = LARGEST_INT, 3.2e9


@dataclass(frozen=True)
class Phase:
    """One phase 1 of one request. Losses are mean nats per token; lists have an entry for each router, in the order of the model.

    Attributes:
        length: tokens of the context that were looked at, behind the window.
        fitted: of these, those that steps were taken on.
        steps: gradient steps that were taken.
        skipped: why nothing, or less than was asked, was done; None if all was.
        loss_before, loss_after: of the whole context that was looked at; None where nothing was done.
        tail_before, tail_after: of the part that the guard held back; None without it.
        scale: how much of the change was taken: 0, 0.5 or 1. None without the guard, or where the vectors were taken back to 0.
        norms: length of each vector now.
        overlap: experts that tokens had before and have now, over those that they had or have (Jaccard), mean over tokens.
        load_change: half the sum of what the shares of experts changed by, 0 (the same loads) to 1.
        new_experts: experts that no token of the context had before and some has now: what an expert cache has to load.
        seconds: that it took, for all requests of its batch.
    """

    length: int
    fitted: int = 0
    steps: int = 0
    skipped: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    tail_before: float | None = None
    tail_after: float | None = None
    scale: float | None = None
    norms: tuple[float, ...] = ()
    overlap: tuple[float | None, ...] = ()
    load_change: tuple[float | None, ...] = ()
    new_experts: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0


@dataclass
class RewiringState:
    """Vectors of one request, which goes on with them in its next call.

    Attributes:
        delta: float32 ``[E]`` for each router (float64 for a model in float64), of size `MOST_SHIFT` at most.
        steps: gradient steps so far.
        seconds: spent in phases 1 so far.
        phases: reports, in order.
        own_steps, own_seconds: those of this request, which count against its limits, see `go_on`. They are counted for themselves: a
            difference of sums would be 0 behind sums that are large enough, whoever wrote these.
    """

    delta: list[Tensor]
    steps: int = 0
    seconds: float = 0.0
    phases: list[Phase] = field(default_factory=list)
    own_steps: int = 0
    own_seconds: float = 0.0

    def reset(self) -> None:
        """Begin anew, as a request that has just come."""
        self.delta = [torch.zeros_like(delta_E) for delta_E in self.delta]
        self.steps, self.seconds, self.phases = 0, 0.0, []
        self.own_steps, self.own_seconds = 0, 0.0

    def go_on(self) -> None:
        """The next request of a conversation begins: it keeps the vectors and the sums, and has limits and reports of its own."""
        self.phases, self.own_steps, self.own_seconds = [], 0, 0.0

    def spend(self, *, steps: int = 0, seconds: float = 0.0) -> None:
        """Count what a phase 1 took. Sums of a conversation stay within what a state may say, so that they can be given back."""
        self.own_steps, self.own_seconds = self.own_steps + steps, self.own_seconds + seconds
        self.steps, self.seconds = min(self.steps + steps, MOST_STEPS), min(self.seconds + seconds, MOST_SECONDS)

    def copy(self) -> Self:
        """Another request that goes on from here on its own (a sampled chain)."""
        delta = [delta_E.clone() for delta_E in self.delta]
        return type(self)(
            delta, self.steps, self.seconds, list(self.phases), own_steps=self.own_steps, own_seconds=self.own_seconds
        )

    @property
    def is_zero(self) -> bool:
        """Whether routers are left alone."""
        return not any(bool(delta_E.any()) for delta_E in self.delta)

    def state_dict(self) -> dict[str, Any]:
        """What a conversation needs to go on, without the reports: tensors and numbers alone, for `torch.save`."""
        return {"delta": [delta_E.clone() for delta_E in self.delta], "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ConfigError, and changes nothing, where it is not of such a model."""
        if not isinstance(found, dict) or not found.keys() >= {"delta", "steps", "seconds"}:
            raise ConfigError("this is no state of a rewired request: it has no delta, steps and seconds")
        delta = found["delta"]
        if not isinstance(delta, Sequence) or not all(isinstance(delta_E, Tensor) for delta_E in delta):
            raise ConfigError("delta of a rewired request is a list of tensors, one for each router")
        wanted, given = ([list(one.shape) for one in many] for many in (self.delta, delta))
        if wanted != given:
            raise ConfigError(f"the state has vectors of shapes {given}, but the model needs {wanted}")
        if any(delta_E.is_complex() for delta_E in delta):
            raise ConfigError("the state has complex numbers; vectors are of real ones")
        # As it will be kept: float32 has an end that float64 has not.
        kept = [new_E.detach().to(old_E, copy=True) for new_E, old_E in zip(delta, self.delta, strict=True)]
        if not all(bool(torch.isfinite(delta_E).all()) for delta_E in kept):
            raise ConfigError(f"the state has a number that is not finite in {kept[0].dtype}")
        largest = max((float(delta_E.abs().max()) for delta_E in kept if len(delta_E)), default=0.0)
        if largest > MOST_SHIFT:
            raise ConfigError(f"the state has a number of size {largest:g}; it may be {MOST_SHIFT:,.0f} at most")
        steps, seconds = found["steps"], found["seconds"]
        if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= MOST_STEPS:
            raise ConfigError(f"steps of the state is {shown(steps)}; it must be an integer from 0 to {MOST_STEPS}")
        # Asked of an integer before it is made a float, which has an end.
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= MOST_SECONDS:
            raise ConfigError(
                f"seconds of the state is {shown(seconds)}; it must be a number from 0 to {MOST_SECONDS:.0f}"
            )
        self.delta, self.steps, self.seconds = kept, steps, float(seconds)
        self.own_steps, self.own_seconds = steps, float(seconds)
