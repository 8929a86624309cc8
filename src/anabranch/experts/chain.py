"""Chain-of-Experts: inside one layer a token passes through the same experts C times, routed anew at every pass.

"Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models", 2025, arXiv 2506.18945.

    s_t = softmax(W_t x_{t-1})                                   one router per pass
    x_t = shared(x_{t-1}) + sum over TopK(s_t) of s_t,e E_e(x_{t-1}) + x_{t-1}        t = 1 ... C, y = x_C

C passes of K / C experts make as many expert calls as one of K (`match_compute`), with no new expert, and an expert sees what the others
did. Shared experts run in every pass, so a chain with one makes C - 1 more of those calls. A pass needs the one before: its router cannot
run early, and small matmuls make a chain slower than one wide pass.

Where the residual goes (``residual``), with f_t for the layer in pass t:
    inner   x_t = x_{t-1} + f_t(x_{t-1})         the paper's best
    init    x_t = x_0 + f_t(x_{t-1})
    outer   x_t = f_t(x_{t-1}),  y = x_C + x_0
    none    x_t = f_t(x_{t-1}),  y = x_C         no residual at all: for the ablation
    gated   x_t = x_0 + w_t f_t(x_{t-1}) for t < C, y = x_0 + f_C(x_{C-1}); w_t is learned from 0, see `from_moe`

Departures: the released block normalises once, iterates, and drops the stream it came from, for its baseline too. That is
``norm="reference"``. Ours is ``each``: h_t = h_{t-1} + f_t(norm(h_{t-1})), for C = 1 the plain pre-norm layer to the bit;
``once`` normalises once and keeps the stream. The paper's "823 times more combinations" is not what its own counting gives
(`combinations`). Evidence: `anabranch study chain`.
"""
# Shapes: B batch, L positions, D width, N items or experts (paper), K experts per pass, C passes, E experts

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.config import Field, configclass
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.lm.decoder import Decoder
from anabranch.nn.context import BuildContext, Count, ForwardContext, recomputed
from anabranch.routing import Router

logger = logging.getLogger(__name__)


class Chain(ReXMoE, kind="chain"):
    """A mixture-of-experts layer that runs C times over one pool, each pass with a router (and its balancers) of its own.

    With ``iterations=1`` this is `MoE` to the bit, or `ReXMoE` where ``reuse`` is set.
    """

    @configclass
    class Config(ReXMoE.Config):
        """`ReXMoE.Config`, whose pool is one layer's unless ``reuse`` is set, and:

        Attributes:
            iterations: C, passes. The paper finds more than 2 of little use.
            independent_gates: a router per pass; False ties them (the paper: worse than no chain).
            residual: see the module.
            norm: ``each`` pass, ``once``, or as the paper's code has it, ``reference``.
            recompute_passes: keep only what goes from pass to pass and repeat each pass in the backward pass: activations kept do not
                grow with C. (``recompute`` does so for the experts alone.)
        """

        reuse: int = Field(default=1, ge=1)
        psr: ProgressiveScaling.Config | None = None
        iterations: int = Field(default=2, ge=1)
        independent_gates: bool = True
        residual: Literal["inner", "outer", "init", "none", "gated"] = "inner"
        norm: Literal["each", "once", "reference"] = "each"
        recompute_passes: bool = False

        @property
        def num_routers(self) -> int:
            """C, or one that all passes share."""
            return self.iterations if self.independent_gates else 1

        def count(self, context: BuildContext) -> Count:
            """One pass as the layer under it counts, and C - 1 more over the same weights, each with a router."""
            once, router = ReXMoE.Config.count(self, context), self.count_router(context, is_first=False)
            more, expert = self.iterations - 1, 3 * context.dim * self.hidden_dim
            always = 3 * context.dim * self.shared_width + context.dim * self.shared_gate
            active = min(self.iterations * self.places, self.num_destinations(context)) - self.places
            weights = (self.num_routers - 1) * router.parameters + more * (self.residual == "gated")
            work = more * (2 * self.places * expert + 2 * always + router.flops)
            return once + Count(weights, weights + active * expert, work)

        def expand_decoder(self, model: Decoder) -> Decoder:
            """The model itself: no plain one computes the same."""
            return model

    def __init__(self, config: Any, context: BuildContext) -> None:
        super().__init__(config, context)
        self.scale: nn.Parameter | None = None
        if config.iterations == 1:
            return
        self.experts.is_shared = True  # several passes use it: their gradients add up in place
        for router in self.routers:
            router.pool = router.pool or f"layer_{context.layer}"
            router.passes = config.iterations // config.num_routers
        if config.residual == "gated":
            self.scale = nn.Parameter(torch.zeros(config.iterations - 1))
        if config.residual == "none" and context.routed_layer == 0:
            logger.warning(
                "residual is 'none' with %d iterations: nothing of a layer's input goes past it", config.iterations
            )

    @property
    def routers(self) -> list[Router]:
        """Those of the passes, in order; one for all if gates are tied."""
        return [self.router, *self.more_routers]

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """What all passes add to x_BLD, with no norm between them."""
        return self._update(x_BLD, lambda x_BLD: x_BLD, context)

    def add_to(self, x_BLD: Tensor, norm: nn.Module, context: ForwardContext) -> Tensor:
        """The residual stream after all passes."""
        config = self.config
        if config.norm == "each":
            update_BLD = self._update(x_BLD, norm, context)
        else:
            normed_BLD = norm(x_BLD)
            update_BLD = self(normed_BLD, context)
            x_BLD = normed_BLD if config.norm == "reference" else x_BLD
        if config.residual == "none" and config.iterations > 1:
            return update_BLD
        return x_BLD + update_BLD

    def _update(self, start_BLD: Tensor, norm: Callable[[Tensor], Tensor], context: ForwardContext) -> Tensor:
        """y - x_0, or y where no residual goes around the layer."""
        config, routers = self.config, self.routers
        x_BLD, sum_BLD = start_BLD, None
        for number in range(config.iterations):
            router = routers[number % len(routers)]
            made_BLD = self._pass(router, norm, x_BLD, context)
            if config.residual == "inner":
                sum_BLD = made_BLD if sum_BLD is None else sum_BLD + made_BLD
            if number == config.iterations - 1:
                break
            if config.residual == "inner":
                x_BLD = x_BLD + made_BLD
            elif config.residual == "init":
                x_BLD = start_BLD + made_BLD
            elif config.residual == "gated":
                x_BLD = start_BLD + self.scale[number].to(made_BLD.dtype) * made_BLD  # type: ignore[index]
            else:
                x_BLD = made_BLD
        return made_BLD if sum_BLD is None else sum_BLD

    def _pass(self, router: Router, norm: Callable[[Tensor], Tensor], x_BLD: Tensor, context: ForwardContext) -> Tensor:
        def run(x_BLD: Tensor, context: ForwardContext) -> Tensor:
            return self.run(router, norm(x_BLD), context)

        if self.config.recompute_passes and torch.is_grad_enabled():
            return recomputed(run, x_BLD, context)
        return run(x_BLD, context)
