"""Losses of token policies: the clipped surrogate over the policy's own tokens, the critic's, and estimators of a divergence.

    r_t = exp(log pi(t) - log pi_old(t))
    L   = mean_m max(-A_t r_t, -A_t clip(r_t, 1 - low, 1 + high)) + c_kl mean_m KL(pi || pi_ref) - c_e mean_m H

m holds the tokens that the policy has written: prompts, what the world has told it (Router-R1's information) and padding are outside, and
no gradient reaches what was said there. What ``mean_m`` is a mean over is `mean_over`'s business.

Estimators of KL(pi || ref) from one sample, with d = log pi - log ref (Schulman, "Approximating KL divergence", 2020):

    k1 = d                      k2 = d^2 / 2                      k3 = exp(-d) - 1 + d
"""
# Shapes: B sequences, L tokens of one with its prompt and padding

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["ESTIMATORS", "Estimator", "Over", "Surrogate", "divergence_of", "mean_over", "surrogate", "value_loss"]

Estimator = Literal["k1", "k2", "k3"]
Over = Literal["tokens", "sequences", "fixed"]

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: gap,
    "k2": lambda gap: 0.5 * gap**2,
    "k3": lambda gap: torch.exp(-gap) - 1 + gap,
}


def divergence_of(log_prob: Tensor, reference: Tensor, estimator: Estimator = "k3") -> Tensor:
    """An estimate of KL(policy || reference) for each token that the policy drew, in nats. Raises ConfigError for another estimator."""
    if estimator not in ESTIMATORS:
        raise ConfigError(f"the estimator is {estimator!r}; use one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[estimator](log_prob - reference)


def mean_over(value_BL: Tensor, mask_BL: Tensor, over: Over = "tokens", length: int = 1) -> Tensor:
    """The mean of values over what the mask holds; whatever stands elsewhere, NaN too, counts for nothing and gets no gradient.

    Args:
        value_BL: of each token.
        mask_BL: bool.
        over: ``tokens`` weighs all tokens alike (Router-R1, DAPO), ``sequences`` each sequence by the mean of its own tokens (GRPO),
            ``fixed`` each sequence by the sum of its tokens over ``length`` (Dr. GRPO). A sequence without any counts as 0.
        length: see there.

    Raises ConfigError for another ``over``.
    """
    inside_BL = torch.where(mask_BL, value_BL, torch.zeros((), dtype=value_BL.dtype, device=value_BL.device))
    count_B = mask_BL.sum(-1)
    if over == "tokens":
        return inside_BL.sum() / count_B.sum().clamp_min(1)
    if over == "sequences":
        return (inside_BL.sum(-1) / count_B.clamp_min(1)).mean()
    if over == "fixed":
        return inside_BL.sum(-1).mean() / length
    raise ConfigError(f"a mean is over {over!r}; use tokens, sequences or fixed")


@dataclass(frozen=True)
class Surrogate:
    """What the clipped surrogate says of each token.

    Attributes:
        loss_BL: what is to be made small; 0 outside of the mask.
        ratio_BL: of the policy to the old one; 1 outside of the mask.
        clipped_BL: bool, the clip took the gradient away.
    """

    loss_BL: Tensor
    ratio_BL: Tensor
    clipped_BL: Tensor


def surrogate(
    log_prob_BL: Tensor,
    old_BL: Tensor,
    advantage_BL: Tensor,
    mask_BL: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    whole_sequences: bool = False,
) -> Surrogate:
    """The clipped surrogate, token by token.

    Args:
        log_prob_BL: of each token as the policy is now.
        old_BL: as it was.
        advantage_BL: of each token.
        mask_BL: the policy's own tokens. What the others hold does not matter.
        clip_low, clip_high: the ratio counts from 1 - low to 1 + high (DAPO lets it rise further than it lets it fall).
        whole_sequences: one ratio for all tokens of a sequence, the geometric mean of theirs (GSPO); the gradient goes to each token.
    """
    zero = torch.zeros((), dtype=log_prob_BL.dtype, device=log_prob_BL.device)
    gap_BL = torch.where(mask_BL, log_prob_BL - old_BL, zero)
    if whole_sequences:
        mean_B1 = gap_BL.sum(-1, keepdim=True) / mask_BL.sum(-1, keepdim=True).clamp_min(1)
        # The value is the sequence's, the gradient each token's.
        gap_BL = torch.where(mask_BL, mean_B1.detach() + gap_BL - gap_BL.detach(), zero)
    ratio_BL, advantage_BL = gap_BL.exp(), torch.where(mask_BL, advantage_BL, zero)
    plain_BL = -advantage_BL * ratio_BL
    bounded_BL = -advantage_BL * ratio_BL.clamp(1 - clip_low, 1 + clip_high)
    return Surrogate(torch.maximum(plain_BL, bounded_BL), ratio_BL, (bounded_BL > plain_BL) & mask_BL)


def value_loss(
    value_BL: Tensor, old_BL: Tensor, return_BL: Tensor, mask_BL: Tensor, *, clip: float | None = None
) -> Tensor:
    """Half the squared error of the critic, a mean over the mask; the larger of the clipped and the plain one.

    Args:
        value_BL: what the critic says before each token.
        old_BL: what it said when advantages were made.
        return_BL: what it should have said.
        mask_BL: the tokens that count.
        clip: its say moves at most so far from ``old_BL``; None for no clip.
    """
    error_BL = (value_BL - return_BL) ** 2
    if clip is not None:
        moved_BL = old_BL + (value_BL - old_BL).clamp(-clip, clip)
        error_BL = torch.maximum(error_BL, (moved_BL - return_BL) ** 2)
    return 0.5 * mean_over(error_BL, mask_BL)
