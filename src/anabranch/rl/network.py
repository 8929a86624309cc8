"""`ActorCritic`: the policy and the critic of an agent, two networks that share nothing.

The critic may see more than the policy (an *asymmetric critic*): what an environment keeps from whoever acts, such as how much of the
route is left, helps to judge a state in training and is not needed afterwards.
"""
# Shapes: B rows, D numbers of an observation (the policy's first, the critic's own behind them), P parameters of an action's distribution

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.rl.policies import Actions, Kind, kind_of

__all__ = ["ActorCritic", "Layout"]

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
# Weights of one network.
_MOST_NUMBERS = 500_000_000


@dataclass(frozen=True)
class Layout:
    """What goes in and out of an agent.

    Attributes:
        num_observed: numbers of an observation that the policy sees.
        num_private: those behind them, which only the critic sees.
        actions: what may be done.
    """

    num_observed: int
    num_private: int
    actions: Actions

    def __post_init__(self) -> None:
        if self.num_observed < 1 or self.num_private < 0:
            raise ConfigError(f"an observation has {self.num_observed} numbers; a policy needs at least one")


class ActorCritic(nn.Module):
    """Two networks of dense layers.

    Weights are orthogonal, with gain sqrt(2) in between, 0.01 before the action and 1 before the value; biases are 0. So at first every
    action is about as likely as the others. A normal policy's deviation is learned and does not depend on the observation; it begins at 1.

    Args:
        layout: of observations and actions.
        hidden: widths of the layers of each network.
        activation: ``tanh`` or ``relu``.
        policy: ``categorical``, ``normal``, ``beta``, or ``auto``, see `kind_of`.
        scale: observations are divided by it, number by number; empty for as they are.

    Raises ConfigError if the policy's kind does not fit the actions, or ``scale`` the observations.
    """

    scale_D: Tensor

    def __init__(
        self,
        layout: Layout,
        *,
        hidden: tuple[int, ...] = (64, 64),
        activation: Literal["tanh", "relu"] = "tanh",
        policy: str = "auto",
        scale: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        width = layout.num_observed + layout.num_private
        if scale and (len(scale) != width or not all(value > 0 for value in scale)):
            raise ConfigError(f"observation_scale has {len(scale)} numbers; use {width} above 0, or none")
        _check_size(width, hidden)
        self.layout = layout
        self.kind: Kind = kind_of(policy, layout.actions)
        self.register_buffer("scale_D", torch.tensor(scale or [1.0] * width), persistent=False)
        # The mean alone of a normal policy comes from the observation.
        given = layout.actions.num_numbers if self.kind.name == "normal" else self.kind.num_parameters
        self.policy = _dense(layout.num_observed, hidden, given, activation, last_gain=0.01)
        self.critic = _dense(width, hidden, 1, activation, last_gain=1.0)
        if self.kind.name == "normal":
            self.log_deviation_A = nn.Parameter(torch.zeros(given))

    def forward(self, observation_BD: Tensor, part: Literal["both", "policy", "value"] = "both") -> Any:
        """Parameters of the action's distribution ``[B, P]`` and the value ``[B]``; or one of them alone."""
        if part == "policy":
            return self._acts(observation_BD)
        if part == "value":
            return self._judges(observation_BD)
        return self._acts(observation_BD), self._judges(observation_BD)

    def _acts(self, observation_BD: Tensor) -> Tensor:
        seen = self.layout.num_observed
        given = self.policy((observation_BD / self.scale_D)[:, :seen])
        if self.kind.name != "normal":
            return given
        return torch.cat([given, self.log_deviation_A.expand_as(given)], dim=-1)

    def _judges(self, observation_BD: Tensor) -> Tensor:
        return self.critic(observation_BD / self.scale_D).squeeze(-1)


def _check_size(width: int, hidden: tuple[int, ...]) -> None:
    """Raise ConfigError for networks that nobody trains by acting, before memory is taken."""
    numbers = sum(before * after for before, after in pairwise((width, *hidden)))
    if numbers > _MOST_NUMBERS:
        raise ConfigError(
            f"hidden is {list(hidden)}, which takes {numbers:.3g} numbers in each network; use layers of at most {_MOST_NUMBERS:,} together"
        )


def _dense(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str, *, last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *hidden)):
        layers += [_linear(before, after, math.sqrt(2)), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, _linear((inputs, *hidden)[-1], outputs, last_gain))


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
