"""Chain-of-Experts: inside one layer a token passes through the same experts C times, routed anew at every pass.

"Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models", 2025, arXiv 2506.18945.

    s_t = softmax(W_t x_{t-1})                                   one router per pass, with its balancers
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
(`combinations`). Routers begin and are balanced as those of all our designs, so that a comparison is one of designs; as the paper's code
has it with `paper_router`. Passes do not reuse each other's sort buffers. Evidence: `anabranch study chain`.
"""
# Shapes: B batch, L positions, D width, N items or experts (paper), K experts per pass, C passes, E experts

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn

from anabranch.config import Field, Repeats, configclass
from anabranch.errors import ConfigError
from anabranch.experts.group_pool import GroupPool
from anabranch.experts.rexmoe import ProgressiveScaling, ReusedExperts, ReXMoE, at_depth
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, fields_beyond, not_chosen, recipe
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.description import FeedForwardForm, passes_as
from anabranch.nn.moe import MoE
from anabranch.nn.pass_loop import PassLoop, Residual
from anabranch.nn.pool_policy import build_router
from anabranch.routing import LinearScore, Router, SwitchLoss, TopK, WeightField
from anabranch.routing.renamed import moved
from anabranch.routing.shared import shared_parameters

logger = logging.getLogger(__name__)

__getattr__ = moved(__name__, dict.fromkeys(("PassFacts", "between_passes"), "anabranch.routing.passes"))

# Of the balance loss of each router in the paper's code.
PAPER_ALPHA = 1e-3

# The name that saved models and traces know the routers of later passes by.
_LATER_ROUTERS = "more_routers"


