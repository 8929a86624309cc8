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
        measures: the record in the metrics of the evaluation of what is written: the last, or with ``train.keep_best``, where training is
            finished, the best; empty if there was none.
        headline: the number in it by which runs of the task are compared; nan without one.
        units: of the task's data (tokens of a language model) trained on since step 0.
        seconds: spent on steps since step 0, evaluations and checkpoints not counted.
        skipped_steps: steps without an update, because their gradient was not finite.
        peak_memory_bytes: of this process, or of the GPU.
        checkpoint: the last one.
        routing: of ``measures``, see `LoadMeter.read`; empty for a model that does not route.
        stopped_early: whether it ended before all steps, as no evaluation was better for as long as ``train.patience`` says.
        best_step: the step of the best evaluation; None where it is not looked for, or none was finite.
        best: the folder of the best weights, which the trainer's model has in the end, unless it is in shards; None where none are kept.
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
    stopped_early: bool = False
    best_step: int | None = None
    best: Path | None = None

    @property
    def written(self) -> Path | None:
        """What is to be used of the run: the best weights where they are kept, else the last checkpoint."""
        return self.best or self.checkpoint

    @property
    def written_step(self) -> int:
        """The step that this is of."""
        return self.step if self.best is None or self.best_step is None else self.best_step

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
