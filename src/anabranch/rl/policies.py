"""Distributions of actions: categorical, normal and Beta, with everything PPO asks of one.

A distribution is made of a row of *parameters*, which is what a network gives and a rollout stores; so the policy that acted can be made
again exactly, for ratios and for the divergence from it. Sampling takes noise that was drawn before (`Kind.noise`): the same noise gives
the same actions, whoever asks for which rows.

    Categorical     parameters are logits            Gumbel-max
    Categoricals    several choices at once, each by logits of its own, independent of the others
    Normal          mean and log of the deviation     mean + deviation * noise; the environment gets it clipped
    Beta            alpha, beta = 1 + softplus(.)     two Gamma draws by Marsaglia and Tsang (2000), both >= 1, so the density has one peak
"""
# Shapes: B rows, A numbers of an action (1 where it is discrete), P parameters of a row, E choices, K tries of a draw by rejection

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["KINDS", "Actions", "Beta", "Categorical", "Categoricals", "Distribution", "Kind", "Normal", "kind_of"]

KINDS = ("categorical", "normal", "beta")
# The support of Beta is closed here, so that log densities stay finite.
_EDGE = 1e-6
# Every try accepts with a probability above 0.95, so that all of them fail once in 10^8 draws; the mode stands for those.
_TRIES = 6


@dataclass(frozen=True)
class Actions:
    """What may be done.

    Attributes:
        choices: of a discrete action; 0 where it is another.
        several: choices of each part of an action that chooses several things at once; empty where it is another.
        low_A, high_A: least and largest value of each number of a vector; infinite where there is none.
    """

    choices: int = 0
    low_A: tuple[float, ...] = ()
    high_A: tuple[float, ...] = ()
    several: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.choices > 0) + bool(self.low_A) + bool(self.several) != 1 or len(self.low_A) != len(self.high_A):
            raise ConfigError(
                f"choices is {self.choices}, with {len(self.low_A)} lower and {len(self.high_A)} upper bounds; an action is "
                "one of some choices, several of these, or a vector with as many lower as upper bounds"
            )
        if any(choices < 1 for choices in self.several):
            raise ConfigError(f"several is {list(self.several)}; each needs at least one choice")
        wrong = [pair for pair in zip(self.low_A, self.high_A, strict=True) if not pair[0] < pair[1]]
        if wrong:
            raise ConfigError(f"an action may be from {wrong[0][0]} to {wrong[0][1]}, which is nothing")

    @property
    def is_discrete(self) -> bool:
        """Whether an action is one of ``choices``, or several."""
        return self.choices > 0 or bool(self.several)

    @property
    def num_choices(self) -> int:
        """Of all its parts together; 0 for a vector."""
        return self.choices or sum(self.several)

    @property
    def is_bounded(self) -> bool:
        """Whether every number of a vector has both bounds."""
        return not self.is_discrete and all(math.isfinite(bound) for bound in self.low_A + self.high_A)

    @property
    def num_numbers(self) -> int:
        """A."""
        return 1 if self.choices else len(self.several or self.low_A)

    def __str__(self) -> str:
        if self.choices:
            return f"one of {self.choices} choices"
        if self.several:
            return f"one each of {', '.join(map(str, self.several))} choices"
        return f"{len(self.low_A)} number{'s' * (len(self.low_A) != 1)}"


