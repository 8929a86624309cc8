"""The activation rate of a router that sets no number of choices (`anabranch.routing.relu`), kept near a target by two losses.

    rate = share of (item, destination) pairs that are chosen;  sparsity R = 1 - rate;  target sparsity T = 1 - target

    SmoothProximity  loss beta sum_j f_j mean_t g_tj;   after each step  beta <- beta exp(k (T - R))            too many: pressed down
    ReMoEController  the same loss;                     after each step  beta <- beta mult^sign(T - R)
    HeadActivation   loss w (exp(2 (R - T)) - 1) where R > T, else 0                                           too few: drawn up

PVChat (arXiv 2503.17069) has the first and the third, ReMoE (arXiv 2412.14711) the second. In PVChat's released code R counts g > 0, so the
third has no gradient and what is off stays off. Ours: its value is of the hard rate, and its gradient that of mean sigmoid(z / tau), with a
slope of at least 0.02 / tau wherever z < 0. The slope of the sigmoid alone vanishes (1e-13 / tau at z = -30 tau), and what is that far off
would stay off as well.

They are objects of their own, ``loss(...)`` and ``update(rate)``; `RateBalance` makes a router's balancer of them, which counts over the
micro-batches of a step and over all processes before it updates.
"""
# Shapes: N items, E destinations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.routing.balance import Balancer, LoadCounter, Observation, masked_mean
from anabranch.routing.context import RoutingContext

__all__ = ["HeadActivation", "RateBalance", "ReMoEController", "SmoothProximity"]

# The least slope of the soft rate below 0, of the 0.25 that it has at 0: those that are near still come on first.
LEAST_SLOPE = 0.02
# What beta is kept within, see PVChat's code.
LEAST_BETA, MOST_BETA = 1e-15, 10.0
# Below this rate a router counts as dead, and the weight of `HeadActivation` grows by the factor, up to the limit.
DEAD, GROWTH, MOST_WEIGHT = 1e-4, 1.2, 10.0


