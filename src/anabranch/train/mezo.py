"""MeZO: steps without gradients, from the loss at two points (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).

    g      = (L(theta + e z) - L(theta - e z)) / 2e                 z ~ N(0, I), made anew by its seed wherever it is needed
    theta <- theta - lr (g z + weight_decay theta)

Weights that learn are float32: in half of its bits what is added and taken away again for the two points would leave more rounding than is
learned. Nothing is differentiated, so that a step takes the memory of inference: no activations are kept, there are no gradients and no
moments, and z exists a piece at a time. Both passes see the same batch and draw the same masks. With n directions g is the mean of their
g z (n-SPSA, definition 1).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.train.evaluate import autocast
from anabranch.train.optimizer import FACTOR
from anabranch.train.step import EVERYWHERE, Gradient, Stepper, add_share
from anabranch.train.task import Stream, Task, TaskContext, moved

__all__ = ["MeZOStepper"]

# Numbers of z that exist at a time, and what keeps its seeds apart from those of whatever else a step draws.
_PIECE = 1 << 20
_DIRECTION = 0x6D657A6F


class MeZOStepper(Stepper):
    """See above. The optimizer says rates and decays of groups of parameters, and has no state."""

    # Of each direction of the step under way.
    _slopes: list[float]

    def __init__(self, task: Task, model: nn.Module, *rest: Any) -> None:
        super().__init__(task, model, *rest)
        _check_apart(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"train.optimizer is mezo, and {name} learns in {kind}, whose rounding moves it more than what is learned; "
                    "load the model in float32 (of adapt: --set task.dtype=float32), or learn an adapter, which is float32"
                )
            if parameter.requires_grad and not parameter.is_contiguous():
                # Numbers are moved in the order of memory, and some layers have them turned there.
                parameter.data = parameter.data.contiguous()

    @torch.no_grad()
    def gradient(self, stream: Stream, context: TaskContext) -> Gradient:
        """The slope of the loss along each direction; weights are then where they were, but for rounding.

        ``norm`` is the root of the mean square of slopes, and losses are means of those at both points.
        """
        parts, samples = self._settings.accumulation, self._settings.mezo_samples
        if self.hooks.before:
            self._seed(context.step, EVERYWHERE)
            self.hooks.run_before(context.step)
        self._seed(context.step, self.workers.draws_as)
        total: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        apart_S = torch.zeros(samples, dtype=torch.float64, device=context.device)
        for batch, weights in self._batches(stream, context):
            batch = moved(batch, context.device)
            for sample in range(samples):
                for sign, again in ((1, True), (-1, False)):
                    with self._moved(context.step, sample, sign), _same_draws(context.device, again):
                        with autocast(context.device, self._settings.precision):
                            losses = self.task.step(self.call, batch, context).weighed(weights)
                    apart_S[sample] += sign * losses.total.double() / parts
                    for into, values in (
                        (total, {"total": losses.total}),
                        (terms, losses.terms),
                        (metrics, losses.metrics),
                    ):
                        add_share(into, values, 2 * parts * samples)
        slope_S = self.workers.mean(apart_S) / (2 * self._settings.mezo_scale)
        self._slopes = slope_S.tolist()
        return Gradient(total["total"], terms, metrics, math.sqrt(sum(slope**2 for slope in self._slopes) / samples))

    @torch.no_grad()
    def apply(self, norm: float, step: int) -> None:
        """Move the weights against the slopes. Nothing is clipped: one number along a direction has no length to clip."""
        rates: dict[nn.Parameter, float] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step) * group.get(FACTOR, 1.0)
            for parameter in group["params"]:
                rates[parameter] = group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for sample, slope in enumerate(self._slopes):
            for parameter, piece, z in self._direction(step, sample):
                piece.add_(z, alpha=-rates[parameter] * slope / len(self._slopes))

    def _direction(self, step: int, sample: int) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """(parameter, some of its numbers, those of z), over all parameters: the same in all processes."""
        sequence = np.random.SeedSequence([self._settings.seed, step, sample, _DIRECTION])
        seed = int(sequence.generate_state(1, np.uint64)[0])
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in self.parameters:
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            for piece in parameter.data.view(-1).split(_PIECE):
                z = torch.randn(len(piece), generator=generators[device], device=device, dtype=piece.dtype)
                yield parameter, piece, z

    @contextmanager
    def _moved(self, step: int, sample: int, sign: int) -> Iterator[None]:
        """The weights at one of the two points; afterwards where they were, whatever happens there."""
        scale, moved_pieces = sign * self._settings.mezo_scale, 0
        try:
            for _, piece, z in self._direction(step, sample):
                piece.add_(z, alpha=scale)
                moved_pieces += 1
            yield
        finally:
            # Of those that were moved alone: memory may end in the midst of them.
            for _, piece, z in islice(self._direction(step, sample), moved_pieces):
                piece.add_(z, alpha=-scale)


def _check_apart(model: nn.Module) -> None:
    """Raise ConfigError where numbers of one parameter are those of another, and one of both learns.

    Each would be moved along a direction of its own, and one that lies turned there would get memory of its own.
    """
    by_memory: dict[tuple[torch.device, int], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            by_memory.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(
                (name, parameter)
            )
    for there in by_memory.values():
        for (first, one), (second, other) in combinations(there, 2):
            if (one.requires_grad or other.requires_grad) and _overlap(one, other):
                raise ConfigError(
                    f"train.optimizer is mezo, and {second} is a view of {first}: both would be moved, each its own way; let the model "
                    "have one parameter and turn it where it is used, or give each numbers of its own"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two parts of one memory have bytes in common."""
    if not max(begin for begin, _ in map(_span, (one, other))) < min(end for _, end in map(_span, (one, other))):
        return False
    seen = torch.zeros(one.untyped_storage().nbytes(), dtype=torch.bool)
    _bytes_of(one, seen).fill_(True)
    return bool(_bytes_of(other, seen).any())


def _span(value: Tensor) -> tuple[int, int]:
    """(first, end) of its bytes in its memory."""
    reach = int(sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)))
    first = int(value.storage_offset()) * value.itemsize
    return first, first + (reach + 1) * value.itemsize


def _bytes_of(value: Tensor, memory: Tensor) -> Tensor:
    """Those of ``memory``, a number for each byte of that of ``value``, where this lies."""
    size = value.itemsize
    strides = [stride * size for stride in value.stride()]
    return memory.as_strided((*value.shape, size), (*strides, 1), value.storage_offset() * size)


@contextmanager
def _same_draws(device: torch.device, again: bool) -> Iterator[None]:
    """Whether what is drawn here is drawn again by what follows."""
    if not again:
        yield
        return
    devices = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        yield
