"""`Numbers`: what an adapter has for one linear layer, whatever its kind: how it is stored, what computes with it, what it makes of W.

The kinds are `anabranch.adapters.low_rank.Pair` (LoRA), `anabranch.adapters.dora.Decomposed`, `anabranch.adapters.scaling.Scale` (IA3) and
`anabranch.adapters.skills.Skills` (Poly). Reading, fitting, putting on, merging and saving know them by what is here, and nothing else.
"""
# Shapes: O outputs, C inputs

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn import Linear

__all__ = ["Holder", "Numbers", "frozen_as"]


class Numbers(ABC):
    """Interface of the numbers of one linear layer.

    Attributes:
        what: the kind, for people.
        holds: what a file calls its tensors, for messages.
        merges: whether a matrix can take them in, see `merged`.
    """

    what: ClassVar[str]
    holds: ClassVar[str]
    merges: ClassVar[bool] = True

    @property
    @abstractmethod
    def sizes(self) -> tuple[int | None, int | None]:
        """(inputs, outputs) of the layer, None where they do not say."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """By the names that peft gives them behind that of the layer."""

    @abstractmethod
    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """The same for a layer whose outputs stand in another order, into which ``order`` puts the rows of a matrix."""

    @abstractmethod
    def config(self, *, dropout: float = 0.0, learns: bool = False) -> Linear.Config:
        """The layer that computes with them, see `anabranch.nn.linear`; ``dropout`` is of what goes into it, while it ``learns``."""

    def merged(self, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the matrix and its bias are with them in, in the types that they have. Raises ConfigError where there is no such matrix."""
        raise ConfigError(f"{self.what} is in no matrix")


@runtime_checkable
class Holder(Protocol):
    """A layer that computes with `Numbers` of its kind, of the sizes that its config says."""

    def put(self, numbers: Any, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take them over, on ``device``."""

    def numbers(self) -> Numbers:
        """As they are now."""


def frozen_as(tensor: Tensor, device: torch.device | None, *, trainable: bool) -> nn.Parameter:
    """A parameter with a copy of ``tensor``; of 16 bits it is kept in float32, as peft keeps it."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return nn.Parameter(tensor.detach().to(device=device, dtype=kind, copy=True), requires_grad=trainable)
