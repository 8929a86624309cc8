"""The control knob: from a trained router to any amount of depth, without training.

p from -1 to -0.5: all skip   -> the router         t = (p + 1) / 0.5
p from -0.5 to 0.5: the router -> the plain model   t = p + 0.5
p from 0.5 to 1:   plain model -> all repeat        t = (p - 0.5) / 0.5
probabilities (1 - t) first + t second, then the largest
"""
# Shapes: B sequences, C decisions (0 skip, 1 run, 2 run twice)

import torch
from torch import Tensor

from anabranch.depth.decisions import EXECUTE, REPEAT, SKIP
from anabranch.depth.routed import PLAIN, check_control

__all__ = ["controlled"]


def controlled(probability_BC: Tensor, control: float) -> Tensor:
    """The probabilities that ``control`` makes of a router's, ``[B, 3]``. Raises ConfigError for a control outside -1 to 1."""
    control = check_control(control)
    if control == PLAIN:
        return probability_BC
    ends = torch.eye(probability_BC.shape[-1], dtype=probability_BC.dtype, device=probability_BC.device)
    if control < PLAIN:
        first, second, share = ends[SKIP], probability_BC, (control + 1) / 0.5
    elif control <= 0.5:
        first, second, share = probability_BC, ends[EXECUTE], control + 0.5
    else:
        first, second, share = ends[EXECUTE], ends[REPEAT], (control - 0.5) / 0.5
    return ((1 - share) * first + share * second).expand_as(probability_BC)
