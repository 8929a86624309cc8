"""`PassLoop`: a layer run several times in one forward pass, each pass on what the passes before made of its input.

    loop = PassLoop(2)
    update_BLD = loop.run(lambda number, x_BLD, context: layer(norm(x_BLD), context), x_BLD, context)
    x_BLD = x_BLD + update_BLD

With f_t for what pass t of C makes, ``residual`` says what the next pass sees, x_t, and what comes out, y:

    inner   x_t = x_{t-1} + f_t(x_{t-1})         y = x_C
    init    x_t = x_0 + f_t(x_{t-1})             y = x_C
    outer   x_t = f_t(x_{t-1})                   y = x_C + x_0
    none    x_t = f_t(x_{t-1})                   y = x_C
    gated   x_t = x_0 + w_t f_t(x_{t-1})         y = x_0 + f_C(x_{C-1}), with a scale w_t for each pass but the last
"""
# Shapes: B batch, L positions, D width, C passes

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from anabranch.nn.context import recomputed
from anabranch.routing.context import RoutingContext

__all__ = ["OnePass", "PassLoop", "Residual"]

Residual = Literal["inner", "outer", "init", "none", "gated"]
# f_t: (number of the pass, its input, context) -> what it makes
OnePass = Callable[[int, Tensor, Any], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class PassLoop:
    """C passes and how they follow each other. It holds no weights: the layer that runs it has those, and makes them by `new_scale`.

    Attributes:
        passes: C, at least 1. One is f_1 alone, whatever the residual.
        residual: see the module.
        recompute: keep only what goes from pass to pass, and repeat each pass in the backward pass.
    """

    passes: int
    residual: Residual = "inner"
    recompute: bool = False

    @property
    def num_scales(self) -> int:
        """Learned scales: C - 1 where passes are gated."""
        return self.passes - 1 if self.residual == "gated" else 0

    @property
    def goes_around(self) -> bool:
        """Whether `run` gives what is to be added to its input; without any residual it gives all that comes out."""
        return self.residual != "none" or self.passes == 1

    def new_scale(self) -> nn.Parameter | None:
        """w ``[C - 1]``, at zero: a loop that begins as its last pass alone. None where passes are not gated."""
        return nn.Parameter(torch.zeros(self.num_scales)) if self.num_scales else None

    def in_order(self, parts: Sequence[T]) -> list[T]:
        """One of ``parts`` (routers) for each pass, in turn: C of them, or one for all."""
        return [parts[number % len(parts)] for number in range(self.passes)]

    def run(self, one_pass: OnePass, start_BLD: Tensor, context: RoutingContext, scale: Tensor | None = None) -> Tensor:
        """y - x_0 for x_0 = ``start_BLD``, or y where no residual goes around (`goes_around`).

        Args:
            one_pass: ``(number, x_BLD, context) -> f_BLD``, called for numbers 0 ... C - 1.
            start_BLD: x_0.
            context: of the forward pass.
            scale: w ``[C - 1]``, for gated passes.
        """
        x_BLD, sum_BLD = start_BLD, None
        for number in range(self.passes):
            made_BLD = self._one(one_pass, number, x_BLD, context)
            if self.residual == "inner":
                sum_BLD = made_BLD if sum_BLD is None else sum_BLD + made_BLD
            if number == self.passes - 1:
                break
            if self.residual == "inner":
                x_BLD = x_BLD + made_BLD
            elif self.residual == "init":
                x_BLD = start_BLD + made_BLD
            elif self.residual == "gated":
                assert scale is not None, "gated passes have a scale"
                x_BLD = start_BLD + scale[number] * made_BLD
            else:
                x_BLD = made_BLD
        return made_BLD if sum_BLD is None else sum_BLD

    def _one(self, one_pass: OnePass, number: int, x_BLD: Tensor, context: RoutingContext) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(lambda x_BLD, context: one_pass(number, x_BLD, context), x_BLD, context)
        return one_pass(number, x_BLD, context)
