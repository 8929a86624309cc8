"""Slopes of losses by which sparse layers choose what they keep: squared for Fisher information, as they are for SNIP."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from anabranch.errors import InputError

__all__ = ["Scored", "slopes_of"]


class Scored(Protocol):
    """A layer whose entries can be scored."""

    def score(self) -> Tensor:
        """A leaf that passes use from here on, whose gradient scores the entries."""

    def unscore(self) -> None:
        """Passes use it no more."""


def slopes_of(layers: Sequence[Scored], losses: Iterable[Tensor], *, power: int) -> list[Tensor]:
    """The sum over ``losses`` of the slopes of each layer's entries to a ``power``, of the shape of its scores.

    Args:
        layers: what is scored; none of them is scored any more when this ends, however it ends.
        losses: made while this goes over them, since what was made before does not go by what is scored.
        power: 1 or 2.

    A layer that no loss goes through, such as an expert that was never chosen, has zeros. Raises InputError where there is no loss, none
    goes through any layer, or a slope is NaN or infinite: any choice by those would be arbitrary.
    """
    scored: list[Tensor] = []
    count = 0
    try:
        scored += [layer.score() for layer in layers]
        total = [torch.zeros_like(leaf) for leaf in scored]
        for loss in losses:
            count += 1
            found = torch.autograd.grad(loss, scored, allow_unused=True)
            total = [sum_ if slope is None else sum_ + slope**power for sum_, slope in zip(total, found, strict=True)]
    finally:
        for layer in layers:
            layer.unscore()
    if not count:
        raise InputError("there is no loss to choose entries by; give that of one example at least")
    if not all(bool(torch.isfinite(one).all()) for one in total):
        raise InputError(
            "slopes of the losses are NaN or infinite, so no entries can be chosen by them; is the model itself sound?"
        )
    if not any(bool(one.any()) for one in total):
        raise InputError(
            "no loss has a slope at any layer whose entries are chosen; make losses while they are gone over, from this model"
        )
    return total
