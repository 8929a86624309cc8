"""`ActorCritic`: the policy and the critic of an agent, two networks that share nothing.

The critic may see more than the policy (an *asymmetric critic*): what an environment keeps from whoever acts, such as how much of the
route is left, helps to judge a state in training and is not needed afterwards.
"""
# Shapes: B rows, D numbers of an observation (the policy's first, its picture last among them, the critic's own behind all), P parameters
# of an action's distribution

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.rl.averages import Averages
from anabranch.rl.pictures import Pictures
from anabranch.rl.policies import Actions, Kind, kind_of

__all__ = ["ActorCritic", "Layout"]

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
# Weights of one network.
_MOST_NUMBERS = 500_000_000
# Of a picture, where there is no layer to say.
_FEATURES = 64


@dataclass(frozen=True)
class Layout:
    """What goes in and out of an agent.

    Attributes:
        num_observed: numbers of an observation that the policy sees.
        num_private: those behind them, which only the critic sees.
        actions: what may be done.
        picture: channels, height and width of a picture, which the last of the numbers that the policy sees are; None for none.
        brightest: what the numbers of a picture are divided by, such as 255.
    """

    num_observed: int
    num_private: int
    actions: Actions
    picture: tuple[int, int, int] | None = None
    brightest: float = 1.0

    def __post_init__(self) -> None:
        if self.num_observed < 1 or self.num_private < 0:
            raise ConfigError(f"an observation has {self.num_observed} numbers; a policy needs at least one")
        if self.num_pictured > self.num_observed:
            raise ConfigError(f"a picture has {self.num_pictured} numbers, and {self.num_observed} are observed")

    @property
    def num_pictured(self) -> int:
        """Numbers of the picture."""
        return math.prod(self.picture) if self.picture else 0


class ActorCritic(nn.Module):
    """Two networks of dense layers; before each, where there is a picture, a convolutional one of its own (`Pictures`).

    Weights are orthogonal, with gain sqrt(2) in between, 0.01 before the action and 1 before the value; biases are 0. So at first every
    action is about as likely as the others. A normal policy's deviation is learned and does not depend on the observation; it begins at 1.

    Args:
        layout: of observations and actions.
        hidden: widths of the layers of each network.
        activation: ``tanh`` or ``relu``.
        policy: ``categorical``, ``normal``, ``beta``, or ``auto``, see `kind_of`.
        scale: observations are divided by it, number by number but for a picture; empty for as they are.
        normalized_clip: observations, but for a picture, are normalised by running averages, and cut off at so many deviations; None for as
            they are.

    Attributes:
        averages: of observations, which are taken in by `take_in` alone; None where they are not normalised.

    Raises ConfigError if the policy's kind does not fit the actions, ``scale`` the observations, or both they and averages are asked for.
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
        normalized_clip: float | None = None,
    ) -> None:
        super().__init__()
        width = layout.num_observed + layout.num_private - layout.num_pictured
        if scale and (len(scale) != width or not all(value > 0 for value in scale)):
            raise ConfigError(f"observation_scale has {len(scale)} numbers; use {width} above 0, or none")
        if scale and normalized_clip is not None:
            raise ConfigError(
                "normalize_observations makes deviations 1, whatever observation_scale says; leave one of them out"
            )
        self.averages = Averages(width, normalized_clip) if normalized_clip is not None and width else None
        # Features of a picture are as many as the first layer is wide.
        features = (hidden[0] if hidden else _FEATURES) if layout.picture else 0
        _check_size(width + features, hidden)
        self.layout = layout
        self.kind: Kind = kind_of(policy, layout.actions)
        plain = layout.num_observed - layout.num_pictured
        told = list(scale) or [1.0] * width
        whole = [*told[:plain], *[layout.brightest] * layout.num_pictured, *told[plain:]]
        self.register_buffer("scale_D", torch.tensor(whole), persistent=False)
        # The mean alone of a normal policy comes from the observation.
        given = layout.actions.num_numbers if self.kind.name == "normal" else self.kind.num_parameters
        self.policy = _dense(plain + features, hidden, given, activation, last_gain=0.01)
        self.critic = _dense(width + features, hidden, 1, activation, last_gain=1.0)
        if layout.picture:
            self.policy_pictures, self.critic_pictures = (Pictures(layout.picture, features) for _ in range(2))
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
        scaled_BD = self._scaled(observation_BD)[:, : self.layout.num_observed]
        given = self.policy(self._looked(scaled_BD, self.policy_pictures) if self.layout.picture else scaled_BD)
        if self.kind.name != "normal":
            return given
        return torch.cat([given, self.log_deviation_A.expand_as(given)], dim=-1)

    def _judges(self, observation_BD: Tensor) -> Tensor:
        scaled_BD = self._scaled(observation_BD)
        seen_BX = self._looked(scaled_BD, self.critic_pictures) if self.layout.picture else scaled_BD
        return self.critic(seen_BX).squeeze(-1)

    def take_in(self, observation_BD: Tensor, rollout: int) -> None:
        """Have the averages know what rollout number ``rollout`` saw; nothing where there are none, or they know it."""
        if self.averages is not None:
            self.averages.take_in(self._plain(observation_BD), rollout)

    def _plain(self, observation_BD: Tensor) -> Tensor:
        """Without the picture."""
        if not self.layout.picture:
            return observation_BD
        end = self.layout.num_observed
        return torch.cat([observation_BD[:, : end - self.layout.num_pictured], observation_BD[:, end:]], dim=1)

    def _scaled(self, observation_BD: Tensor) -> Tensor:
        """As networks see it."""
        scaled_BD = observation_BD / self.scale_D
        if self.averages is None:
            return scaled_BD
        plain_BD, end = self.averages(self._plain(scaled_BD)), self.layout.num_observed
        begin = end - self.layout.num_pictured
        return torch.cat([plain_BD[:, :begin], scaled_BD[:, begin:end], plain_BD[:, begin:]], dim=1)

    def _looked(self, scaled_BD: Tensor, pictures: nn.Module) -> Tensor:
        """With features in the place of the picture."""
        assert self.layout.picture is not None
        end, begin = self.layout.num_observed, self.layout.num_observed - self.layout.num_pictured
        features_BF = pictures(scaled_BD[:, begin:end].unflatten(1, self.layout.picture))
        return torch.cat([scaled_BD[:, :begin], features_BF, scaled_BD[:, end:]], dim=1)


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
