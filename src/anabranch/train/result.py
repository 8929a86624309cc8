"""What a trainer tells while it works, and how a training ended."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.train.evaluate import Evaluation


@dataclass(frozen=True)
class Event:
    """What a trainer tells while it works.

    Attributes:
        kind: ``start``, ``step``, ``evaluation``, ``checkpoint`` or ``stop``.
        step: finished steps.
        steps: steps there are.
        values: of a step: loss, gradient_norm, learning_rate, tokens_per_second; of an evaluation: its record in the metrics; of a
            checkpoint: path; of a stop: status.
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
        evaluation: the last evaluation, None if there was none.
        tokens: trained on since step 0.
        seconds: spent on steps since step 0, evaluations and checkpoints not counted.
        tokens_per_second: of those steps.
        skipped_steps: steps without an update, because their gradient was not finite.
        peak_memory_bytes: of this process, or of the GPU.
        checkpoint: the last one.
        routing: measures of the last evaluation, see `LoadMeter.read`; empty for a model that does not route.
    """

    status: str
    signal: str | None
    step: int
    evaluation: Evaluation | None
    tokens: int
    seconds: float
    tokens_per_second: float
    skipped_steps: int
    peak_memory_bytes: int
    checkpoint: Path | None
    routing: dict[str, Any]

    @property
    def bits_per_byte(self) -> float:
        """Of the last evaluation; nan without one."""
        return self.evaluation.bits_per_byte if self.evaluation else math.nan

    @property
    def nats_per_token(self) -> float:
        """Of the last evaluation; nan without one."""
        return self.evaluation.nats_per_token if self.evaluation else math.nan