class Distribution(Protocol):
    """Of an action, in each of B rows. An action is ``[B, A]`` as the policy has it, see `Kind.to_environment`."""

    def log_prob(self, action_BA: Tensor) -> Tensor:
        """Log probability or density of an action, ``[B]``."""
        ...

    def entropy(self) -> Tensor:
        """In nats, ``[B]``."""
        ...

    def mode(self) -> Tensor:
        """What is done where nothing is tried out, ``[B, A]``: the likeliest choice, the mean of a vector."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """An action, ``[B, A]``, of noise that `Kind.noise` gave for B rows."""
        ...

    def divergence(self, other: Distribution) -> Tensor:
        """Kullback-Leibler divergence of ``other`` (of the same kind) from this one, in nats, ``[B]``."""
        ...


class Categorical:
    """One of E choices, by logits ``[B, E]``."""

    def __init__(self, logit_BE: Tensor) -> None:
        self.log_prob_BE = logit_BE.log_softmax(-1)

    def log_prob(self, action_BA: Tensor) -> Tensor:
        """See `Distribution`."""
        return self.log_prob_BE.gather(-1, action_BA.long()).squeeze(-1)

    def entropy(self) -> Tensor:
        """See `Distribution`."""
        return -(self.log_prob_BE.exp() * self.log_prob_BE).sum(-1)

    def mode(self) -> Tensor:
        """See `Distribution`."""
        return self.log_prob_BE.argmax(-1, keepdim=True).to(self.log_prob_BE.dtype)

    def sample(self, noise: Tensor) -> Tensor:
        """See `Distribution`; ``noise`` is uniform, ``[B, E]``."""
        gumbel_BE = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        return (self.log_prob_BE + gumbel_BE).argmax(-1, keepdim=True).to(self.log_prob_BE.dtype)

    def divergence(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        assert isinstance(other, Categorical)
        return (self.log_prob_BE.exp() * (self.log_prob_BE - other.log_prob_BE)).sum(-1)


class Categoricals:
    """Several choices at once, independent of each other: logits ``[B, E]`` of all, one behind the other.

    Args:
        logit_BE: E = the sum of ``several``.
        several: choices of each.
    """

    def __init__(self, logit_BE: Tensor, several: tuple[int, ...]) -> None:
        self.several = several
        self.parts = [Categorical(each) for each in logit_BE.split(several, dim=-1)]

    def log_prob(self, action_BA: Tensor) -> Tensor:
        """See `Distribution`."""
        actions = action_BA.split(1, dim=-1)
        return torch.stack([part.log_prob(each) for part, each in zip(self.parts, actions, strict=True)]).sum(0)

    def entropy(self) -> Tensor:
        """See `Distribution`."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def mode(self) -> Tensor:
        """See `Distribution`."""
        return torch.cat([part.mode() for part in self.parts], dim=-1)

    def sample(self, noise: Tensor) -> Tensor:
        """See `Distribution`; ``noise`` is uniform, ``[B, E]``."""
        noises = noise.split(self.several, dim=-1)
        return torch.cat([part.sample(each) for part, each in zip(self.parts, noises, strict=True)], dim=-1)

    def divergence(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        assert isinstance(other, Categoricals)
        return torch.stack([one.divergence(two) for one, two in zip(self.parts, other.parts, strict=True)]).sum(0)


class Normal:
    """A vector whose numbers are independent: mean and log of the standard deviation, ``[B, A]`` each."""

    def __init__(self, mean_BA: Tensor, log_deviation_BA: Tensor) -> None:
        self.mean_BA, self.log_deviation_BA = mean_BA, log_deviation_BA

    def log_prob(self, action_BA: Tensor) -> Tensor:
        """See `Distribution`."""
        distance_BA = (action_BA - self.mean_BA) * torch.exp(-self.log_deviation_BA)
        return -(0.5 * distance_BA**2 + self.log_deviation_BA + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """See `Distribution`."""
        return (self.log_deviation_BA + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)

    def mode(self) -> Tensor:
        """See `Distribution`."""
        return self.mean_BA

    def sample(self, noise: Tensor) -> Tensor:
        """See `Distribution`; ``noise`` is standard normal, ``[B, A]``."""
        return self.mean_BA + self.log_deviation_BA.exp() * noise

    def divergence(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        assert isinstance(other, Normal)
        ratio_BA = 2 * (self.log_deviation_BA - other.log_deviation_BA)
        distance_BA = (self.mean_BA - other.mean_BA) * torch.exp(-other.log_deviation_BA)
        return 0.5 * (ratio_BA.exp() + distance_BA**2 - 1 - ratio_BA).sum(-1)


class Beta:
    """A vector whose numbers lie in (0, 1) and are independent: alpha and beta ``[B, A]``, both above 0.

    ``log_scale`` is the log of how much wider the environment's range is than (0, 1), summed over the numbers: densities are of actions as
    the environment takes them. It is a constant, so it cancels in ratios and divergences.
    """

    def __init__(self, alpha_BA: Tensor, beta_BA: Tensor, log_scale: float = 0.0) -> None:
        self.alpha_BA, self.beta_BA, self.log_scale = alpha_BA, beta_BA, log_scale

    def _log_norm(self) -> Tensor:
        """Log of the Beta function."""
        return torch.lgamma(self.alpha_BA) + torch.lgamma(self.beta_BA) - torch.lgamma(self.alpha_BA + self.beta_BA)

    def log_prob(self, action_BA: Tensor) -> Tensor:
        """See `Distribution`; 0 and 1 count as 1e-6 away from there."""
        inner_BA = action_BA.clamp(_EDGE, 1 - _EDGE)
        shape_BA = (self.alpha_BA - 1) * inner_BA.log() + (self.beta_BA - 1) * torch.log1p(-inner_BA)
        return (shape_BA - self._log_norm()).sum(-1) - self.log_scale

    def entropy(self) -> Tensor:
        """See `Distribution`."""
        alpha_BA, beta_BA = self.alpha_BA, self.beta_BA
        inner_BA = (
            self._log_norm()
            - (alpha_BA - 1) * torch.digamma(alpha_BA)
            - (beta_BA - 1) * torch.digamma(beta_BA)
            + (alpha_BA + beta_BA - 2) * torch.digamma(alpha_BA + beta_BA)
        )
        return inner_BA.sum(-1) + self.log_scale

    def mode(self) -> Tensor:
        """The mean, which is what CaRL evaluates."""
        return self.alpha_BA / (self.alpha_BA + self.beta_BA)

    def sample(self, noise: Tensor) -> Tensor:
        """See `Distribution`; ``noise`` is ``[B, A, 2, K, 2]``: for both Gamma draws, K tries of a normal and a uniform number."""
        drawn_BA2 = _gamma(torch.stack([self.alpha_BA, self.beta_BA], dim=-1), noise)
        return (drawn_BA2[..., 0] / drawn_BA2.sum(-1)).clamp(_EDGE, 1 - _EDGE)

    def divergence(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        assert isinstance(other, Beta)
        alpha_BA, beta_BA = self.alpha_BA, self.beta_BA
        inner_BA = (
            other._log_norm()
            - self._log_norm()
            + (alpha_BA - other.alpha_BA) * torch.digamma(alpha_BA)
            + (beta_BA - other.beta_BA) * torch.digamma(beta_BA)
            + (other.alpha_BA - alpha_BA + other.beta_BA - beta_BA) * torch.digamma(alpha_BA + beta_BA)
        )
        return inner_BA.sum(-1)


def _gamma(shape_BA: Tensor, noise_BAK2: Tensor) -> Tensor:
    """Draws of Gamma(shape, 1) for shapes of at least 1: Marsaglia and Tsang, "A simple method for generating gamma variables"."""
    third_BA1 = (shape_BA - 1 / 3).unsqueeze(-1)
    normal_BAK, uniform_BAK = noise_BAK2.unbind(-1)
    cube_BAK = (1 + normal_BAK / (3 * third_BA1.sqrt())) ** 3
    positive_BAK = cube_BAK.clamp_min(torch.finfo(cube_BAK.dtype).tiny)
    bound_BAK = 0.5 * normal_BAK**2 + third_BA1 * (1 - cube_BAK + positive_BAK.log())
    is_kept_BAK = (cube_BAK > 0) & (uniform_BAK.clamp_min(1e-20).log() < bound_BAK)
    first_BA1 = is_kept_BAK.to(torch.uint8).argmax(-1, keepdim=True)
    drawn_BA = (third_BA1 * positive_BAK.gather(-1, first_BA1)).squeeze(-1)
    return torch.where(is_kept_BAK.any(-1), drawn_BA, third_BA1.squeeze(-1))


class Kind:
    """A kind of policy for some `Actions`: how many parameters a row has, and what is made of them.

    Args:
        name: ``categorical``, ``normal`` or ``beta``.
        actions: what may be done.

    Raises ConfigError where the kind cannot do that.
    """

    def __init__(self, name: Literal["categorical", "normal", "beta"], actions: Actions) -> None:
        if name not in KINDS:
            raise ConfigError(f"policy is {name!r}; use one of {', '.join(KINDS)}")
        if (name == "categorical") != actions.is_discrete:
            has = str(actions) if actions.is_discrete else "a vector"
            wanted = "categorical" if actions.is_discrete else "normal or beta"
            raise ConfigError(f"policy is {name!r}, and an action here is {has}; use {wanted}")
        if name == "beta" and not actions.is_bounded:
            raise ConfigError("policy is 'beta', and actions here have no bounds; use normal")
        self.name, self.actions = name, actions
        low_A, high_A = torch.tensor(actions.low_A), torch.tensor(actions.high_A)
        self._low_A, self._high_A = low_A, high_A
        self._log_scale = float((high_A - low_A).double().log().sum()) if actions.is_bounded else 0.0

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.actions.num_choices or 2 * self.actions.num_numbers

    def distribution(self, parameter_BP: Tensor) -> Distribution:
        """The distribution that has these parameters."""
        if self.actions.several:
            return Categoricals(parameter_BP, self.actions.several)
        if self.name == "categorical":
            return Categorical(parameter_BP)
        first_BA, second_BA = parameter_BP.chunk(2, dim=-1)
        if self.name == "normal":
            return Normal(first_BA, second_BA)
        return Beta(1 + F.softplus(first_BA), 1 + F.softplus(second_BA), self._log_scale)

    def noise(self, generator: torch.Generator, rows: int) -> Tensor:
        """What `Distribution.sample` needs for so many rows, drawn on the CPU."""
        if self.name == "categorical":
            return torch.rand(rows, self.actions.num_choices, generator=generator)
        if self.name == "normal":
            return torch.randn(rows, self.actions.num_numbers, generator=generator)
        shape = (rows, self.actions.num_numbers, 2, _TRIES)
        normal = torch.randn(*shape, generator=generator)
        return torch.stack([normal, torch.rand(*shape, generator=generator)], dim=-1)

    def to_environment(self, action_BA: Tensor) -> Tensor:
        """An action as the environment takes it: whole numbers ``[B]``, ``[B, A]`` where it is several, or vectors within bounds.

        A normal policy's -1 and 1 are the bounds, where there are both, and what lies beyond is clipped; a Beta policy's are 0 and 1.
        """
        if self.actions.is_discrete:
            return action_BA.long() if self.actions.several else action_BA.squeeze(-1).long()
        low_A, high_A = self._low_A.to(action_BA.device), self._high_A.to(action_BA.device)
        if self.name == "beta":
            return low_A + action_BA * (high_A - low_A)
        if not self.actions.is_bounded:
            return torch.minimum(torch.maximum(action_BA, low_A), high_A)
        return low_A + (action_BA.clamp(-1, 1) + 1) / 2 * (high_A - low_A)


def kind_of(name: str, actions: Actions) -> Kind:
    """The kind of this name; ``auto`` is categorical for choices, Beta for vectors with bounds, and normal for others."""
    if name == "auto":
        name = "categorical" if actions.is_discrete else "beta" if actions.is_bounded else "normal"
    return Kind(name, actions)  # type: ignore[arg-type]
