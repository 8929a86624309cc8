"""Weights that several calls of one forward pass share: their gradients add up in place, in each backward pass by itself."""
# Shapes: E experts, D width, F hidden (2F: gate, then up)

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["GradientSums", "gather_gradients"]

Pair = tuple[Tensor, Tensor]


class PassSums:
    """What has gathered in one backward pass: ``pair``, the gradients of both weights, or None."""

    def __init__(self) -> None:
        self.pair: Pair | None = None

    def take(self) -> Pair | None:
        """The pair; it is forgotten here."""
        pair = self.pair
        self.forget()
        return pair

    def forget(self) -> None:
        """Let go of the pair."""
        self.pair = None


class GradientSums:
    """Where the gradients of one pair of weights gather.

    Autograd's engine gives every backward pass a number of its own, also one that runs inside another (a hook that differentiates, a
    recomputation). Each pass gathers by itself and owns what it gathers. So a pass that never comes to the weights (one that is asked
    for other gradients, or that an exception ends) takes its sums with it: nothing of them is found by the next.
    """

    def __init__(self) -> None:
        self._passes: WeakValueDictionary[int, PassSums] = WeakValueDictionary()

    def of_pass(self) -> "PassSums | None":
        """What has gathered in the backward pass that runs; None where the engine counts no passes and autograd must add gradients up."""
        number = torch._C._current_graph_task_id()
        if number < 0 or torch.compiler.is_compiling():
            return None
        sums = self._passes.get(number)
        if sums is None:
            self._passes[number] = sums = PassSums()
            # The engine keeps a pass's callbacks for as long as the pass, and nobody else keeps the sums.
            torch.autograd.Variable._execution_engine.queue_callback(sums.forget)
        return sums


def gather_gradients(w13_EFD: Tensor, w2_EDF: Tensor) -> tuple[GradientSums, Tensor, Tensor]:
    """The weights, for several calls of `expert_mlp` in one forward pass, and where their gradients gather.

    Autograd would hold a second gradient of full size while it adds the calls' gradients up. Here each call adds its own in place, and
    the weights get the sum when all have.
    """
    sums = GradientSums()
    return sums, *_Gathered.apply(sums, w13_EFD, w2_EDF)


class _Gathered(torch.autograd.Function):
    """The weights as they are. Its backward pass runs after those of all calls, and returns the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, sums: GradientSums, w13_EFD: Tensor, w2_EDF: Tensor) -> Pair:
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return w13_EFD.view_as(w13_EFD), w2_EDF.view_as(w2_EDF)

    @staticmethod
    def backward(ctx: Any, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        sums = ctx.sums.of_pass()
        pair = (sums and sums.take()) or (None, None)
        return None, *(_add(sum_, other) for sum_, other in zip(pair, others, strict=True))


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second
