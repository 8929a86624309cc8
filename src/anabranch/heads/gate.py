"""`HeadGate`: how much each head of an attention counts for each token.

    [a1, a2] = softmax(W_h x)          shared heads: c a1          routed head j: c a2 g_j

    relu    g = min(ReLU(W_r x + b_r), 10)                                                          (ReMoH, arXiv 2503.17069)
    topk    g = k p_j / (sum of the k largest p), p = softmax(W_r x); shared heads also n softmax(W_s x)  (MoH, arXiv 2410.11842)

c is 2, so that a1 = a2 = 1/2 and g = 1 leave a head as it is; in PVChat's code it is 1.
"""
# Shapes: N tokens, W width, H heads, M routed heads, S shared heads

import math
from typing import cast

import torch
from torch import Tensor, nn

from anabranch.heads.config import HeadRouting
from anabranch.nn.description import WeighedHeads
from anabranch.routing import LinearScore, ReluScore, Router, Routing, RoutingContext

__all__ = ["HeadGate"]


class HeadGate(nn.Module):
    """Weighs heads by the token that asks.

    Args:
        config: how; its ``routing`` is not ``none``.
        num_heads: H.
        width: W, of what queries are made of.
        layer: number of the layer, for traces.
        generator: draws initial weights, which ``preserve`` does not need.

    Attributes:
        router: of the routed heads; a trace numbers them from 0, the first behind the shared ones.
        pair: W_h.
        shared: W_s, None but with ``topk``.
    """

    def __init__(
        self,
        config: HeadRouting,
        num_heads: int,
        width: int,
        *,
        layer: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        config.check(num_heads)
        self.config, self.num_heads, self.width = config, num_heads, width
        router = config.router(num_heads)
        self.router: Router = router.build(width, num_heads - config.num_shared, layer=layer, generator=generator)
        linear = LinearScore.Config(init_std=router.score.init_std)
        self.pair: LinearScore = linear.build(width, 2, generator=generator)
        self.shared: LinearScore | None = None
        if config.routing == "topk" and config.num_shared:
            self.shared = linear.build(width, config.num_shared, generator=generator)
        if config.init == "preserve":
            for score in (self.router.score, self.pair, self.shared):
                if score is not None:
                    nn.init.zeros_(cast(Tensor, score.weight))

    def describe(self, attention: nn.Module) -> WeighedHeads | str:
        """What it does to the heads of ``attention`` outside of training, for fast paths; or why no record says it."""
        router, score, config = self.router, self.router.score, self.config
        if type(router) is not Router or router.candidates is not None or router.shifts_by_scores:
            return "the router of heads is not a plain one"
        if router.bias_E is not None or type(score) not in (LinearScore, ReluScore):
            return f"the router of heads scores by {type(score).__name__}, or with a bias of its own"
        is_relu = isinstance(score, ReluScore)
        floor = score.config.floor if isinstance(score, ReluScore) else None
        return WeighedHeads(
            attention,
            pair_2D=cast(Tensor, self.pair.weight),
            routed_MD=cast(Tensor, score.weight),
            bias_M=cast(Tensor, score.bias) if is_relu else None,
            shared_SD=None if self.shared is None else cast(Tensor, self.shared.weight),
            top_k=0 if is_relu else config.top_k,
            floor=-math.inf if floor is None else floor,
            cap=score.config.cap if isinstance(score, ReluScore) else math.inf,
            most_pair=config.most_pair,
            factor=config.factor,
        )

    def forward(self, x_NW: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """(scale_NH, the routing of the routed heads). Routed heads of padding weigh 0, with ``preserve`` too."""
        routing: Routing = self.router(x_NW, context)
        pair_N2 = self.pair.project(x_NW, context)
        most = self.config.most_pair
        pair_N2 = self.config.factor * pair_N2.clamp(-most, most).softmax(-1)
        weight_NM = torch.zeros_like(routing.score_NE).scatter_add(
            1, routing.index_NK.clamp_min(0), routing.weight_NK.masked_fill(~routing.used_NK, 0.0)
        )
        shared_NS = pair_N2[:, :1].expand(-1, self.config.num_shared)
        if self.shared is not None:
            share_NS = self.shared.activate(self.shared.project(x_NW, context))
            shared_NS = shared_NS * (self.config.num_shared * share_NS)
        return torch.cat((shared_NS, pair_N2[:, 1:] * weight_NM), dim=-1), routing