class Chain(MoE, kind="chain"):
    """A mixture-of-experts layer that runs C times over one pool.

    It is made of parts: the experts of `MoE`, whose pool may be that of a group of layers (`GroupPool`), and the loop over them
    (`PassLoop`). With ``iterations=1`` this is `MoE` to the bit, or `ReXMoE` where ``reuse`` is set.
    """

    @configclass
    class Config(ReusedExperts, MoE.Config):
        """`MoE.Config` and `ReusedExperts`, whose pool is one layer's unless ``reuse`` is set, and:

        Attributes:
            iterations: C, passes. The paper finds more than 2 of little use.
            independent_gates: a router per pass; False ties them (the paper: worse than no chain).
            residual: see the module.
            norm: ``each`` pass, ``once``, or as the paper's code has it, ``reference``.
            recompute_passes: keep only what goes from pass to pass and repeat each pass in the backward pass: activations kept do not
                grow with C. (``recompute`` does so for the experts alone.)
        """

        reuse: Repeats = Field(default=1, ge=1)
        psr: ProgressiveScaling.Config | None = None
        iterations: Repeats = Field(default=2, ge=1)
        independent_gates: bool = True
        residual: Residual = "inner"
        norm: Literal["each", "once", "reference"] = "each"
        recompute_passes: bool = False

        def __post_init__(self) -> None:
            MoE.Config.__post_init__(self)
            self.check_schedule()

        @property
        def loop(self) -> PassLoop:
            """The passes."""
            return PassLoop(self.iterations, self.residual, recompute=self.recompute_passes)

        @property
        def num_routers(self) -> int:
            """C, or one that all passes share."""
            return self.iterations if self.independent_gates else 1

        @property
        def pool_policy(self) -> GroupPool:
            """The experts of the layer's group, used by every pass."""
            return self.group_pool(calls=self.iterations)

        def count(self, context: BuildContext) -> Count:
            """One pass as the plain layer counts, and C - 1 more over the same weights, each with a router."""
            once, router = MoE.Config.count(self, context), self.count_router(context, is_first=False)
            more, expert = self.iterations - 1, self.count_routed(context, num_choices=1)
            active = min(self.iterations * self.num_choices, self.num_destinations(context)) - self.num_choices
            weights = (self.num_routers - 1) * router.parameters + self.loop.num_scales
            work = more * (self.num_choices * expert.flops + self.count_shared(context).flops + router.flops)
            return once + self.count_depth(context.dim) + Count(weights, weights + active * expert.active, work)

        def conversions(self) -> tuple[WeightField, ...]:
            """Those of the router's score and of the pool; and a plain model becomes a chain."""
            advice = "to make a chain of a plain model load the checkpoint as it is and use experts.chain.from_moe"
            chain = WeightField("iterations", self.iterations, advice, plain=1)
            of_loop = (chain,) if self.iterations > 1 else ()
            return (*of_loop, *MoE.Config.conversions(self), *self.pool_conversions())

    config: Config

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__(config, context)
        self.depth_embedding = config.new_depth(context.dim)
        first = self.router
        later = (
            build_router(first.config, first.num_destinations, first.destinations, context)
            for _ in range(1, config.num_routers)
        )
        self.add_module(_LATER_ROUTERS, nn.ModuleList(later))
        self.loop = config.loop
        self.scale = self.loop.new_scale()
        if not self.loop.goes_around and context.routed_layer == 0:
            logger.warning(
                "residual is 'none' with %d iterations: nothing of a layer's input goes past it", config.iterations
            )

    @property
    def routers(self) -> list[Router]:
        """All there are: one for each pass, in order, or one for all if gates are tied."""
        return [self.router, *getattr(self, _LATER_ROUTERS)]

    @property
    def routing_order(self) -> list[Router]:
        """The router of each pass."""
        return self.loop.in_order(self.routers)

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
        return x_BLD + update_BLD if self.loop.goes_around else update_BLD

    def describe(self) -> FeedForwardForm | str:
        """C passes, where each adds to the stream and has the norm."""
        config = self.config
        if config.iterations > 1 and (config.residual, config.norm) != ("inner", "each"):
            return f"passes have residual {config.residual!r} and norm {config.norm!r}, not 'inner' and 'each'"
        return passes_as(MoE.describe(self), routers=tuple(self.routing_order), shift_D=self.depth_embedding)

    def _update(self, start_BLD: Tensor, norm: Callable[[Tensor], Tensor], context: ForwardContext) -> Tensor:
        """What the loop makes of ``start_BLD``, with ``norm`` before every pass; see `PassLoop.run`."""
        routers = self.routing_order

        def one_pass(number: int, x_BLD: Tensor, context: ForwardContext) -> Tensor:
            return self.run(routers[number], at_depth(norm(x_BLD), self.depth_embedding), context)

        return self.loop.run(one_pass, start_BLD, context, self.scale)


def paper_router(top_k: int, *, num_layers: int, iterations: int = 2) -> Router.Config:
    """A router as the paper's code has it: kaiming-uniform weights, a balance loss for each sequence, no z-loss.

    The code adds up the losses of all routers, each times 0.001; ours are averaged over layers and passes, so alpha is
    0.001 L C here.

    Args:
        top_k: K, experts per pass.
        num_layers: L, routed layers of the model.
        iterations: C, passes of each.
    """
    balance = SwitchLoss.Config(alpha=PAPER_ALPHA * num_layers * iterations, scope="sequence")
    return Router.Config(
        score=LinearScore.Config(init="kaiming_uniform"), select=TopK.Config(top_k=top_k), balance=(balance,)
    )


@dataclass(frozen=True)
class Work:
    """What a model does and holds.

    Attributes:
        routed_calls: of experts, per token and layer.
        shared_calls: of shared experts, per token and layer.
        flops: forward, per token, of the whole model.
        parameters: of the whole model.
    """

    routed_calls: int
    shared_calls: int
    flops: int
    parameters: int


@dataclass(frozen=True)
class Match:
    """A chain that makes as many expert calls as a plain model. Shared experts run in every pass, so compare ``flops`` too."""

    config: Decoder.Config
    plain: Work
    chain: Work


