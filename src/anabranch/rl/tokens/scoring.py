"""What is said of a rollout before anything is learned from it: parts put together, and engine and model compared."""
# Shapes: B episodes, L tokens

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.rl.tokens.losses import divergence_of
from anabranch.rl.tokens.trajectory import Samples

__all__ = ["Before", "compared", "joined", "response_of"]


class Before(NamedTuple):
    """What was said of episodes before any is learned from.

    Attributes:
        tensors: old log probabilities, values, those of the reference, and those at temperature 1, ``[B, L]`` each, on the CPU.
        num_flipped: choices of experts that were made otherwise than in the engine.
        num_choices: all of them.
    """

    tensors: tuple[Tensor, ...]
    num_flipped: int
    num_choices: int


def response_of(samples: Samples) -> Tensor:
    """bool ``[B, L]``: all behind the prompt, the world's words too."""
    began_BL = samples.own_BL.cumsum(-1) > 0
    return began_BL & samples.real_BL


def joined(parts: list[Tensor], samples: Samples) -> Tensor:
    """Rows of parts of different lengths as one tensor, 0 behind."""
    found_BL, row = torch.zeros(samples.token_BL.shape), 0
    for part_BL in parts:
        found_BL[row : row + len(part_BL), : part_BL.shape[1]] = part_BL
        row += len(part_BL)
    return found_BL


def compared(rollout_BL: Tensor, training_BL: Tensor, own_BL: Tensor) -> dict[str, float]:
    """What engine and model held the same tokens for."""
    ours, theirs = training_BL[own_BL], rollout_BL[own_BL]
    if not len(ours):
        return {"rollout_gap": 0.0, "rollout_divergence": 0.0}
    # KL(engine || model), of tokens that the engine drew.
    divergence = divergence_of(theirs, ours, "k3").mean()
    return {"rollout_gap": float((ours - theirs).abs().max()), "rollout_divergence": float(divergence)}
