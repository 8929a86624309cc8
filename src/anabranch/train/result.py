"""What a trainer tells while it works, and how a training ended."""

import math
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anabranch.train.evaluate import Evaluation


@dataclass(frozen=True)
class Event:
    """What a trainer tells while it works.

    Attributes:
        kind: ``start``, ``step``, ``evaluation``, ``checkpoint`` or ``stop``.
        step: finished steps.
        steps: steps there are.
        values: of a step: loss, gradient_norm, learning_rate, tokens_per_second (or what else the task counts); of an evaluation: its
            record in the metrics; of a checkpoint: path; of a stop: status.
    """

    kind: str
    step: int
    steps: int
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        status: ``finished`` or ``interrupted``.
        signal: the signal that interrupted it.
        step: finished steps.
        measures: the last evaluation's record in the metrics; empty if there was none.
        headline: the number in it by which runs of the task are compared; nan without one.
        units: of the task's data (tokens of a language model) trained on since step 0.
        seconds: spent on steps since step 0, evaluations and checkpoints not counted.
        skipped_steps: steps without an update, because their gradient was not finite.
        peak_memory_bytes: of this process, or of the GPU.
        checkpoint: the last one.
        routing: measures of the last evaluation, see `LoadMeter.read`; empty for a model that does not route.
    """

    status: str
    signal: str | None
    step: int
    measures: dict[str, Any]
    headline: float
    units: int
    seconds: float
    skipped_steps: int
    peak_memory_bytes: int
    checkpoint: Path | None
    routing: dict[str, Any]

    @property
    def units_per_second(self) -> float:
        """Of all steps."""
        return self.units / self.seconds if self.seconds else 0.0

    # In the words of a language model

    @property
    def tokens(self) -> int:
        """Trained on since step 0: the units of text."""
        return self.units

    @property
    def tokens_per_second(self) -> float:
        """Of all steps."""
        return self.units_per_second

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation on text, None if there was none."""
        return Evaluation.from_dict(self.measures) if "nats_per_token" in self.measures else None

    @property
    def bits_per_byte(self) -> float:
        """Of the last evaluation; nan without one."""
        return self.evaluation.bits_per_byte if self.evaluation else math.nan

    @property
    def nats_per_token(self) -> float:
        """Of the last evaluation; nan without one."""
        return self.evaluation.nats_per_token if self.evaluation else math.nan


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, or that it had on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
