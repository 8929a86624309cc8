"""Steps of phase 1: Adam or plain gradient descent on vectors of many requests, each for itself."""
# Shapes: B rows, S routed layers, E destinations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.adapters.rewiring.state import MOST_SHIFT
from anabranch.rewiring import Rewiring

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def layer_weights(config: Rewiring, confidence_BS: Tensor) -> Tensor:
    """[B, S]: what each layer's step is multiplied by.

    It scales steps rather than gradients, which is the same for gradient descent, while Adam knows no scale of a gradient.
    """
    if config.layers == "all":
        return torch.ones_like(confidence_BS)
    if config.choice == "soft":
        # C is large where a router is undecided.
        if config.layers == "uncertain":
            return confidence_BS / confidence_BS.amax(-1, keepdim=True).clamp_min(1e-20)
        return confidence_BS.amin(-1, keepdim=True).clamp_min(1e-20) / confidence_BS.clamp_min(1e-20)
    layers = confidence_BS.shape[1]
    count = max(1, math.floor(config.r * layers + 0.5))
    order_BS = confidence_BS.sort(dim=-1, descending=config.layers == "uncertain", stable=True).indices
    return torch.zeros_like(confidence_BS).scatter(1, order_BS[:, :count], 1.0)


class Optimizer:
    """One phase's optimiser; its moments are each row's own.

    Args:
        config: which, and with what.
        like: vectors of each layer, ``[B, E]``.
        centred: whether a layer's vectors are kept at mean zero: where a constant changes nothing.
    """

    def __init__(self, config: Rewiring, like: Sequence[Tensor], centred: Sequence[bool]) -> None:
        self._is_adam, self._centred = config.optimizer == "adam", centred
        self._first = [torch.zeros_like(delta_BE) for delta_BE in like]
        self._second = [torch.zeros_like(delta_BE) for delta_BE in like]
        self._number = 0

    def step(
        self,
        delta: Sequence[Tensor],
        gradient: Sequence[Tensor],
        active_B: Tensor,
        size_B: Tensor,
        weight_BS: Tensor,
    ) -> list[Tensor]:
        """The vectors behind one more step; those of rows that are not active stay.

        A row takes part in all steps until it is not active any more.
        """
        self._number += 1
        stepped = []
        for place, (delta_BE, gradient_BE) in enumerate(zip(delta, _without_noise(gradient), strict=True)):
            update_BE = self._adam(place, gradient_BE) if self._is_adam else gradient_BE
            scale_B = size_B.to(delta_BE) * weight_BS[:, place].to(delta_BE)
            new_BE = delta_BE - scale_B[:, None] * update_BE
            if self._centred[place]:
                new_BE = new_BE - new_BE.mean(-1, keepdim=True)
            new_BE = new_BE.clamp(-MOST_SHIFT, MOST_SHIFT)
            stepped.append(torch.where(active_B[:, None], new_BE, delta_BE))
        return stepped

    def _adam(self, place: int, gradient_BE: Tensor) -> Tensor:
        (first, second), number = _BETAS, self._number
        self._first[place] = first * self._first[place] + (1 - first) * gradient_BE
        self._second[place] = second * self._second[place] + (1 - second) * gradient_BE.square()
        root_BE = (self._second[place] / (1 - second**number)).sqrt()
        return self._first[place] / (1 - first**number) / (root_BE + _EPSILON)


def _without_noise(gradient: Sequence[Tensor]) -> list[Tensor]:
    """Gradients without what rounding leaves where there is none: Adam would make whole steps of it.

    Experts that no token of a row chose have none where weights are normalised over the chosen.
    """
    peak_B = torch.stack([gradient_BE.abs().amax(-1) for gradient_BE in gradient]).amax(0)
    floor_B1 = (16 * torch.finfo(gradient[0].dtype).eps * peak_B)[:, None]
    return [torch.where(gradient_BE.abs() <= floor_B1, 0.0, gradient_BE) for gradient_BE in gradient]
