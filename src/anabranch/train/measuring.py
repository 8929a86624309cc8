"""`Measuring`: what a run measures: losses and loads of the steps that are logged, and the task's measures on held-out data."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.train.best import TOLD
from anabranch.train.checkpoint_manager import Progress
from anabranch.train.config import TrainConfig
from anabranch.train.evaluate import autocast, evaluation_mode
from anabranch.train.idle import IdleWatch
from anabranch.train.meter import LoadMeter
from anabranch.train.parallel import Workers
from anabranch.train.step import Gradient
from anabranch.train.task import Task, TaskContext, moved

__all__ = ["Measuring"]


class Measuring:
    """Counts in the model while it is there, see `LoadMeter`.

    Args:
        task: what is trained.
        model: that learns.
        workers: who learns together.
        settings: of the training.
    """

    def __init__(self, task: Task, model: nn.Module, workers: Workers, settings: TrainConfig) -> None:
        self._task, self._model, self._workers, self._precision = task, model, workers, settings.precision
        self._meter, self._idle = LoadMeter(model), IdleWatch(settings.steps)

    def begin(self) -> None:
        """A step that is logged begins."""
        self._meter.reset()

    def of_step(self, gradient: Gradient, progress: Progress, *, learning_rate: float, units: int) -> dict[str, Any]:
        """The line of a step that has been made, apart from times. Losses are means over processes.

        ``units`` are of the task's data, since step 0.
        """
        losses = self._over_processes({"loss": gradient.total, **gradient.terms})
        metrics = self._over_processes(gradient.metrics)
        main = next(iter(gradient.terms))
        counted = self._meter.count(training=True)
        is_shared = self._workers.elastic is not None
        if self._workers.is_first and not is_shared:
            self._idle.see(progress.step, counted.loads_while_open())
        return {
            "step": progress.step,
            "kind": "train",
            "loss": losses.pop("loss"),
            main: losses.pop(main),
            "auxiliary": losses,
            **metrics,
            "learning_rate": learning_rate,
            "gradient_norm": gradient.norm,
            "skipped_steps": progress.skipped,
            self._task.unit: units,
            # Of processes that share the run each has seen what it worked on alone.
            **({} if is_shared else counted.measures()),
        }

    def of_held_out(self, data: Any, context: TaskContext) -> dict[str, Any]:
        """The line of an evaluation on ``data``. Raises ConfigError for a task that gives what cannot be logged."""
        self._meter.reset()
        self._workers.make_whole()
        with evaluation_mode(self._model), autocast(self._workers.device, self._precision):
            model = self._workers.as_evaluated(self._model)
            measured = self._task.evaluate(model, moved(data, context.device), context)
        _check_measured(measured, self._task)
        return {"step": context.step, "kind": "validation", **measured} | self._meter.read(training=False)

    def layers_with_nan(self) -> list[int]:
        """See `LoadMeter.layers_with_nan`."""
        return self._meter.layers_with_nan()

    def close(self) -> None:
        """Count no more."""
        self._meter.close()

    def _over_processes(self, values: dict[str, Tensor]) -> dict[str, float]:
        if not values:
            return {}
        stacked = torch.stack([value.float() for value in values.values()])
        # Where they are exact each process has those of all already, and a sum of equal numbers may be rounded.
        means = (stacked if self._workers.is_exact else self._workers.mean(stacked)).tolist()
        return dict(zip(values, means, strict=True))


def _check_measured(measured: dict[str, Any], task: Task) -> None:
    """Raise ConfigError for an evaluation that cannot be logged, or lacks the headline."""
    name = f"{type(task).__name__}.evaluate"
    headline = measured.get(task.headline)
    if not isinstance(headline, int | float):
        given = ", ".join(measured) or "nothing"
        raise ConfigError(f"{name} gave {given}, and no number {task.headline!r}, which is its headline")
    taken = sorted({"step", "kind", *TOLD} & measured.keys())
    if taken:
        raise ConfigError(f"{name} gave {taken[0]!r}, which the trainer logs itself; choose another name")
    try:
        json.dumps(measured)
    except TypeError as error:
        raise ConfigError(f"{name} gave what JSON does not hold ({error}); make numbers of tensors") from None
