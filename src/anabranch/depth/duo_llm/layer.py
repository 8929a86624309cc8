"""The duo feed-forward layer: a big and a small SwiGLU (or GELU), and skipping both, one of which each token takes.

    h <- h + FFN_c(norm(h)),  c in {small, big, skip},  FFN_skip = 0          (attention always runs)

Which one is said per forward pass, in the forward context's state: ``model(token_BL, state=take("big"))``.
"""
# Shapes: B batch, L positions, N = B L items, E options, Y layers, K choices per item, D width

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Field, Size, configclass
from anabranch.depth.duo_llm.parts import BudgetLoss, RandomChoice, focal_loss
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.nn.activation import ActivationName, activation_of
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.feed_forward import MLP, FeedForward, SwiGLU
from anabranch.nn.items import no_rows, on_items
from anabranch.nn.linear import is_plain
from anabranch.precision import wide
from anabranch.routing import (
    UNUSED,
    Balancer,
    OfPass,
    Router,
    Routing,
    RoutingContext,
    combine,
    dispatch,
    plan_dispatch,
)
from anabranch.routing.destinations import Destinations
from anabranch.routing.override import Override, hidden_items

OPTIONS = ("small", "big", "skip")
SMALL, BIG, SKIP = range(3)

# Names in the context's state.
ROUTE, SUPERVISION = "duo_route", "duo_supervision"

Route = str | Tensor | Callable[[int, Tensor, RoutingContext], Any]


def take(route: Route, *, supervision: Tensor | None = None) -> dict[str, Any]:
    """The ``state`` that makes every duo layer of a forward pass take ``route``.

    Args:
        route: ``"small"``, ``"big"``, ``"skip"``; ``"random"``, drawn per token and layer; ``"router"``, the learned one; an integer
            tensor ``[B, L, Y]`` of options (0 small, 1 big, 2 skip) with a column for each of the Y duo layers; or a callable
            ``(layer, x_ND, context)`` that gives one of these names or an integer tensor of N options.
        supervision: ``[E]``, weights of the options: in training, learned routers are taught the route by focal loss (emitted as
            ``focal``) while it is executed.
    """
    state: dict[str, Any] = {ROUTE: route}
    if supervision is not None:
        state[SUPERVISION] = OfPass(supervision)
    return state


