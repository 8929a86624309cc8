"""What the end of a training by reinforcement says, of any kind of policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.output import duration, fact, quantity, size

if TYPE_CHECKING:
    from anabranch.train import TaskRunConfig, TrainResult


class Conclusion:
    """The figures of one run.

    Args:
        config: of the run.
        result: of its training.
        out: its folder.
        samples: what it learned from, in all, of ``unit``.
        unit: what these are called.
    """

    def __init__(self, config: TaskRunConfig, result: TrainResult, out: Path, samples: int, unit: str) -> None:
        self.config, self.result, self.out, self.samples, self.unit = config, result, out, samples, unit
        self.rate = samples / result.seconds if result.seconds else 0.0
        self.measures = {name: value for name, value in result.measures.items() if name not in ("step", "kind")}

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        result, train = self.result, self.config.train
        return {
            "folder": str(self.out),
            "status": result.status,
            "step": result.step,
            "steps": train.steps,
            "mean_return": result.headline,
            **self.measures,
            "samples": self.samples,
            "samples_per_second": self.rate,
            "seconds": result.seconds,
            "seed": train.seed,
            "skipped_steps": result.skipped_steps,
            "peak_memory_bytes": result.peak_memory_bytes,
            "checkpoint": str(result.checkpoint) if result.checkpoint else None,
        }

    def tell_work(self) -> None:
        """How much was learned from, and what that took."""
        result = self.result
        fact(
            "work",
            f"{self.samples:,} {self.unit}, {result.step:,} of {self.config.train.steps:,} steps in {duration(result.seconds)}, "
            f"{quantity(self.rate)} {self.unit}/s, {size(result.peak_memory_bytes)} memory",
        )