def match_compute(config: Decoder.Config, iterations: int = 2, **options: Any) -> Match:
    """The chain with K / C experts per pass for a model with K: equal calls of routed experts.

    Args:
        config: a model of `MoE` or `ReXMoE` layers that choose by `TopK`.
        iterations: C.
        options: other fields of `Chain.Config`.

    Raises ConfigError if C does not divide K, or the layers are of another kind.
    """
    layer = _plain(config, "match_compute")
    select = layer.router.select
    if not isinstance(select, TopK.Config):
        raise ConfigError(f"match_compute needs router.select of kind 'top_k', this one is {select.owner.kind!r}")
    if iterations < 1 or select.top_k % iterations:
        fitting = ", ".join(str(number) for number in range(1, select.top_k + 1) if select.top_k % number == 0)
        raise ConfigError(
            f"iterations is {iterations}, which does not divide top_k={select.top_k}; use one of {fitting}"
        )
    router = layer.router.replace(select=select.replace(top_k=select.top_k // iterations))
    matched = config.replace(feed_forward=_as_chain(layer, iterations=iterations, router=router, **options))
    return Match(matched, _work(config), _work(matched))


def _plain(config: Decoder.Config, what: str) -> Any:
    if type(config.feed_forward) not in (MoE.Config, ReXMoE.Config):
        raise ConfigError(f"{what} needs 'moe' or 'rexmoe' layers, this model has {config.feed_forward.owner.kind!r}")
    return config.feed_forward


def _as_chain(layer: Any, **changes: Any) -> Chain.Config:
    return Chain.Config(**{**{field.name: getattr(layer, field.name) for field in fields(layer)}, **changes})


def _work(config: Decoder.Config) -> Work:
    layer: Any = config.feed_forward
    count, passes = config.count(), getattr(layer, "iterations", 1)
    return Work(passes * layer.num_choices, passes * layer.shared_experts, count.flops, count.parameters)


def from_moe(model: Decoder, iterations: int = 2, **options: Any) -> Decoder:
    """A chain that computes what a trained mixture of experts does, until it learns otherwise.

    Passes before the last are scaled by a learned w_t that starts at zero (``residual="gated"``), and all routers start as the model's:
    x_0 + f_C(x_0 + 0 f_1(x_0)). It makes C times as many expert calls.

    Args:
        model: a decoder of `MoE` or `ReXMoE` layers; it stays as it is.
        iterations: C.
        options: other fields of `Chain.Config`; ``norm`` is ``once`` unless given.

    Raises ConfigError if the layers are of another kind, or their routers keep a state, which passes would move.
    """
    layer = _plain(model.config, "from_moe")
    if shared_parameters(layer.router.score, 1):
        raise ConfigError("from_moe cannot keep the logits of recurrent routers, whose state moves on in every pass")
    changes = {"norm": "once", **options, "iterations": iterations, "residual": "gated"}
    config = model.config.replace(feed_forward=_as_chain(layer, **changes))
    grown = Decoder(config).to(model.embedding.weight)
    state, source = grown.state_dict(), model.state_dict()
    for name in state:
        first, found, rest = name.partition(f".{_LATER_ROUTERS}.")
        origin = f"{first}.router.{rest.partition('.')[2]}" if found else name
        if origin in source:
            state[name] = source[origin]
    grown.load_state_dict(state)
    return grown.train(model.training)


def combinations(num_experts: int, top_k: int, iterations: int = 1) -> int:
    """How many ways there are to choose ``top_k`` of the experts in each pass: C(E, K) ** C, exactly.

    64 experts: 4 in each of two passes over 8 at once is 91.2 times as many (the paper says 823).
    """
    return math.comb(num_experts, top_k) ** iterations


not_chosen(Chain.Config, "residual", "norm", "reuse", "psr")


@recipe(
    "from_moe",
    makes=lambda config: type(config.feed_forward) is Chain.Config,
    takes=lambda config: type(config.feed_forward) in (MoE.Config, ReXMoE.Config),
    needs="a model of 'moe' or 'rexmoe' layers",
    # The chain begins as the trained model, which chooses and weighs as it does.
    keeps=("router.select",),
)
def _from_plain(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    return from_moe(model, **fields_beyond(config.feed_forward, ReXMoE.Config, without=("residual", "norm")))
