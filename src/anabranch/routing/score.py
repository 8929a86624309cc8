"""Scores: how well each destination suits each item. A score is a projection to logits, then an activation.

The two steps are separate because a candidate mask may act on either side of the activation (see `anabranch.routing.router`).
Both run in fp32 whatever the autocast state: near-ties between experts must not depend on precision (Switch Transformer, sec. 2.4).
"""
# Shapes: N items, E destinations, D width, P projected width

import math
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Size, configclass
from anabranch.precision import cast, full_precision, wide
from anabranch.routing.context import RoutingContext
from anabranch.routing.conversion import WeightField
from anabranch.routing.description import ScoreForm

Activation = Literal["softmax", "sigmoid", "sqrt_softplus"]


def activate(logit_NE: Tensor, activation: Activation) -> Tensor:
    """softmax over destinations (Shazeer et al. 2017), sigmoid (DeepSeek-V3), or sqrt(softplus)."""
    if activation == "softmax":
        return logit_NE.softmax(-1)
    if activation == "sigmoid":
        return logit_NE.sigmoid()
    # The root's slope at 0 is infinite, where far logits arrive: above 1e-30 it is finite, and closed ones stay at 0. NaN stays NaN.
    soft_NE = F.softplus(logit_NE)
    return torch.where(soft_NE <= 1e-30, 0.0, soft_NE.clamp_min(1e-30).sqrt())


class Score(Part, nn.Module, family="score"):
    """Interface: ``project`` items to logits, ``activate`` logits to scores; both ``[N, E]`` in fp32 (or fp64 for fp64 input)."""

    @configclass
    class Config(BaseConfig):
        """What every score has.

        Attributes:
            activation: how logits become scores.
            init_std: standard deviation of the initial weights.
        """

        activation: Activation = "softmax"
        init_std: float = Field(default=0.02, gt=0)

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """Parameters of the score, known before it is built; E D unless a kind says otherwise."""
            return num_destinations * dim

        def settled(self, num_destinations: int) -> Self:
            """The same with sizes that would follow from ``num_destinations`` written out, for a router that is to grow."""
            return self

        def conversions(self) -> tuple[WeightField, ...]:
            """What weights of another kind of score need; see `WeightField`."""
            return (WeightField("router", self.owner.kind, path="router.score.kind"),)

        def num_flops(self, dim: int, num_destinations: int) -> int:
            """Forward floating-point operations per item; two per parameter unless a kind says otherwise."""
            return 2 * self.num_parameters(dim, num_destinations)

    is_causal: ClassVar[bool] = True
    # Whether `project` leaves something in ``context.carry`` that a later score needs.
    hands_on: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE."""
        raise NotImplementedError  # abstract

    def describe(self) -> ScoreForm | str:
        """What it computes outside of training, for fast paths; or why no record says it."""
        return f"a router scores by {type(self).__name__}"

    def activate(self, logit_NE: Tensor) -> Tensor:
        """score_NE."""
        return activate(logit_NE, self.config.activation)


class LinearScore(Score, kind="linear"):
    """z = W x, the usual router. W is ``[E, D]``.

    In training, ``jitter`` multiplies the input by U(1 - jitter, 1 + jitter) (Switch Transformer, sec. 2.4; Mixtral). It draws from
    torch's global generator, whose state the trainer seeds and saves and activation recompute restores.
    """

    @configclass
    class Config(Score.Config):
        """Settings.

        Attributes:
            init: ``normal`` N(0, init_std), or ``kaiming_uniform`` with a = sqrt(5) (DeepSeek).
            jitter: see the class.
            bias: z = W x + b (gpt-oss).
        """

        init: Literal["normal", "kaiming_uniform"] = "normal"
        jitter: float = Field(default=0.0, ge=0, lt=1)
        bias: bool = False

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """E D, and E of a bias."""
            return num_destinations * (dim + self.bias)

    config: Config

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(num_destinations, dim))
        if config.init == "normal":
            nn.init.normal_(self.weight, std=config.init_std, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        self.bias = nn.Parameter(torch.zeros(num_destinations)) if config.bias else None

    def describe(self) -> ScoreForm | str:
        """W x."""
        if self.bias is not None:
            return "a router's logits have a bias"
        return ScoreForm(self.weight, self.config.activation)

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE = x W^T."""
        x_ND = wide(x_ND)
        if context.training and self.config.jitter:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        with full_precision(x_ND.device.type):
            bias_E = None if self.bias is None else cast(self.bias, x_ND.dtype)
            return F.linear(x_ND, cast(self.weight, x_ND.dtype), bias_E)


class CosineScore(Score, kind="cosine"):
    """Cosine of the projected item and an embedding of the destination, over a learned temperature (X-MoE, arXiv 2204.09179).

    z_e = cos(P x, w_e) / tau, P is ``[P, D]``, w is ``[E, P]``. On a sphere scores cannot collapse through growing norms.
    """

    @configclass
    class Config(Score.Config):
        """Attributes: ``projected_dim`` (default half the destinations, at least 2), ``temperature`` at the start (0.07)."""

        projected_dim: Size | None = Field(default=None, ge=1)
        temperature: float = Field(default=0.07, gt=0)

        def num_projected(self, num_destinations: int) -> int:
            """P."""
            return self.projected_dim or max(2, num_destinations // 2)

        def settled(self, num_destinations: int) -> Self:
            """With P as it is for ``num_destinations``."""
            return self.replace(projected_dim=self.num_projected(num_destinations))

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """The projection, the embeddings, the temperature."""
            return self.num_projected(num_destinations) * (dim + num_destinations) + 1

    config: Config

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        projected_dim = config.num_projected(num_destinations)
        self.projection = nn.Parameter(torch.empty(projected_dim, dim))
        self.weight = nn.Parameter(torch.empty(num_destinations, projected_dim))
        self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        nn.init.normal_(self.projection, std=config.init_std, generator=generator)
        nn.init.normal_(self.weight, std=config.init_std, generator=generator)

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE = cos(P x, w) / tau, tau at least 0.01."""
        x_ND = wide(x_ND)
        with full_precision(x_ND.device.type):
            x_NP = F.normalize(F.linear(x_ND, self.projection.to(x_ND.dtype)), dim=-1)
            cosine_NE = F.linear(x_NP, F.normalize(self.weight.to(x_ND.dtype), dim=-1))
        return cosine_NE / self.log_temperature.exp().clamp_min(0.01)