class DuoRouter(Router):
    """A router that does what the caller says, and decides itself where nothing is said.

    Nothing said means: the learned router if there is one, else a random draw in training and ``default`` in evaluation.
    """

    def __init__(self, config: "DuoFFN.Config", context: BuildContext, **options: Any) -> None:
        self.learned = config.router is not None
        prior = RandomChoice.Config(probability=config.probability)
        made = Router.Config(score=prior, balance=()) if config.router is None else config.router
        super().__init__(made, context.dim, config.num_options, layer=context.layer, **options)
        self.prior: RandomChoice = prior.build(context.dim, config.num_options)
        self.default = config.default
        self.place, self.num_layers = context.routed_layer, context.num_routed_layers

    @property
    def num_choices(self) -> None:
        """One for a route that is given, and as the learned router has them."""
        return None

    def decide(self, x_ND: Tensor, context: RoutingContext, overrides: Sequence[Override] = ()) -> Routing:
        """Route N items; see `take`. ``overrides`` change what that says.

        Raises ConfigError for an option this model was built without, a learned router that it does not have, a tensor of another shape,
        or a bias or closed destinations where nothing is selected.
        """
        route = context.state.get(ROUTE)
        if callable(route):
            route = route(self.layer, x_ND, context)
        elif isinstance(route, Tensor):
            route = self._column(route, x_ND.shape[0])
        propensity_N = None
        if route is None:
            route = "router" if self.learned else "random" if context.training else self.default
        if isinstance(route, Tensor):
            index_N = route.reshape(-1).long()
        elif route == "router" and self.learned:
            return super().decide(x_ND, context, overrides)
        elif route == "random":
            index_N = self.prior.project(x_ND, context).argmax(-1)
            propensity_N = self.prior.log_p_E.exp()[index_N]
        else:
            index_N = x_ND.new_full(x_ND.shape[:1], self._option(route), dtype=torch.int64)
        return self._given(index_N, x_ND, context, overrides, propensity_N)

    def _option(self, route: Any) -> int:
        names = OPTIONS[: self.num_destinations]
        if route == "router":
            raise ConfigError(
                "route is 'router', but this model has no learned router; make one with with_router(model)"
            )
        if route not in names:
            hint = "; build the model with allow_skip=True" if route == "skip" else ""
            raise ConfigError(f"route is {route!r}; use one of {', '.join(names)}, random, router{hint}")
        return names.index(route)

    def _column(self, route_BLY: Tensor, num_items: int) -> Tensor:
        """This layer's column of the tensor that a caller gave, which the first layer checks."""
        if route_BLY.dim() != 3 or route_BLY.shape[-1] != self.num_layers or route_BLY[..., 0].numel() != num_items:
            raise ConfigError(
                f"route has shape {list(route_BLY.shape)}; it must be [B, L, {self.num_layers}] with B L = {num_items} tokens"
            )
        if self.place == 0 and route_BLY.numel() and not torch.compiler.is_compiling():
            low, high = int(route_BLY.min()), int(route_BLY.max())
            if low < 0 or high >= self.num_destinations:
                wrong = low if low < 0 else high
                hint = "; 2 is skip: build the model with allow_skip=True" if wrong == SKIP else ""
                raise ConfigError(f"route has option {wrong}; use 0 to {self.num_destinations - 1}{hint}")
        return route_BLY[..., self.place]

    def _given(
        self,
        index_N: Tensor,
        x_ND: Tensor,
        context: RoutingContext,
        overrides: Sequence[Override],
        propensity_N: Tensor | None,
    ) -> Routing:
        """The routing that takes these options."""
        if any((each.bias_NE, each.open_NE, each.logit_NE) != (None, None, None) for each in overrides):
            raise ConfigError(
                "an override has a bias, shifts logits or closes options, but the route of this pass is given or drawn, not selected by "
                "the learned router; force options with index_NK"
            )
        score_NE = F.one_hot(index_N, self.num_destinations).to(wide(x_ND).dtype)
        if context.item_mask_N is not None:
            index_N = index_N.masked_fill(~context.item_mask_N, UNUSED)
        index_N1 = index_N.unsqueeze(1)
        propensity_N1 = None if propensity_N is None else propensity_N.unsqueeze(1)
        routing = Routing(index_N1, (index_N1 >= 0).to(score_NE.dtype), score_NE, propensity_N1)
        for override in overrides:
            routing = override.force(routing, lambda index_NK: (index_NK >= 0).to(score_NE.dtype), context.item_mask_N)
        if context.training and self.learned and SUPERVISION in context.state:
            logit_NE = self.score.project(x_ND, context)
            hidden = torch.as_tensor(hidden_items(overrides, index_N.device), device=index_N.device)
            label_N = index_N.masked_fill(hidden, UNUSED) if overrides else index_N
            context.emit_loss("focal", focal_loss(logit_NE, label_N, weight_E=context.state[SUPERVISION].value))
        return routing


