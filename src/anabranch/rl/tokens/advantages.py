"""Advantages of token policies: of a group's rewards (GRPO, RLOO), or token by token with a critic (GAE); rewards and drift.

GRPO     A = (R - mean of the group) / (deviation of the group + 1e-6)            the same for all tokens of an answer
RLOO     A = R - mean of the others of the group
GAE      over the tokens that count as steps, in their order: what stands between two of them (a prompt, information) is no step
"""
# Shapes: Q questions, G answers to each, B sequences, L tokens of one

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["Baseline", "Scale", "group_advantages", "rewards_by_token", "token_advantages", "whitened"]

Baseline = Literal["mean", "others", "none"]
Scale = Literal["group", "batch", "none"]

_EPS = 1e-6


def group_advantages(reward_QG: Tensor, *, baseline: Baseline = "mean", scale: Scale = "group") -> Tensor:
    """Advantage of each answer against the others to its question, ``[Q, G]``.

    Args:
        reward_QG: of each answer.
        baseline: what is taken from a reward: the ``mean`` of its group (GRPO), the mean of the ``others`` (RLOO), or ``none``.
        scale: what it is divided by: the deviation (of G - 1) of its ``group``, that of the whole ``batch``, or ``none`` (Dr. GRPO).

    A group whose answers are all worth the same has advantages of exactly 0. Raises ConfigError for groups of one where they are compared,
    for rewards that are not finite, and for another name.
    """
    if reward_QG.dim() != 2 or not reward_QG.numel():
        raise ConfigError(f"rewards have shape {list(reward_QG.shape)}; they must be [questions, answers]")
    if not bool(torch.isfinite(reward_QG).all()):
        raise ConfigError("a reward is NaN or infinite; a world must give numbers")
    size = reward_QG.shape[1]
    if size < 2 and (baseline != "none" or scale == "group"):
        raise ConfigError("a group has 1 answer, which cannot be compared with others; use at least 2")
    if baseline not in ("mean", "others", "none") or scale not in ("group", "batch", "none"):
        raise ConfigError(
            f"baseline is {baseline!r} and scale {scale!r}; use mean, others, none, and group, batch, none"
        )
    # Exactly 0 where all are the same: sums of equal numbers round.
    is_even_Q1 = (reward_QG == reward_QG[:, :1]).all(-1, keepdim=True)
    found_QG = reward_QG
    if baseline != "none":
        found_QG = reward_QG - reward_QG.mean(-1, keepdim=True)
        found_QG = found_QG.masked_fill(is_even_Q1, 0.0)
    if baseline == "others":
        # R - (S - R) / (G - 1) = (R - mean) G / (G - 1).
        found_QG = found_QG * (size / (size - 1))
    if scale == "group":
        return found_QG / (reward_QG.std(-1, keepdim=True) + _EPS)
    if scale == "batch":
        return found_QG / (reward_QG.std() + _EPS) if reward_QG.numel() > 1 else found_QG
    return found_QG


def rewards_by_token(reward_B: Tensor, own_BL: Tensor, drift_BL: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """An answer's reward on the last of its own tokens, and the price of drift from a reference on each of them, ``[B, L]``.

    Args:
        reward_B: of each sequence.
        own_BL: bool, the policy's own tokens.
        drift_BL: an estimate of the divergence at each, such as log pi_old - log pi_ref (Router-R1).
        weight: what a nat of it costs.

    A sequence without a token of the policy's own is rewarded nowhere.
    """
    place_L = torch.arange(own_BL.shape[1], device=own_BL.device)
    last_B = torch.where(own_BL, place_L, -1).amax(-1)
    is_last_BL = place_L[None] == last_B[:, None]
    found_BL = torch.where(is_last_BL, reward_B[:, None].to(torch.float32), 0.0)
    if drift_BL is not None and weight:
        found_BL = found_BL - weight * torch.where(own_BL, drift_BL, 0.0)
    return found_BL


def token_advantages(
    reward_BL: Tensor, value_BL: Tensor, step_BL: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0
) -> Tensor:
    """Generalised advantage estimation over the tokens that are steps, ``[B, L]``; 0 elsewhere. An answer that ends is over.

    Args:
        reward_BL: of each token.
        value_BL: what the critic says before each; only those of steps are looked at.
        step_BL: bool, which tokens are steps: the policy's own; or all of a response, as Router-R1's code has it.
        gamma, gae_lambda: see `anabranch.rl.advantages`.
    """
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}; it must be from 0 to 1")
    found_BL = torch.zeros_like(value_BL)
    later_B, next_value_B = torch.zeros_like(value_BL[:, 0]), torch.zeros_like(value_BL[:, 0])
    for place in reversed(range(value_BL.shape[1])):
        is_step_B = step_BL[:, place]
        value_B = value_BL[:, place]
        made_B = reward_BL[:, place] + gamma * next_value_B - value_B + gamma * gae_lambda * later_B
        later_B = torch.where(is_step_B, made_B, later_B)
        next_value_B = torch.where(is_step_B, value_B, next_value_B)
        found_BL[:, place] = torch.where(is_step_B, made_B, torch.zeros_like(made_B))
    return found_BL


def whitened(value_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean 0 and deviation 1 (of N - 1) over the mask, 0 elsewhere; as they are less their mean where there is one alone."""
    inside = value_BL[mask_BL]
    if not len(inside):
        return torch.zeros_like(value_BL)
    deviation = inside.std() if len(inside) > 1 else torch.ones(())
    return torch.where(mask_BL, (value_BL - inside.mean()) / (deviation + 1e-8), torch.zeros_like(value_BL))
