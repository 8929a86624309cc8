"""Batch norms under micro-batches: running statistics once per batch.

A micro-batch is normalised by its own mean and variance, as in the paper. What a batch norm *tracks* is, if that is deferred, what one pass
over the whole batch would have tracked: sums, sums of squares and counts of all micro-batches give mean = S / c and var = Q / c - mean^2,
and running values move once per batch (the variance times c / (c - 1), as torch stores it).
"""
# Shapes: C channels

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["DeferredStatistics", "untracked"]


@contextmanager
def untracked(modules: Iterable[_BatchNorm]) -> Iterator[None]:
    """No batch norm of ``modules`` moves its running values in the block; in training none of them uses these."""
    tracking = [module for module in modules if module.training and module.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


class DeferredStatistics:
    """Sums of one batch norm over the micro-batches of a batch."""

    def __init__(self, module: _BatchNorm) -> None:
        self.module = module
        self.clear()

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> list["DeferredStatistics"]:
        """One of each batch norm that tracks."""
        return [cls(module) for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]

    def clear(self) -> None:
        """Begin a batch."""
        self._count = 0
        self._sum_C: Tensor | None = None
        self._square_C: Tensor | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The inputs that the batch norm sees in the block belong to the batch."""
        handle = self.module.register_forward_pre_hook(self._count_in)
        try:
            yield
        finally:
            handle.remove()

    def _count_in(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not module.training:
            return
        # Squares cancel against the mean's: in float64 nothing of float32 is lost.
        x = inputs[0].detach().double()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        sum_C, square_C = x.sum(dims), (x * x).sum(dims)
        self._sum_C = sum_C if self._sum_C is None else self._sum_C + sum_C
        self._square_C = square_C if self._square_C is None else self._square_C + square_C
        self._count += x.numel() // x.shape[1]

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running values by what was counted, and begin the next batch."""
        module = self.module
        if self._sum_C is None or self._square_C is None or module.running_mean is None:
            return
        mean_C = self._sum_C / self._count
        variance_C = (self._square_C / self._count - mean_C**2).clamp_min(0)
        variance_C *= self._count / max(self._count - 1, 1)
        assert module.num_batches_tracked is not None
        assert module.running_var is not None
        module.num_batches_tracked += 1
        share = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        for running, new in ((module.running_mean, mean_C), (module.running_var, variance_C)):
            running.lerp_(new.to(running.dtype), share)
        self.clear()
