"""Pools that a group of layers shares: layer l of groups of r picks from the experts of layers r floor(l / r) ... and on."""
# Shapes: r layers of a group, N experts of a layer

import functools
from dataclasses import dataclass, replace
from typing import Protocol

from anabranch.errors import ConfigError
from anabranch.nn.context import BuildContext
from anabranch.nn.moe import MoE
from anabranch.nn.pool_policy import PoolAccess, PoolPolicy, make_pool
from anabranch.routing import Balancer, BiasBalancer, Candidates, PoolLoss
from anabranch.routing.destinations import Destinations


@dataclass(frozen=True)
class Group:
    """The group of one layer: its number, how many layers it has, which of them this one is, and its first own slot."""

    number: int
    size: int
    member: int
    own_start: int


class Schedule(Protocol):
    """Which slots of a pool are open in the course of training, such as `anabranch.experts.rexmoe.ProgressiveScaling.Config`."""

    def closes(self, size: int) -> bool:
        """Whether some slots of a group of so many layers are ever closed."""

    def build(self, num_own: int, size: int, *, own_start: int, layer: int, seed: int, min_open: int = 1) -> Candidates:
        """The candidates of one layer, with ``num_own`` experts of its own in a pool of ``size`` layers, at least ``min_open`` open."""


@dataclass(frozen=True)
class GroupPool(PoolPolicy):
    """Layers pick from the experts of their whole group, whose pool the model owns once (``model.shared``).

    Attributes:
        reuse: r, layers per group. With 1 the layer owns its experts as the plain one does.
        schedule: of the candidates, None for a pool that is open from the start.
        balance_alpha: alpha of the balance loss over the whole pool (`PoolLoss`), 0 for none.
        one_bias: bias balancers are one per pool, not one per layer.
        calls: how often one layer uses the pool in a forward pass.
    """

    reuse: int
    schedule: Schedule | None = None
    balance_alpha: float = 0.0
    one_bias: bool = False
    calls: int = 1

    def group(self, num_experts: int, context: BuildContext) -> Group:
        """The group of the layer that ``context`` builds.

        Raises ConfigError if ``reuse`` exceeds the routed layers of the model.
        """
        if self.reuse > context.num_routed_layers:
            raise ConfigError(
                f"reuse is {self.reuse}, but the model has {context.num_routed_layers} routed layers; "
                f"use 1 to {context.num_routed_layers}"
            )
        number, member = divmod(context.routed_layer, self.reuse)
        size = min(self.reuse, context.num_routed_layers - number * self.reuse)
        return Group(number, size, member, member * num_experts)

    def num_slots(self, num_experts: int, context: BuildContext) -> int:
        """r_g N."""
        return self.group(num_experts, context).size * num_experts

    def place(self, num_experts: int, context: BuildContext) -> tuple[BuildContext, range]:
        """The group's pool, which the model owns, and the layer's experts in it."""
        if self.reuse == 1:
            return super().place(num_experts, context)
        group = self.group(num_experts, context)
        return replace(context, path=f"shared.experts_{group.number}"), range(
            group.own_start, group.own_start + num_experts
        )

    def build(self, config: MoE.Config, context: BuildContext) -> PoolAccess:
        """The group's pool with its balancers, and the layer's candidates."""
        group = self.group(config.num_experts, context)
        num_slots, is_shared = group.size * config.num_experts, group.size > 1 or self.calls > 1
        own, pooled = self._split_balance(config, context, group)
        experts, name = None, f"layer_{context.layer}" if self.calls > 1 else None
        if self.reuse > 1:
            name = f"experts_{group.number}"
            place, _ = self.place(config.num_experts, context)
            experts = context.share(name, functools.partial(make_pool, config, place, num_slots, is_shared=is_shared))
        destinations = Destinations(name, group.own_start, self._candidates(config, context, group), pooled)
        return PoolAccess(config.router.replace(balance=own), num_slots, destinations, experts, is_shared)

    def _candidates(self, config: MoE.Config, context: BuildContext, group: Group) -> Candidates | None:
        if self.schedule is None or not self.schedule.closes(group.size):
            return None
        return self.schedule.build(
            config.num_experts,
            group.size,
            own_start=group.own_start,
            layer=context.layer,
            seed=context.seed,
            min_open=config.router.select.exact_choices or 1,
        )

    def _split_balance(
        self, config: MoE.Config, context: BuildContext, group: Group
    ) -> tuple[tuple[Balancer.Config, ...], tuple[Balancer, ...]]:
        """(balancers of the layer, balancers of the pool)."""
        own, pooled = list(config.router.balance), []
        if self.reuse == 1:
            return tuple(own), ()
        num_slots = group.size * config.num_experts
        if self.one_bias:
            biases = [part for part in own if isinstance(part, BiasBalancer.Config)]
            own = [part for part in own if part not in biases]
            for number, part in enumerate(biases):
                pooled.append(context.share(f"bias_{group.number}_{number}", functools.partial(part.build, num_slots)))
        if self.balance_alpha:
            loss = PoolLoss.Config(alpha=self.balance_alpha)
            pooled.append(context.share(f"balance_{group.number}", functools.partial(loss.build, num_slots)))
        return tuple(own), tuple(pooled)
