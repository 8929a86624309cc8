"""Hooks of a step: how offload, recording and pipelines see an engine's work without the engine knowing them."""

from collections.abc import Sequence
from typing import Protocol

from anabranch.serving.core.batch import Batch, Sampled


class StepHook(Protocol):
    """Called by the runner in its own thread. A hook that fails fails the step."""

    def before_step(self, batch: Batch, tokens: Sequence[int]) -> None:
        """``tokens``: the ids of all chunks, in order, none `PENDING`."""

    def after_step(self, batch: Batch, sampled: Sequence[Sampled]) -> None:
        """The step is done."""

    def close(self) -> None:
        """The engine ends."""