class DuoFFN(FeedForward, kind="duo"):
    """A big and a small feed-forward of which each token takes one, or with ``allow_skip`` none."""

    @configclass
    class Config(FeedForward.Config):
        """The layer.

        Attributes:
            big: hidden width of the big module (the paper: 4 D).
            small: hidden width of the small one (the paper: a sixteenth of it).
            allow_skip: skipping both is an option.
            p_big: probability of big in random routing (the paper: 0.5).
            p_skip: probability of skip; the rest goes to small.
            default: what is taken in evaluation where nothing is said and nothing is learned.
            router: the learned router of stage 3, see `learned_router`; None before that.
            compute: ``gather`` gives each module its own tokens; ``dense`` computes all modules for all tokens and masks, for tests;
                ``auto`` gathers, except in a compiled graph, whose shapes must not depend on the routes.
            activation: of both modules, see `anabranch.nn.activation` (the paper: swiglu).
        """

        is_routed: ClassVar[bool] = True

        big: Size = Field(default=512, ge=1)
        small: Size = Field(default=32, ge=1)
        allow_skip: bool = False
        p_big: float = Field(default=0.5, ge=0, le=1)
        p_skip: float = Field(default=0.0, ge=0, le=1)
        default: Literal["small", "big", "skip", "random"] = "big"
        router: Router.Config | None = None
        compute: Literal["auto", "gather", "dense"] = "auto"
        activation: ActivationName = "swiglu"

        def __post_init__(self) -> None:
            if "skip" in (self.default, "skip" if self.p_skip else "") and not self.allow_skip:
                raise ConfigError(
                    f"p_skip is {self.p_skip} and default is {self.default!r}, but allow_skip is False; set allow_skip=True"
                )
            if self.p_big + self.p_skip > 1:
                raise ConfigError(f"p_big + p_skip is {self.p_big + self.p_skip}; it must be at most 1")

        @property
        def num_options(self) -> int:
            """E: 2, or 3 with skip."""
            return 2 + self.allow_skip

        @property
        def probability(self) -> tuple[float, ...]:
            """Of small, big and, where allowed, skip in random routing."""
            return (1.0 - self.p_big - self.p_skip, self.p_big, self.p_skip)[: self.num_options]

        def flops(self, dim: int, *, big: float, skip: float = 0.0) -> float:
            """Forward FLOPs per token of the modules where shares ``big`` and ``skip`` of the tokens take these options."""
            return (
                2 * activation_of(self.activation).num_matrices * dim * (big * self.big + (1 - big - skip) * self.small)
            )

        def module(self, hidden_dim: int) -> SwiGLU.Config | MLP.Config:
            """One of the two."""
            if self.activation == "swiglu":
                return SwiGLU.Config(hidden_dim=hidden_dim)
            return MLP.Config(hidden_dim=hidden_dim, activation=self.activation)

        def count(self, context: BuildContext) -> Count:
            """Both modules; active is the big one, which is what a token uses at most."""
            big, small = (
                self.module(hidden_dim).count(context.at(name))
                for name, hidden_dim in (("big", self.big), ("small", self.small))
            )
            router = 0
            if self.router is not None:
                self.router.check(self.num_options)
                router = self.router.score.num_parameters(context.dim, self.num_options)
            return Count(big.parameters + small.parameters, big.active, big.flops) + Count.dense(router)

    config: Config

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.big: SwiGLU | MLP = config.module(config.big).build(context.at("big"))
        self.small: SwiGLU | MLP = config.module(config.small).build(context.at("small"))
        own, shared = _split_balance(config, context)
        if config.router is not None:
            config = config.replace(router=config.router.replace(balance=own))
        self.router = DuoRouter(config, context, destinations=Destinations(balance=shared), generator=context.generator)

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """y_BLD."""
        x_ND = x_BLD.flatten(0, -2)
        routing = self.router(x_ND, context)
        compute = self.config.compute
        if compute == "auto":
            compute = "dense" if torch.compiler.is_compiling() or routing.num_choices > 1 else "gather"
        run = self._masked if compute == "dense" else self._gathered
        return run(x_ND, routing, context).view_as(x_BLD)

    def option(self, x_BLD: Tensor, option: int, context: ForwardContext | None = None) -> Tensor | None:
        """What one option adds to the residual stream; None for skip. ``context`` is of these tokens."""
        return None if option == SKIP else (self.small, self.big)[option](x_BLD, context)

    def _masked(self, x_ND: Tensor, routing: Routing, context: ForwardContext) -> Tensor:
        """sum_e w_e FFN_e(x), every module for every token; tokens that do not take it are padding to what routes inside."""
        weight_NE = torch.zeros_like(routing.score_NE).scatter_add(
            1, routing.index_NK.clamp_min(0), routing.weight_NK.to(routing.score_NE)
        )
        takes_NE = torch.zeros_like(weight_NE).scatter_add(
            1, routing.index_NK.clamp_min(0), routing.used_NK.to(weight_NE)
        )
        small_ND, big_ND = (
            module(x_ND, context if _is_plain(module) else _only(context, takes_NE[:, option] > 0))
            for option, module in enumerate((self.small, self.big))
        )
        weight_NE = weight_NE.to(small_ND.dtype)
        return weight_NE[:, SMALL, None] * small_ND + weight_NE[:, BIG, None] * big_ND

    def _gathered(self, x_ND: Tensor, routing: Routing, context: ForwardContext) -> Tensor:
        """The same where each module computes the tokens that take it, and nothing else."""
        plan = plan_dispatch(routing)
        sizes = plan.load_E.tolist()
        for option in (SMALL, BIG):
            if routing.num_choices == 1 and sizes[option] == x_ND.shape[0] > 0 and not context.training:
                return self.option(x_ND, option, context)  # type: ignore[return-value]
        parts = dispatch(x_ND, plan).split([*sizes, plan.choice_R.numel() - sum(sizes)])
        items = plan.item_R.split([len(part) for part in parts])
        small_RD, big_RD = (
            _on_part(module, part, context, item_R, len(x_ND))
            for module, part, item_R in zip((self.small, self.big), parts, items, strict=False)
        )
        # Skipped, and padding.
        idle = [torch.zeros_like(part, dtype=big_RD.dtype) for part in parts[2:]]
        rows_RD = torch.cat([small_RD, big_RD, *idle])
        return combine(rows_RD, plan, routing.weight_NK if routing.num_choices > 1 else None)


