"""The loss of routers: focal, with weights of the effective number of labels of each decision.

alpha_c ~ (1 - beta) / (1 - beta^{n_c}),   sum_c alpha_c = 3
loss = -(1/L) sum_l alpha_y (1 - p_{l,y})^gamma log p_{l,y}
"""
# Shapes: N questions, L blocks, C decisions

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.depth.duo_llm.parts import focal_loss
from anabranch.errors import ConfigError

__all__ = ["class_balance", "routing_loss"]


def class_balance(count_C: Tensor | Sequence[int], beta: float = 0.999) -> Tensor:
    """alpha_C in float32, of how often each decision is a label (Cui et al. 2019, arXiv 1901.05555).

    They sum to the number of decisions that occur. One that never occurs has 0: no label asks for it, and were it weighed as one that
    occurred once, all others would all but vanish.

    Raises ConfigError for a beta that is not in [0, 1), or no label at all.
    """
    if not 0 <= beta < 1:
        raise ConfigError(f"beta is {beta}; it must be from 0 to below 1")
    count_C = torch.as_tensor(count_C, dtype=torch.float64)
    occurs_C = count_C > 0
    if not bool(occurs_C.any()):
        raise ConfigError("there is no label to weigh; give at least one")
    reach_C = torch.ones_like(count_C) if beta == 0 else -torch.expm1(count_C * math.log(beta))
    weight_C = torch.where(occurs_C, (1 - beta) / reach_C.masked_fill(~occurs_C, 1.0), 0.0)
    return (weight_C * occurs_C.sum() / weight_C.sum()).float()


def routing_loss(
    logit_LNC: Tensor, decision_LN: Tensor, *, gamma: float = 2.0, alpha_C: Tensor | None = None
) -> Tensor:
    """The mean over blocks and questions. gamma = 0 is weighted cross-entropy."""
    return focal_loss(logit_LNC.flatten(0, 1), decision_LN.flatten(), gamma=gamma, weight_E=alpha_C)
