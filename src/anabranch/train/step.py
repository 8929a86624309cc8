"""One optimizer step: forward and backward over its micro-batches, clipping, AdamW."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.routing import discard_loads
from anabranch.train.evaluate import autocast
from anabranch.train.hooks import StepHooks
from anabranch.train.optimizer import FACTOR, by_layout, full_tensor
from anabranch.train.parallel import Workers
from anabranch.train.task import Losses, Stream, Task, TaskContext, moved

__all__ = ["EVERYWHERE", "Gradient", "Stepper", "add_share"]

# Stands in the place of a rank where torch's generators are seeded for hooks, which draw the same in all processes.
EVERYWHERE = 2**32 - 1


@dataclass(frozen=True)
class Gradient:
    """What the passes over the batch of a step gave.

    Attributes:
        total: the loss, a mean of this process.
        terms: what it is the sum of, likewise.
        metrics: what else is logged, likewise.
        norm: of the whole gradient, before clipping.
    """

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    norm: float

    @property
    def is_finite(self) -> bool:
        """Whether weights can move by it."""
        return math.isfinite(self.norm)


class Stepper:
    """Makes the steps of a training.

    Args:
        task: gives the losses.
        model: what learns.
        wrapped: the same as it is called in training: replicas, shards.
        optimizer: of the parameters that learn.
        workers: the processes.
        hooks: called before each step.
        context: of the run; its settings are these steps'.

    Attributes:
        call: ``wrapped``, compiled if the settings say so.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        workers: Workers,
        hooks: StepHooks,
        context: TaskContext,
    ) -> None:
        self.task, self.model, self.wrapped, self.optimizer, self.workers, self.hooks = (
            task,
            model,
            wrapped,
            optimizer,
            workers,
            hooks,
        )
        self._settings = context.settings
        self._schedule = self._settings.schedule.build()
        self.call: Any = torch.compile(wrapped, dynamic=False) if self._settings.compile else wrapped
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(self, stream: Stream, context: TaskContext) -> Gradient:
        """Forward and backward over the micro-batches of a step; gradients are then in the parameters.

        Every micro-batch has equally many items, so the mean of their means is the mean of all; what is a mean of something else is
        weighed by how much of it a micro-batch has. Raises ConfigError for losses without a gradient.
        """
        parts = self._settings.accumulation
        if self.hooks.before:
            self._seed(context.step, EVERYWHERE)
            self.hooks.run_before(context.step)
        self._seed(context.step, self.workers.draws_as)
        if self.task.pace == 0:
            return self._passed_over(stream, context)
        total: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for number, (batch, weights) in enumerate(self._batches(stream, context)):
            batch = moved(batch, context.device)
            with self.workers.micro_batch(self.wrapped, is_last=number == parts - 1):
                with autocast(context.device, self._settings.precision):
                    losses = self.task.step(self.call, batch, context).weighed(weights)
                self._check(losses)
                (losses.total / parts).backward()
            add_share(total, {"total": losses.total}, parts)
            add_share(terms, losses.terms, parts)
            add_share(metrics, losses.metrics, parts)
        return Gradient(total["total"], terms, metrics, self.gradient_norm())

    @torch.no_grad()
    def _passed_over(self, stream: Stream, context: TaskContext) -> Gradient:
        """Of a step that nothing is learned in: its batch is taken, and looked at where it is logged. The loss is NaN where it is not."""
        total, terms, metrics = {}, {}, {}  # type: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
        is_logged = (context.step + 1) % self._settings.log_every == 0
        for batch, weights in self._batches(stream, context):
            if not is_logged:
                continue
            with autocast(context.device, self._settings.precision):
                losses = self.task.step(self.call, moved(batch, context.device), context).weighed(weights)
            for into, values in ((total, {"total": losses.total}), (terms, losses.terms), (metrics, losses.metrics)):
                add_share(into, values, self._settings.accumulation)
        return Gradient(total.get("total", torch.tensor(math.nan)), terms, metrics, 0.0)

    def _batches(self, stream: Stream, context: TaskContext) -> Iterable[tuple[Any, Mapping[str, float]]]:
        """The micro-batches of a step; and by unit how much each has of it, over the mean of those of all processes."""
        size, parts = context.batch_size, self._settings.accumulation
        if type(self.task).counts is Task.counts:
            # One at a time: a stream may use its memory again.
            return ((stream.next_batch(size), {}) for _ in range(parts))
        batches = [stream.next_batch(size) for _ in range(parts)]
        counts = [self.task.counts(batch, context) for batch in batches]
        units = sorted(counts[0])
        count_PU = torch.tensor([[float(count[unit]) for unit in units] for count in counts], dtype=torch.float64)
        mean_U = self.workers.mean(count_PU.mean(0).to(context.device)).cpu()
        # Exactly 1 where all have as much. Where there is none of it, its means are of nothing.
        weight_PU = torch.where(mean_U > 0, count_PU / mean_U.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        return [
            (batch, dict(zip(units, weights, strict=True)))
            for batch, weights in zip(batches, weight_PU.tolist(), strict=True)
        ]

    def update(self, gradient: Gradient, step: int) -> None:
        """Move the weights after ``step`` finished steps; if the gradient is not finite, forget what was counted instead.

        Where the step is passed over they stay too.
        """
        if self.task.pace == 0:
            discard_loads(self.model)
        elif gradient.is_finite:
            self.apply(gradient.norm, step)
        else:
            discard_loads(self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, norm: float, step: int) -> None:
        """Clip, set the learning rate, and let the optimizer move the weights."""
        clip = self._settings.clip
        if clip is not None and norm > clip:
            for alike in by_layout(self.parameters):
                torch.nn.utils.clip_grads_with_norm_(alike, clip, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step) * group.get(FACTOR, 1.0)
        self.optimizer.step()

    def learning_rate(self, step: int) -> float:
        """Of the update after ``step`` finished ones, at the task's pace."""
        return self._settings.learning_rate * self._schedule.factor(step, self._settings.steps) * self.task.pace

    def gradient_norm(self) -> float:
        """Of all parameters together, in all processes."""
        return self.workers.gradient_norm(self.parameters, _norm)

    def _seed(self, step: int, rank: int) -> None:
        """What is random in a step (jitter, masks per token) is a function of (seed, step, rank): resuming needs no state."""
        sequence = np.random.SeedSequence([self._settings.seed, step, rank])
        _seed_generators(int(sequence.generate_state(1, np.uint64)[0]))

    def _check(self, losses: Losses) -> None:
        if not losses.total.requires_grad:
            raise ConfigError(
                f"the loss of {type(self.task).__name__} depends on no parameter that learns; see which of them do in Task.learns"
            )


def _seed_generators(seed: int) -> None:
    """As ``torch.manual_seed``, which writes down the whole stack wherever CUDA has not begun: a millisecond, in every step."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Of the gradients of some parameters together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [float(full_tensor(torch.nn.utils.get_total_norm(alike))) for alike in by_layout(gradients)]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def add_share(total: dict[str, Tensor], values: Mapping[str, Tensor], parts: int) -> None:
    """Add to each sum what one of ``parts`` has of it."""
    for name, value in values.items():
        total[name] = total.get(name, 0.0) + value.detach() / parts