def _is_plain(module: Any) -> bool:
    """Whether a module has no layer that could ask for a context."""
    return is_plain(module.w13) and is_plain(module.w2)


def _on_part(module: Any, x_RD: Tensor, context: ForwardContext, item_R: Tensor, num_items: int) -> Tensor:
    """What a module makes of the tokens that take it."""
    if _is_plain(module):
        return module(x_RD)
    return on_items(module, x_RD, context, item_R, num_items) if len(x_RD) else no_rows([module], x_RD)


def _only(context: ForwardContext, mask_N: Tensor) -> ForwardContext:
    """The same pass where only these items are real."""
    real_N = context.item_mask_N
    return replace(context, item_mask_N=mask_N if real_N is None else mask_N & real_N)


def _split_balance(
    config: DuoFFN.Config, context: BuildContext
) -> tuple[tuple[Balancer.Config, ...], tuple[Balancer, ...]]:
    """(balancers of the layer, budgets that all layers share)."""
    given = () if config.router is None else config.router.balance
    budgets = [part for part in given if isinstance(part, BudgetLoss.Config)]
    shared = [
        context.share(f"duo_budget_{part.destination}", partial(part.build, config.num_options)) for part in budgets
    ]
    return tuple(part for part in given if part not in budgets), tuple(shared)


class Routed(nn.Module):
    """A duo decoder that takes one route in every call: what `evaluate` and others call like a decoder.

    Args:
        model: a `Decoder` of duo layers; it is not copied.
        route: see `take`.
    """

    def __init__(self, model: Decoder, route: Route) -> None:
        super().__init__()
        self.model, self.route = model, route

    def forward(self, token_BL: Tensor, target_BL: Tensor | None = None, **options: Any) -> DecoderOutput:
        """As the decoder's."""
        state = {**(options.pop("state", None) or {}), **take(self.route)}
        return self.model(token_BL, target_BL, state=state, **options)


def duo_layers(model: Decoder) -> list[DuoFFN]:
    """The duo layers of a model, in order. Raises ConfigError if there is none."""
    layers = [block.feed_forward for block in model.blocks if isinstance(block.feed_forward, DuoFFN)]
    if not layers:
        raise ConfigError("the model has no 'duo' feed-forward layers; build it with feed_forward=DuoFFN.Config()")
    return layers
