"""How heads of an attention are routed."""

import math
from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.routing import LinearScore, RateBalance, ReluScore, Router, SwitchLoss, TopK
from anabranch.routing.relu import Positive

__all__ = ["HeadRouting"]

# What the released codes draw initial weights with.
_RELEASED_STD = 1e-5
# PVChat's code clamps a router's logits to these, and those of the balance pair to +-1.
FLOOR, CAP, MOST_PAIR = -1.0, 10.0, 1.0


@configclass
class HeadRouting(Config):
    """Which heads are always on, how the others are chosen, and what keeps that even.

    Attributes:
        num_shared: heads that are always on, the first ones; PVChat has 8 of 12. 0 routes all.
        routing: ``relu`` (ReMoH), ``topk`` (MoH) or ``none``, the plain attention, for comparisons.
        top_k: routed heads of a token with ``topk``; with ``relu`` it sets the default ``target``.
        target: share of (token, routed head) pairs that shall be on with ``relu``; the paper's target sparsity is 1 - target. None for
            top_k / routed heads, or one half where that is all of them.
        init: ``preserve`` starts as the attention that was there (with ``topk`` if top_k is all routed heads); ``released`` as the papers'
            codes do, where shared heads begin halved and routed ones nearly off.
        balance: weight of the balance loss of ``topk``.
        control: of the rate with ``relu``, see `anabranch.routing.RateBalance`; its ``target`` is the one above.
        block: tokens of a sequence that a head is left out for together, where none of them has it on.
    """

    num_shared: int = Field(ge=0)
    routing: Literal["relu", "topk", "none"] = "relu"
    top_k: int = Field(default=2, ge=1)
    target: float | None = Field(default=None, gt=0, lt=1)
    init: Literal["preserve", "released"] = "preserve"
    balance: float = Field(default=0.01, ge=0)
    control: RateBalance.Config = RateBalance.Config()
    block: int = Field(default=256, ge=1)

    def check(self, num_heads: int) -> None:
        """Raise ConfigError unless an attention of ``num_heads`` can be routed so."""
        if self.routing == "none":
            return
        if self.num_shared >= num_heads:
            raise ConfigError(
                f"num_shared is {self.num_shared}, but the attention has {num_heads} heads, so none would be routed; use 0 to "
                f"{num_heads - 1}"
            )
        routed = num_heads - self.num_shared
        if self.routing == "topk" and self.top_k > routed:
            raise ConfigError(f"top_k is {self.top_k}, but {routed} heads are routed; use 1 to {routed}")

    def rate(self, num_heads: int) -> float:
        """``target`` with the default filled in."""
        if self.target is not None:
            return self.target
        share = self.top_k / (num_heads - self.num_shared)
        return share if share < 1 else 0.5

    def router(self, num_heads: int) -> Router.Config:
        """The router of the routed heads."""
        preserves = self.init == "preserve"
        if self.routing == "topk":
            return Router.Config(
                score=LinearScore.Config(init_std=_RELEASED_STD),
                select=TopK.Config(top_k=self.top_k, normalize="sum", scale=float(self.top_k)),
                # MoH's mean_e(P_e f_e) m^2, f the share of tokens, is top_k times this, whose f is a share of choices.
                balance=(SwitchLoss.Config(alpha=self.balance * self.top_k),) if self.balance else (),
            )
        score = ReluScore.Config(
            init_std=_RELEASED_STD,
            start=1.0 if preserves else 0.0,
            zero=preserves,
            noisy_start=not preserves,
            cap=CAP,
            floor=None if preserves else FLOOR,
        )
        control = self.control.replace(target=self.rate(num_heads))
        idle = control.pressure == "none" and control.floor == "none"
        return Router.Config(score=score, select=Positive.Config(), balance=() if idle else (control,))

    @property
    def factor(self) -> float:
        """What the balance pair is multiplied by, so that halves leave everything as it was; PVChat's code does not."""
        return 1.0 if self.routing == "relu" and self.init == "released" else 2.0

    @property
    def most_pair(self) -> float:
        """Of the logits of the balance pair, either way."""
        return MOST_PAIR if self.routing == "relu" else math.inf

    def num_parameters(self, width: int, num_heads: int) -> int:
        """Of the router, the pair, and with ``topk`` the weights of shared heads."""
        if self.routing == "none":
            return 0
        routed = num_heads - self.num_shared
        shared = self.num_shared if self.routing == "topk" else 0
        score = self.router(num_heads).score
        return score.num_parameters(width, routed) + (2 + shared) * width
