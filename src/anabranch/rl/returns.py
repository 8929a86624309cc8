"""Advantages and returns of a rollout: generalised advantage estimation (Schulman et al., arXiv 1506.02438).

    delta_t = r_t + gamma V(s') - V(s_t)        A_t = delta_t + gamma lambda A_(t+1), until the episode ends

A *terminated* episode is over: nothing follows, and V(s') is 0. A *truncated* one was cut off (a time limit, a finished route): what would
have followed counts by the value of its last observation. Either way the sum of A stops there, since the next row is of another episode.
"""
# Shapes: T steps of a rollout, N environments

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["Ends", "advantages"]


@dataclass(frozen=True)
class Ends:
    """How episodes ended in a rollout.

    Attributes:
        terminated_TN: bool, the step ended the episode for good.
        truncated_TN: bool, the step was the last one because the episode was cut off; a step that is both counts as terminated.
        final_value_TN: V of the last observation of a truncated episode; not looked at elsewhere.
    """

    terminated_TN: Tensor
    truncated_TN: Tensor
    final_value_TN: Tensor


def advantages(
    reward_TN: Tensor,
    value_TN: Tensor,
    last_value_N: Tensor,
    ends: Ends,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_truncated: bool = True,
) -> Tensor:
    """Advantage of every action, ``[T, N]``; with V added it is the return that the critic learns.

    Args:
        reward_TN: of each step.
        value_TN: V of the observation before it.
        last_value_N: V of the observation after the last step.
        ends: where episodes ended.
        gamma: discount of a step.
        gae_lambda: 0 looks one step ahead, 1 to the end of the rollout.
        bootstrap_truncated: count what would have followed a truncated episode; False takes it for terminated, as CaRL's reference does.

    Raises ConfigError if shapes differ, or a discount is not in [0, 1].
    """
    shapes = {tuple(each.shape) for each in (value_TN, ends.terminated_TN, ends.truncated_TN, ends.final_value_TN)}
    if shapes != {tuple(reward_TN.shape)} or tuple(last_value_N.shape) != tuple(reward_TN.shape[1:]):
        raise ConfigError(
            f"rewards are {list(reward_TN.shape)}, values and ends {sorted(map(list, shapes))} and last values "
            f"{list(last_value_N.shape)}; they must be [steps, environments], and [environments] for the last"
        )
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}; it must be from 0 to 1")
    done_TN = ends.terminated_TN | ends.truncated_TN
    cut_TN = ends.truncated_TN & ~ends.terminated_TN
    next_value_TN = torch.cat([value_TN[1:], last_value_N[None]]).masked_fill(done_TN, 0.0)
    if bootstrap_truncated:
        next_value_TN = torch.where(cut_TN, ends.final_value_TN, next_value_TN)
    delta_TN = reward_TN + gamma * next_value_TN - value_TN
    carried_TN = gamma * gae_lambda * (~done_TN).to(reward_TN.dtype)
    advantage_TN = torch.empty_like(reward_TN)
    later_N = torch.zeros_like(last_value_N)
    for step in reversed(range(reward_TN.shape[0])):
        later_N = delta_TN[step] + carried_TN[step] * later_N
        advantage_TN[step] = later_N
    return advantage_TN
