"""Parts of a router over a few unlike options: a random draw, a score with a temperature, a soft mixture, a budget over all layers."""
# Shapes: N items, E options, K choices per item, S sequences, D width

import math
from dataclasses import replace

import torch
from torch import Tensor

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.routing import UNUSED, Balancer, LinearScore, Routing, RoutingContext, Score, Select
from anabranch.routing.balance import Observation
from anabranch.routing.relax import Temperature, gumbel_noise, straight_through
from anabranch.routing.select import stable_top_k


class RandomChoice(Score):
    """A draw that does not look at the item: logit = log p + Gumbel noise, whose largest entry is option e with probability p_e.

    Draws from torch's global generator, as `LinearScore` does for its jitter. Not a registered kind: `DuoFFN` makes it of its own options.
    """

    @configclass
    class Config(Score.Config):
        """Attributes: ``probability``, of each option; sums to 1."""

        probability: tuple[float, ...] = (0.5, 0.5)

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """None."""
            return 0

    log_p_E: Tensor

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.register_buffer("log_p_E", torch.tensor(config.probability).log(), persistent=False)

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE."""
        log_p_E = self.log_p_E.float()
        return log_p_E + gumbel_noise(log_p_E.expand(x_ND.shape[0], -1))


class TemperedScore(LinearScore, kind="tempered"):
    """z = W x / tau + shift. tau falls over training, which sharpens the softmax until it is a choice (Duo-LLM, section 3).

    The paper prints exp(h) / tau, where tau would cancel; this is exp(h / tau). `calibrate_budget` sets the shift, which is zero before.
    """

    @configclass
    class Config(LinearScore.Config):
        """Attributes: ``temperature``, the schedule of tau (default from 1 to 0.1, geometrically over the whole training)."""

        temperature: Temperature.Config = Temperature.Config(start=1.0, end=0.1, until=1.0)

    shift_E: Tensor

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, dim, num_destinations, generator=generator)
        self.temperature: Temperature = config.temperature.build()
        self.register_buffer("shift_E", torch.zeros(num_destinations))

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE = x W^T / tau + shift."""
        logit_NE = super().project(x_ND, context)
        return logit_NE / self.temperature.value.to(logit_NE) + self.shift_E.to(logit_NE)


class Mixture(Select, kind="mixture"):
    """All options weighted by their scores in training, the best one alone with weight 1 in evaluation (Duo-LLM, section 3)."""

    @configclass
    class Config(Select.Config):
        """Attributes: ``straight_through``, in training too take the best alone, with the gradient of the mixture (default off)."""

        straight_through: bool = False

    config: Config

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        self.best = _Best(config, num_destinations)

    def of_pass(self, training: bool) -> Select:
        """The mixture in training, else the best one alone."""
        return self if training else self.best

    def choose(self, value_NE: Tensor) -> Tensor:
        """All open options, best first."""
        return _first_open(value_NE, value_NE.shape[1])

    def weigh(self, index_NK: Tensor, score_NE: Tensor, logit_NE: Tensor | None) -> Routing:
        """By their scores."""
        routing = super().weigh(index_NK, score_NE, logit_NE)
        if self.config.straight_through:
            return replace(routing, weight_NK=straight_through(routing.weight_NK) * routing.used_NK)
        return routing


class _Best(Select):
    """The best option alone, with weight 1."""

    def choose(self, value_NE: Tensor) -> Tensor:
        """The largest."""
        return _first_open(value_NE, 1)

    def weigh(self, index_NK: Tensor, score_NE: Tensor, logit_NE: Tensor | None) -> Routing:
        """1, whatever the score."""
        return Routing(index_NK, (index_NK >= 0).to(score_NE) * self.config.scale, score_NE)


def _first_open(value_NE: Tensor, count: int) -> Tensor:
    """The ``count`` largest, without those that are closed."""
    index_NK = stable_top_k(value_NE, count)
    return index_NK.masked_fill(value_NE.gather(1, index_NK) == -torch.inf, UNUSED)


class BudgetLoss(Balancer, kind="budget"):
    """alpha (mean over layers and tokens of a sequence of P_e - budget)^2, mean over sequences (Duo-LLM, section 3).

    A budget across layers: one instance serves all of them, and a layer may use its option always or never.
    """

    @configclass
    class Config(Balancer.Config):
        """The budget.

        Attributes:
            destination: e, the option that is budgeted (default 1, the big module of `DuoFFN`).
            budget: its share (default 0.5).
            alpha: weight of the loss (default 1).
        """

        destination: int = Field(default=1, ge=0)
        budget: float = Field(default=0.5, ge=0, le=1)
        alpha: float = Field(default=1.0, ge=0)

        def check(self, num_destinations: int) -> None:
            """The option exists."""
            if self.destination >= num_destinations:
                raise ConfigError(
                    f"destination is {self.destination}, but there are {num_destinations}; use 0 to {num_destinations - 1}"
                )

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit this layer's part: the share of each sequence, and whether it has a real token."""
        share_N = seen.probability_NE()[:, self.config.destination]
        length = max(context.sequence_length or share_N.shape[0], 1)
        mask_N = context.item_mask_N
        real_SL = (torch.ones_like(share_N) if mask_N is None else mask_N.to(share_N)).view(-1, length)
        share_S = (share_N.view(-1, length) * real_SL).sum(1) / real_SL.sum(1).clamp_min(1)
        context.emit_part(self, (share_S, (real_SL.sum(1) > 0).to(share_S)))

    def close(self, parts: list[tuple[Tensor, ...]]) -> tuple[str, Tensor]:
        """The loss of all layers."""
        share_S = torch.stack([share_S for share_S, _ in parts]).mean(0)
        real_S = parts[0][1]
        deviation_S = (share_S - self.config.budget).square() * real_S
        name = "budget" if self.config.destination == 1 else f"budget_{self.config.destination}"
        return name, self.config.alpha * deviation_S.sum() / real_S.sum().clamp_min(1)


def focal_loss(logit_NE: Tensor, label_N: Tensor, *, gamma: float = 2.0, weight_E: Tensor | None = None) -> Tensor:
    """mean of -w_y (1 - p_y)^gamma log p_y over items; labels of -1 are left out. gamma = 0 is weighted cross-entropy."""
    real_N = label_N >= 0
    log_p_N = logit_NE.log_softmax(-1).gather(1, label_N.clamp_min(0).unsqueeze(1)).squeeze(1)
    loss_N = -((1 - log_p_N.exp()) ** gamma) * log_p_N
    if weight_E is not None:
        loss_N = loss_N * weight_E[label_N.clamp_min(0)]
    return (loss_N * real_N).sum() / real_N.sum().clamp_min(1)


def class_weights(label_N: Tensor, num_classes: int, beta: float = 0.999) -> Tensor:
    """alpha_c = (1 - beta) / (1 - beta^n_c), scaled to sum to the number of classes (Cui et al. 2019, arXiv 1901.05555).

    A class that never occurs gets the weight of one that occurred once.
    """
    count_E = torch.bincount(label_N[label_N >= 0].reshape(-1), minlength=num_classes).clamp_min(1).double()
    weight_E = (1 - beta) / -torch.expm1(count_E * math.log(beta))
    return (weight_E * num_classes / weight_E.sum()).float()
