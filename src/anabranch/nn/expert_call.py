"""What experts are asked to compute: the record that travels through every back end of `anabranch.nn.grouped`, forward and back."""
# Shapes: N items, E experts, K choices per item, R = N K rows (used ones first), D width, F hidden (2F: gate, then up; F without a gate)

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anabranch.routing.dispatch import DispatchPlan

__all__ = ["ExpertCall", "Gradients", "Needed", "WeightOn"]

# Where the routing's weights act: on what experts give, or on what they get.
WeightOn = Literal["output", "input"]


class ExpertCall(NamedTuple):
    """The operands of one call and how to compute with them: six tensors, then the options.

    A tuple, because operators of torch take flat arguments: ``*call`` are those of the expert operator, in the order of its schema.

    Attributes:
        x_ND: the items.
        choice_R: see `DispatchPlan`, as is ``offset_E``.
        weight_NK: of each choice.
        w13_EFD: [E, 2F, D], or [E, F, D] for an activation without a gate.
        w2_EDF: [E, D, F], or [E, O, F] for an activation that leads to another width, O.
        on_input: weigh the inputs of experts, not their outputs.
        dtype: to compute in, and of the result.
        backend: ``native``, ``torch``, or the better of them: ``auto``.
        activation: a name of `anabranch.nn.activation`.
    """

    x_ND: Tensor
    choice_R: Tensor
    offset_E: Tensor
    weight_NK: Tensor
    w13_EFD: Tensor
    w2_EDF: Tensor
    on_input: bool
    dtype: torch.dtype
    backend: str
    activation: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd saves; ``ExpertCall(*call.tensors, *call.options)`` is the call."""
        return self[:6]

    @property
    def options(self) -> tuple[Any, ...]:
        """What is no tensor."""
        return self[6:]

    @property
    def out_dim(self) -> int:
        """Width of the result."""
        return self.w2_EDF.shape[1]

    @property
    def plan(self) -> DispatchPlan:
        """Where the items go."""
        return DispatchPlan(self.choice_R, self.offset_E, *self.weight_NK.shape)

    def cast(self) -> "ExpertCall":
        """Items and matrices in the dtype to compute in; autograd sees the casts."""
        x_ND, w13_EFD, w2_EDF = (value.to(self.dtype) for value in (self.x_ND, self.w13_EFD, self.w2_EDF))
        return self._replace(x_ND=x_ND, w13_EFD=w13_EFD, w2_EDF=w2_EDF)


class Needed(NamedTuple):
    """Whose gradients a backward pass must compute; that of ``weight`` comes with any."""

    x: bool
    weight: bool
    w13: bool
    w2: bool


class Gradients(NamedTuple):
    """Of the operands that may learn, in the order of `Needed`; empty tensors where they were not needed."""

    x_ND: Tensor
    weight_NK: Tensor
    w13_EFD: Tensor
    w2_EDF: Tensor