class _Controller(nn.Module):
    """A number that moves with the rate. It is a buffer, so it is saved with the model, and stays fp32 whatever the model is cast to.

    Args:
        target: the rate that is wanted, above 0 and below 1.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = _number("target", target, above=0, below=1)

    def update(self, rate: Tensor | float) -> None:
        """Move by the ``rate`` of a finished step, over all its items. Does nothing in evaluation mode."""
        if not self.training:
            return
        value = float(rate) if not isinstance(rate, Tensor) else rate
        if not isinstance(value, Tensor) and not 0 <= value <= 1:
            raise ConfigError(f"rate is {value}; it is a share, from 0 to 1")
        with torch.no_grad():
            self._move(torch.as_tensor(value, dtype=torch.float32, device=self._state().device))

    def _move(self, rate: Tensor) -> None:
        raise NotImplementedError  # abstract

    def _state(self) -> Tensor:
        raise NotImplementedError  # abstract

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            made = getattr(self, name)
            if made.dtype != torch.float32:
                setattr(self, name, buffer.to(made.device))
        return self


class _Pressure(_Controller):
    """beta times how much is chosen, a loss that turns destinations off."""

    beta: Tensor

    def __init__(self, beta0: float, target: float, form: str) -> None:
        super().__init__(target)
        if form not in ("load", "logits"):
            raise ConfigError(f"form is {form!r}; it must be 'load' or 'logits'")
        self.form = form
        self.register_buffer("beta", torch.tensor(_number("beta0", beta0, least=LEAST_BETA, most=MOST_BETA)))

    def _state(self) -> Tensor:
        return self.beta

    def loss(
        self,
        logit_NE: Tensor,
        score_NE: Tensor,
        share_E: Tensor,
        mask_N: Tensor | None = None,
        open_NE: Tensor | None = None,
    ) -> Tensor:
        """The loss of one set of items.

        Args:
            logit_NE: z.
            score_NE: g, 0 where a destination is closed.
            share_E: f, the share of items that chose each destination; no gradient goes through it.
            mask_N: bool, False for padding; None if all are real.
            open_NE: bool ``[E]`` or ``[N, E]``, what can be chosen; None for all.
        """
        if self.form == "logits":
            size = masked_mean(_mean_of_open(logit_NE.abs(), open_NE), mask_N).sum()
        else:
            size = (share_E.detach().to(score_NE.dtype) * masked_mean(score_NE, mask_N)).sum()
        # A copy: the number moves in place, maybe before the backward pass.
        return self.beta.clone() * size


class SmoothProximity(_Pressure):
    """PVChat's Smooth Proximity Regularisation: beta moves by how far the rate is from its target.

    Args:
        k: how quickly (PVChat's configuration: 0.8).
        beta0: beta at the start (PVChat's configuration: 1e-8).
        target: the rate that is wanted; the paper's target sparsity is 1 - target.
        form: ``load``, the loss as in PVChat's code, or ``logits``, beta mean_t mean_j |z_tj| as in the paper.

    Raises ConfigError for numbers that cannot be.
    """

    def __init__(
        self, k: float = 0.8, beta0: float = 1e-8, target: float = 0.5, *, form: Literal["load", "logits"] = "load"
    ) -> None:
        super().__init__(beta0, target, form)
        self.k = _number("k", k, above=0)

    def _move(self, rate: Tensor) -> None:
        # T - R = rate - target.
        self.beta.mul_(torch.exp(self.k * (rate - self.target))).clamp_(LEAST_BETA, MOST_BETA)


class ReMoEController(_Pressure):
    """ReMoE's controller: beta is multiplied or divided by one number in every step.

    Args:
        mult: that number, above 1.
        beta0, target, form: as of `SmoothProximity`.
    """

    def __init__(
        self, mult: float = 1.2, beta0: float = 1e-8, target: float = 0.5, *, form: Literal["load", "logits"] = "load"
    ) -> None:
        super().__init__(beta0, target, form)
        self.mult = _number("mult", mult, above=1)

    def _move(self, rate: Tensor) -> None:
        sign = torch.sign(rate - self.target)
        self.beta.mul_(torch.pow(self.mult, sign)).clamp_(LEAST_BETA, MOST_BETA)


class HeadActivation(_Controller):
    """PVChat's Head Activation Enhancement: draws destinations up where too few are chosen, however far off they are.

    Args:
        w: its weight (0.5). While the rate is below 1e-4 every step multiplies it by 1.2, up to 10; else it goes back.
        tau: temperature of the soft rate that the gradient is of: mean sigmoid(z / tau), below 0 with a slope of at least 0.02 / tau.
        target: the rate that is wanted.
        gradient: ``soft``, ours; ``none``, as released: the loss is of the hard rate alone, which has no gradient.

    Attributes:
        weight: w of the next step.
    """

    weight: Tensor

    def __init__(
        self, w: float = 0.5, tau: float = 0.1, target: float = 0.5, *, gradient: Literal["soft", "none"] = "soft"
    ) -> None:
        super().__init__(target)
        if gradient not in ("soft", "none"):
            raise ConfigError(f"gradient is {gradient!r}; it must be 'soft' or 'none'")
        self.w, self.tau = _number("w", w, above=0, most=MOST_WEIGHT), _number("tau", tau, above=0)
        self.gradient = gradient
        self.register_buffer("weight", torch.tensor(self.w))

    def _state(self) -> Tensor:
        return self.weight

    def loss(
        self, logit_NE: Tensor, rate: Tensor, mask_N: Tensor | None = None, open_NE: Tensor | None = None
    ) -> Tensor:
        """The loss of one set of items with logits z, of whose pairs the share ``rate`` is chosen (a number without gradient).

        ``mask_N`` and ``open_NE`` as of `SmoothProximity`.
        """
        rate = rate.detach()
        if self.gradient == "soft":
            # Exactly zero, so that the value is that of the hard rate.
            soft_NE = _slope(logit_NE.detach(), self.tau) * (logit_NE - logit_NE.detach())
            rate = rate + masked_mean(_mean_of_open(soft_NE, open_NE), mask_N).sum()
        gap = self.target - rate
        return self.weight.clone() * torch.where(gap > 0, torch.expm1(2 * gap), 0.0)

    def _move(self, rate: Tensor) -> None:
        grown = (self.weight * GROWTH).clamp(max=MOST_WEIGHT)
        self.weight.copy_(torch.where(rate < DEAD, grown, self.w))


def _slope(logit_NE: Tensor, tau: float) -> Tensor:
    """d/dz of the soft rate: that of sigmoid(z / tau), which below 0 is not let vanish."""
    soft_NE = (logit_NE / tau).sigmoid()
    slope_NE = soft_NE * (1 - soft_NE)
    return torch.where(logit_NE < 0, slope_NE.clamp_min(LEAST_SLOPE), slope_NE) / tau


class RateBalance(LoadCounter, kind="activation_rate"):
    """Keeps the share of pairs that a router chooses near a target.

    The losses of all layers add up, ``activation_pressure`` and ``activation_floor``, each of the items of one forward pass. What moves
    with the rate moves after each step, by the rate over its micro-batches and all processes.

    Attributes:
        pressure: `SmoothProximity` or `ReMoEController`, None without.
        floor: `HeadActivation`, None without.
    """

    @configclass
    class Config(Balancer.Config):
        """The controllers.

        Attributes:
            target: the rate that is wanted.
            pressure: ``smooth`` (`SmoothProximity`), ``remoe`` (`ReMoEController`) or ``none``.
            k, mult, beta0, form: of it.
            floor: `HeadActivation` with a gradient (``soft``), as released (``released``), or ``none``.
            w, tau: of it.
        """

        target: float = Field(default=0.5, gt=0, lt=1)
        pressure: Literal["smooth", "remoe", "none"] = "smooth"
        k: float = Field(default=0.8, gt=0)
        mult: float = Field(default=1.2, gt=1)
        beta0: float = Field(default=1e-8, ge=LEAST_BETA, le=MOST_BETA)
        form: Literal["load", "logits"] = "load"
        floor: Literal["soft", "released", "none"] = "soft"
        w: float = Field(default=0.5, gt=0, le=MOST_WEIGHT)
        tau: float = Field(default=0.1, gt=0)

    config: Config
    num_pairs: Tensor

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        self.register_buffer("num_pairs", torch.zeros(1), persistent=False)
        self.pressure: SmoothProximity | ReMoEController | None = None
        self.floor: HeadActivation | None = None
        if config.pressure == "smooth":
            self.pressure = SmoothProximity(config.k, config.beta0, config.target, form=config.form)
        elif config.pressure == "remoe":
            self.pressure = ReMoEController(config.mult, config.beta0, config.target, form=config.form)
        if config.floor != "none":
            gradient: Literal["soft", "none"] = "soft" if config.floor == "soft" else "none"
            self.floor = HeadActivation(config.w, config.tau, config.target, gradient=gradient)

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit the losses, the loads, and the rate as ``activation``."""
        mask_N, routing = context.item_mask_N, seen.routing
        load_E = routing.load_E()
        items = load_E.new_full((), routing.num_items).float() if mask_N is None else mask_N.sum().float()
        pairs = items * seen.num_open(mask_N)
        context.emit_load(self, load_E, pairs.expand(1))
        share_E = load_E.float() / items.clamp_min(1)
        rate = load_E.sum() / pairs.clamp_min(1)
        if self.pressure is not None:
            lost = self.pressure.loss(seen.logit_NE, routing.score_NE, share_E, mask_N, seen.open_NE)
            context.emit_part(_PRESSURE, (lost,))
        if self.floor is not None:
            drawn = self.floor.loss(seen.logit_NE, rate, mask_N, seen.open_NE)
            # Where there are no items nothing is too few.
            context.emit_part(_FLOOR, (torch.where(items > 0, drawn, 0.0),))
        if context.is_measured:
            context.emit_metric("activation", rate)

    def counts(self) -> list[Tensor]:
        """How often each destination was chosen, and how many pairs there were."""
        return [self.load_E, self.num_pairs]

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        """Take the loads of one forward pass; ``open_E`` is the number of its pairs, ``[1]``."""
        super().add_load(load_E)
        if open_E is not None:
            self.num_pairs += open_E

    def rate(self) -> Tensor:
        """Of the step so far; NaN before its first item."""
        return self.load_E.sum() / self.num_pairs.squeeze(0)

    @torch.no_grad()
    def on_step(self, step: int, fraction: float) -> None:
        """Move the controllers by the finished step, if it had items, and forget it."""
        if float(self.num_pairs) > 0:
            for controller in (self.pressure, self.floor):
                if controller is not None:
                    controller.update(self.rate())
        super().on_step(step, fraction)


def _mean_of_open(value_NE: Tensor, open_NE: Tensor | None) -> Tensor:
    """``[N, 1]``: over the open destinations of each item, 0 where none is."""
    if open_NE is None:
        return value_NE.mean(-1, keepdim=True)
    open_NE = open_NE.expand_as(value_NE)
    total_N1 = torch.where(open_NE, value_NE, 0.0).sum(-1, keepdim=True)
    return total_N1 / open_NE.sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class _OverLayers:
    """Adds up the losses of all layers; it keeps nothing. Equal ones are the same in any process."""

    name: str

    def close(self, parts: list[tuple[Tensor, ...]]) -> tuple[str, Tensor]:
        """(name, loss)."""
        return self.name, torch.stack([part for (part,) in parts]).sum()


# The same for all layers: a context joins parts by whose they are.
_PRESSURE, _FLOOR = _OverLayers("activation_pressure"), _OverLayers("activation_floor")


def _number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float = math.inf,
    most: float = math.inf,
) -> float:
    """``value`` as a float. Raises ConfigError for what is no number, or not within the limits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    high_enough = value > above if above is not None else least is None or value >= least
    if not (high_enough and value < below and value <= most):
        low = f"above {above:g}" if above is not None else f"at least {least:g}"
        high = f" and below {below:g}" if below < math.inf else f" and at most {most:g}" if most < math.inf else ""
        raise ConfigError(f"{name} is {value}; it must be {low}{high}")
    return float(value)
