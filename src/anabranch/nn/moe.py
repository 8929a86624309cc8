"""The plain mixture-of-experts layer: a router, a pool of experts, and optional shared experts that see every token."""
# Shapes: B batch, L positions, N = B L items, E experts, K per token, D width, F hidden

from typing import Any, ClassVar, Literal

from torch import Tensor

from anabranch.config import Field, Repeats, Size, configclass
from anabranch.errors import ConfigError
from anabranch.nn.activation import ActivationName, activation_of
from anabranch.nn.context import BuildContext, Count, ForwardContext, set_unregistered
from anabranch.nn.description import FeedForwardForm, Passes
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.expert_layers import count_experts
from anabranch.nn.feed_forward import FeedForward, SwiGLU
from anabranch.nn.grouped import BACKENDS
from anabranch.nn.linear import Projection, build_linear, call_linear, count_linear
from anabranch.nn.pool_policy import PoolPolicy, build_router, make_pool
from anabranch.routing import Router, Routing, WeightField, capacity_of, limit_capacity
from anabranch.routing.shared import shared_parameters


class MoE(FeedForward, kind="moe"):
    """y = sum_k w_k E_k(x) + shared(x). Dropless unless ``capacity_factor`` is set."""

    @configclass
    class Config(FeedForward.Config):
        """The layer.

        Attributes:
            num_experts: N, experts this layer owns.
            hidden_dim: width of an expert.
            router: score, select and balance parts.
            shared_experts: always-on experts (DeepSeekMoE), each ``hidden_dim`` wide.
            shared_hidden_dim: total width of the shared experts where it is not shared_experts * hidden_dim.
            shared_gate: scale the shared output by sigmoid(w x) (Qwen2-MoE).
            shared_weight: a, y = (1 - a) routed + a shared (RMoE has 0.5); None, the default, adds both whole (DeepSeekMoE).
            weight_on: apply routing weights to the expert's ``output``, or to its ``input`` (Llama 4).
            capacity_factor: drop what exceeds ceil(factor N K / E) rows of an expert in training; None drops nothing.
            capacity_order: who stays then, see `limit_capacity`. The share that is dropped is emitted as metric ``drop_ratio``.
            capacity_renormalize: scale what a token keeps so its weights sum to what they summed to.
            recompute: recompute expert activations in the backward pass, to save memory.
            backend: expert compute, see `anabranch.nn.grouped`.
            activation: of the routed experts, see `anabranch.nn.activation`; shared ones are SwiGLUs.
            bias: routed experts have biases behind both matrices (gpt-oss).
        """

        is_routed: ClassVar[bool] = True

        num_experts: Repeats = Field(default=8, ge=1)
        hidden_dim: Size = Field(default=256, ge=1)
        router: Router.Config = Router.Config()
        shared_experts: int = Field(default=0, ge=0)
        shared_hidden_dim: Size | None = Field(default=None, ge=1)
        shared_gate: bool = False
        shared_weight: float | None = Field(default=None, gt=0, lt=1)
        weight_on: WeightOn = "output"
        capacity_factor: float | None = Field(default=None, gt=0)
        capacity_order: Literal["token", "score"] = "token"
        capacity_renormalize: bool = False
        recompute: bool = False
        backend: str = "auto"
        activation: ActivationName = "swiglu"
        bias: bool = False

        def __post_init__(self) -> None:
            choices = self.router.select.exact_choices or 1
            if choices > self.num_experts:
                raise ConfigError(
                    f"router.select takes {choices} experts of a token, but num_experts is {self.num_experts}; use 1 to {self.num_experts}"
                )
            if self.backend not in BACKENDS:
                raise ConfigError(f"backend is {self.backend!r}; use one of {', '.join(BACKENDS)}")
            if self.backend == "native" and self.activation != "swiglu":
                raise ConfigError(
                    f"backend is 'native', whose kernels compute swiglu, and activation is {self.activation!r}; use backend 'auto'"
                )
            if (self.shared_gate or self.shared_hidden_dim or self.shared_weight) and not self.shared_experts:
                raise ConfigError("shared_gate, shared_weight and shared_hidden_dim need shared_experts of at least 1")

        @property
        def num_choices(self) -> int:
            """Most routed experts per token."""
            return self.router.num_choices(self.num_experts)

        def conversions(self) -> tuple[WeightField, ...]:
            """Those of the router's score."""
            return self.router.score.conversions()

        @property
        def pool_policy(self) -> PoolPolicy:
            """Which experts the layer may pick: its own."""
            return PoolPolicy()

        @property
        def shared_width(self) -> int:
            """Hidden width of the shared experts together; 0 without any."""
            return self.shared_hidden_dim or self.shared_experts * self.hidden_dim

        def num_destinations(self, context: BuildContext) -> int:
            """How many experts the router chooses from."""
            return self.pool_policy.num_slots(self.num_experts, context)

        def count(self, context: BuildContext) -> Count:
            """Routed experts, of which K are active; shared experts; router."""
            self.router.check(self.num_destinations(context))
            routed = self.count_routed(context, self.num_choices)
            return routed + self.count_shared(context) + self.count_router(context, context.routed_layer == 0)

        def count_routed(self, context: BuildContext, num_choices: int) -> Count:
            """The layer's routed experts, of which a token uses ``num_choices``."""
            place, numbers = self.pool_policy.place(self.num_experts, context)
            made = count_experts(place, numbers, self.hidden_dim, self.activation, num_choices)
            width = sum(activation_of(self.activation).rows(self.hidden_dim).values()) + context.dim
            return made + Count(len(numbers) * width, num_choices * width, 0) if self.bias else made

        def count_shared(self, context: BuildContext) -> Count:
            """The shared experts, and their gate."""
            if not self.shared_experts:
                return Count()
            shared = SwiGLU.Config(hidden_dim=self.shared_width).count(context.at("shared"))
            return shared + count_linear(self.gate_projection(context), context) if self.shared_gate else shared

        def gate_projection(self, context: BuildContext) -> Projection:
            """The linear layer of ``shared_gate``."""
            return context.projection("shared_gate", context.dim, 1)

        def count_router(self, context: BuildContext, is_first: bool) -> Count:
            """One router; what routers of a model share counts for the first of them."""
            score, num_destinations = self.router.score, self.num_destinations(context)
            parameters = score.num_parameters(context.dim, num_destinations)
            parameters -= 0 if is_first else shared_parameters(score, context.dim)
            return Count(parameters, parameters, score.num_flops(context.dim, num_destinations))

    config: Config

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        policy = config.pool_policy
        access = policy.build(config, context)
        self.router = build_router(access.router, access.num_slots, access.destinations, context)
        if access.experts is None:
            place, _ = policy.place(config.num_experts, context)
            self.experts = make_pool(config, place, config.num_experts, is_shared=access.is_shared)
        else:
            set_unregistered(self, "experts", access.experts)
        self.shared: SwiGLU | None = None
        self.shared_gate: Any = None
        if config.shared_experts:
            self.shared = SwiGLU.Config(hidden_dim=config.shared_width).build(context.at("shared"))
            self.shared_gate = build_linear(config.gate_projection(context), context) if config.shared_gate else None

    def describe(self) -> FeedForwardForm | str:
        """The experts, once."""
        if self.config.weight_on != "output":
            return "routing weights act on the experts' inputs"
        if self.config.shared_weight is not None:
            return "routed and shared experts are weighed against each other"
        if not getattr(self.experts, "is_plain", True):
            return "experts are not plain SwiGLUs"
        return Passes((self.router,), self.experts, self.shared, self.shared_gate)

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """y_BLD."""
        return self.run(self.router, x_BLD, context)

    def run(self, router: Router, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """y_BLD, as ``router`` sends the tokens."""
        x_ND = x_BLD.flatten(0, -2)
        routing = router(x_ND, context)
        if self.config.capacity_factor is not None and context.training:
            routing = self._limit(routing, self.config.capacity_factor, context)
        y_ND = self.experts(x_ND, routing, weight_on=self.config.weight_on, context=context)
        if self.shared is not None:
            shared_ND = self.shared(x_ND, context)
            if self.shared_gate is not None:
                shared_ND = shared_ND * call_linear(self.shared_gate, x_ND, context).sigmoid()
            weight = self.config.shared_weight
            y_ND = y_ND + shared_ND if weight is None else (1 - weight) * y_ND + weight * shared_ND
        return y_ND.view_as(x_BLD)

    def _limit(self, routing: Routing, factor: float, context: ForwardContext) -> Routing:
        config = self.config
        capacity = capacity_of(routing.num_items, routing.num_choices, routing.num_destinations, factor)
        limited = limit_capacity(
            routing, capacity, order=config.capacity_order, renormalize=config.capacity_renormalize
        )
        wanted = routing.used_NK.sum()
        context.emit_metric("drop_ratio", (wanted - limited.used_NK.sum()) / wanted.clamp_min(1))
        return limited
