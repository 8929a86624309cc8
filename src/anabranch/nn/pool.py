"""`ExpertPool`: E experts as two stacked parameters, and the work of a routed batch on them.

    pool = ExpertPool(num_experts=64, dim=512, hidden_dim=256)
    y_ND = pool(x_ND, routing)          # routing: the Routing that any router returns

Its activation is a part (SwiGLU unless said otherwise), and so are the matrices of single experts, see `anabranch.nn.expert_layers`.
A pool knows neither layers nor routers, so several layers may share one: autograd sums their gradients.
"""
# Shapes: N items, E experts, D width, F hidden, Z what the first matrix gives: 2F with a gate, else F

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.activation import activation_of
from anabranch.nn.context import recomputed
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.expert_layers import ExpertLayers
from anabranch.nn.expert_loop import biased_experts
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.kernels.operands import takes
from anabranch.nn.sums import GradientSums, gather_gradients
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

if TYPE_CHECKING:
    from anabranch.nn.expert_parallel import ExpertExchange

__all__ = ["ExpertPool", "check_stacked"]


class ExpertPool(nn.Module):
    """E experts in stacked weights: ``w2_e (silu(gate_e x) * up_e x)``, or with another activation.

    Args:
        num_experts: E.
        dim: D, width of items.
        hidden_dim: F, width inside each expert.
        init_std: standard deviation of the initial weights, a normal cut at three of them (OLMoE, DeepSeek-V3: 0.02).
        w2_scale: factor on the initial w2, e.g. ``1 / sqrt(2 * num_layers)`` to keep a deep residual stream even.
        generator: source of the initial weights; the default generator if None.
        recompute: keep nothing of the forward pass; the backward pass repeats the first matmul (see `expert_mlp`), or where experts have
            layers of their own all of it.
        backend: how to compute, see `anabranch.nn.grouped`.
        is_shared: several layers of a model use this pool; their gradients then add up in place.
        activation: a name of `anabranch.nn.activation`.
        bias: experts have biases behind both matrices (gpt-oss); they then run in torch, one after the other.
        layers: what experts have beside the stacked matrices, or instead of them; None if there is nothing.

    Attributes:
        w13: parameter [E, 2F, D], gate rows, then up rows; [E, F, D] without a gate. None where each expert has a layer of its own.
        w2: parameter [E, D, F], or None likewise.
        b13, b2: parameters [E, Z] and [E, D]; None without biases.
        exchange: how rows come to the experts of other processes; None where all are here, see `anabranch.nn.expert_parallel`.

    Raises:
        ConfigError: a size below 1, an unknown activation, or backend ``native`` where experts have layers of their own.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        init_std: float = 0.02,
        w2_scale: float = 1.0,
        generator: torch.Generator | None = None,
        recompute: bool = False,
        backend: str = "auto",
        is_shared: bool = False,
        activation: str = "swiglu",
        bias: bool = False,
        layers: ExpertLayers | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("hidden_dim", hidden_dim)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if layers is not None and backend == "native":
            raise ConfigError(
                "backend is 'native', whose kernels compute stacked matrices, and linears names parts of experts; use backend 'auto'"
            )
        if bias and (layers is not None or backend not in ("auto", "torch")):
            raise ConfigError("experts with biases run in torch and have no layers of their own; use backend 'auto'")
        self.recompute = recompute
        self.backend = backend
        self.is_shared = is_shared
        self.activation = activation
        self.layers = layers
        self.exchange: ExpertExchange | None = None
        rows = sum(activation_of(activation).rows(hidden_dim).values())
        is_stacked = (True, True) if layers is None else layers.is_stacked
        for name, stacked, shape in zip(("w13", "w2"), is_stacked, ((rows, dim), (dim, hidden_dim)), strict=True):
            weight = nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype)) if stacked else None
            self.register_parameter(name, weight)
        for name, width in (("b13", rows), ("b2", dim)):
            made = nn.Parameter(torch.zeros(num_experts, width, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, made)
        self.reset_parameters(init_std=init_std, w2_scale=w2_scale, generator=generator)
        if layers is not None:
            layers.start(self.w13, self.w2)

    w13: nn.Parameter | None
    w2: nn.Parameter | None
    b13: nn.Parameter | None
    b2: nn.Parameter | None

    @property
    def stacks(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(w13, w2). Raises ConfigError where one is not stacked, as each expert has a layer of its own."""
        if self.w13 is None or self.w2 is None:
            raise ConfigError(
                "experts have layers of their own (linears names parts of them), so there is no stack of their matrices"
            )
        return self.w13, self.w2

    @property
    def num_experts(self) -> int:
        """E."""
        return self.stacks[0].shape[0] if self.layers is None else self.layers.num_experts

    @property
    def dim(self) -> int:
        """D."""
        return self.stacks[0].shape[2] if self.layers is None else self.layers.dim

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.stacks[1].shape[2] if self.layers is None else self.layers.hidden_dim

    @property
    def is_plain(self) -> bool:
        """Whether experts are SwiGLUs of the stacked matrices and nothing else, which other code may then read instead of calling it."""
        return self.activation == "swiglu" and self.layers is None and self.b13 is None

    def reset_parameters(
        self, *, init_std: float = 0.02, w2_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        """Draw the stacked weights afresh: normal, cut at three standard deviations. Meta tensors are left alone."""
        for weight, std in ((self.w13, init_std), (self.w2, init_std * w2_scale)):
            if weight is not None and not weight.is_meta:
                nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)

    @classmethod
    def from_dense(cls, w13_FD: Tensor, w2_DF: Tensor, num_experts: int, **options: object) -> Self:
        """Sparse upcycling (arXiv 2212.05055): every expert starts as a copy of one dense feed-forward.

        With weights that sum to 1 the layer then computes what the dense one did. ``options`` are those of the class.
        """
        pool = cls(num_experts, w13_FD.shape[1], w2_DF.shape[1], device="meta", **options)  # type: ignore[arg-type]
        pool.w13 = nn.Parameter(w13_FD.detach().expand(num_experts, -1, -1).clone())
        pool.w2 = nn.Parameter(w2_DF.detach().expand(num_experts, -1, -1).clone())
        return pool

    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        *,
        weight_on: WeightOn = "output",
        context: RoutingContext | None = None,
    ) -> Tensor:
        """y_ND: each item's experts, weighted and summed. ``context`` tells a shared pool which calls belong to one forward pass."""
        if self.b13 is not None:
            return self._with_biases(x_ND, routing, weight_on, context)
        if self.layers is not None:
            return self._by_layers(x_ND, routing, weight_on, context)
        if self.exchange is None:
            return self._compute(x_ND, routing, weight_on, context)

        def here(x_MD: Tensor, local: Routing) -> Tensor:
            return self._compute(x_MD, local, "output", context)

        return self.exchange(here, x_ND, routing, on_input=weight_on == "input")

    def _with_biases(
        self,
        x_ND: Tensor,
        routing: Routing,
        weight_on: WeightOn,
        context: RoutingContext | None,
    ) -> Tensor:
        """y_ND where experts have biases."""
        if self.exchange is not None:
            raise ConfigError("experts with biases do not run on several processes")

        def run(x_ND: Tensor, context: RoutingContext | None) -> Tensor:
            assert self.b13 is not None
            assert self.b2 is not None
            w13, w2 = self.stacks
            parts = (w13, self.b13, w2, self.b2)
            return biased_experts(x_ND, routing, *parts, activation=self.activation, on_input=weight_on == "input")

        learns = self.recompute and torch.is_grad_enabled()
        return recomputed(run, x_ND, context) if learns else run(x_ND, context)

    def _by_layers(
        self,
        x_ND: Tensor,
        routing: Routing,
        weight_on: WeightOn,
        context: RoutingContext | None,
    ) -> Tensor:
        """y_ND where experts have layers of their own."""

        def run(x_ND: Tensor, context: RoutingContext | None) -> Tensor:
            assert self.layers is not None
            return self.layers(x_ND, routing, self.w13, self.w2, weight_on=weight_on, context=context)

        learns = self.recompute and torch.is_grad_enabled()
        return recomputed(run, x_ND, context) if learns else run(x_ND, context)

    def _compute(
        self,
        x_ND: Tensor,
        routing: Routing,
        weight_on: WeightOn,
        context: RoutingContext | None,
    ) -> Tensor:
        """y_ND of the experts that are here."""
        sums, w13_EFD, w2_EDF = self._weights(context)
        return expert_mlp(
            x_ND,
            plan_dispatch(routing),
            routing.weight_NK,
            w13_EFD,
            w2_EDF,
            weight_on=weight_on,
            backend=self.backend,
            recompute=self.recompute,
            sums=sums,
            activation=self.activation,
        )

    def _weights(self, context: RoutingContext | None) -> tuple[GradientSums | None, Tensor, Tensor]:
        """The weights; those of a shared pool once per forward pass, with a place where their gradients gather."""
        pair: Any = self.stacks
        if self.exchange is not None:
            pair = [self.exchange.local(weight) for weight in pair]
        learns = torch.is_grad_enabled() and all(weight.requires_grad for weight in self.stacks)
        if not self.is_shared or context is None or not learns or not takes():
            return None, *pair
        return context.once(self, lambda: gather_gradients(*pair))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        sizes = f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"
        return sizes if self.activation == "swiglu" else f"{sizes}, activation={self.activation}"


def check_stacked(model: nn.Module) -> None:
    """Raise ConfigError if experts of ``model`` have layers beside or instead of their stacked matrices, which would be left behind."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertPool) and module.layers is not None:
            raise ConfigError(
                f"experts of {name} have layers of their own (linears names parts of them), and only stacked matrices become those of "
                "another pool; start from a model whose linears leave experts as they are"
            )
