"""Which experts the routers of a layer may pick: by default the layer's own; a design may let them pick those of a group of layers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anabranch.nn.context import BuildContext
from anabranch.nn.expert_layers import build_expert_layers
from anabranch.nn.pool import ExpertPool
from anabranch.routing import Router
from anabranch.routing.destinations import Destinations

if TYPE_CHECKING:
    from anabranch.nn.moe import MoE


@dataclass(frozen=True)
class PoolAccess:
    """What a policy gave one layer.

    Attributes:
        router: config of the layer's routers, without the balancers that are the pool's.
        num_slots: how many experts they choose from.
        destinations: what the routers choose from.
        experts: a pool that the model owns; None where the layer makes its own.
        is_shared: several calls of a forward pass use the layer's own pool, see `ExpertPool`.
    """

    router: Router.Config
    num_slots: int
    destinations: Destinations = field(default_factory=Destinations)
    experts: ExpertPool | None = None
    is_shared: bool = False


@dataclass(frozen=True)
class PoolPolicy:
    """A layer picks its own experts. Designs derive from this; `MoE.Config.pool_policy` says which one a layer has."""

    def num_slots(self, num_experts: int, context: BuildContext) -> int:
        """How many experts the layer that ``context`` builds may pick from, of layers with ``num_experts`` each."""
        return num_experts

    def place(self, num_experts: int, context: BuildContext) -> tuple[BuildContext, range]:
        """(where the pool stands in the model, as ``path``; which of its experts the layer brings)."""
        return context.at("experts"), range(num_experts)

    def build(self, config: "MoE.Config", context: BuildContext) -> PoolAccess:
        """What the routers of the layer that ``context`` builds choose from; makes a shared pool if it is the first to ask."""
        return PoolAccess(config.router, config.num_experts)


def build_router(config: Router.Config, num_slots: int, destinations: Destinations, context: BuildContext) -> Router:
    """A router over ``num_slots`` experts, of the layer that ``context`` builds."""
    return config.build(
        context.dim,
        num_slots,
        layer=context.layer,
        destinations=destinations,
        generator=context.generator,
        share=context.share,
    )


def make_pool(config: "MoE.Config", context: BuildContext, num_experts: int, *, is_shared: bool = False) -> ExpertPool:
    """The pool of ``num_experts`` experts as ``config`` describes them; ``context`` is of its place, see `PoolPolicy.place`."""
    return ExpertPool(
        num_experts,
        context.dim,
        config.hidden_dim,
        init_std=context.init_std,
        w2_scale=context.residual_std / context.init_std,
        generator=context.generator,
        recompute=config.recompute,
        backend=config.backend,
        is_shared=is_shared,
        activation=config.activation,
        bias=config.bias,
        layers=build_expert_layers(context, num_experts, config.hidden_dim, config.activation),
    )
