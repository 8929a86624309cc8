"""`OffloadedPool`: stands where an `ExpertPool` stood, computes the same, and owns no weights."""
# Shapes: N items, K choices, E experts, P = N K choices in a row, R rows of a wave, S slots, D width, F hidden

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.packed import Packed
from anabranch.nn.quantize import packed_experts
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import DispatchPlan, sum_choices

Waves = Callable[[int, list[int], Tensor | None, Tensor, Mapping[str, Tensor]], Iterator[dict[int, int]]]


class ExpertSlots(Protocol):
    """Places in memory for experts of one shape and type, each for one expert at a time."""

    @property
    def w13_SFD(self) -> Tensor:
        """Gate and up of each, [S, 2F, D], or [S, P, bytes] of experts in few bits."""

    @property
    def w2_SDF(self) -> Tensor:
        """The second matrix of each, [S, D, F], or [S, P, bytes]."""

    @property
    def packed(self) -> tuple[Packed, Packed] | None:
        """Both of experts in few bits; None of others."""

    def mark_used(self, numbers: Sequence[int]) -> None:
        """Kernels that read these slots have been launched."""


class OffloadedPool(nn.Module):
    """Experts of a layer that come when they are wanted, and do not learn.

    Args:
        layer: number among the routed layers.
        num_experts, dim, hidden_dim, backend: as the pool that it replaces.
        slots: where its experts are while they run.
        waves: given the layer and the arguments of `OffloadedPool.waves`, yields what that says.
        is_watched: whether it looks at their input.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        backend: str,
        slots: ExpertSlots,
        waves: Waves,
        is_watched: bool,
    ) -> None:
        super().__init__()
        self.layer, self.num_experts, self.dim, self.hidden_dim = layer, num_experts, dim, hidden_dim
        self.backend, self.slots, self._waves = backend, slots, waves
        self.is_shared, self.is_watched = False, is_watched

    @torch.compiler.disable
    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        *,
        weight_on: WeightOn = "output",
        context: RoutingContext | None = None,
    ) -> Tensor:
        """y_ND as `ExpertPool`'s; it does not depend on what was in slots before.

        Each choice is computed as a row of its own and the rows of an item are added in the order of its choices, in float32, so that it
        does not matter in which waves they came.

        Gradients of items and of the weights of choices are made in the backward pass, for which experts come again; experts themselves
        do not learn.

        Raises ConfigError where gradients are wanted through experts in few bits, DataError if an expert cannot be loaded.
        """
        carry = {} if context is None else context.carry
        if torch.is_grad_enabled() and (x_ND.requires_grad or routing.weight_NK.requires_grad):
            if self.packed is not None:
                raise ConfigError(
                    "no gradient goes through offloaded experts in few bits; load them as they are, or without a budget"
                )
            through: Tensor = _Through.apply(x_ND, routing.weight_NK, self, routing, weight_on, carry)
            return through
        return self._forward(x_ND, routing, weight_on, carry)

    def _forward(self, x_ND: Tensor, routing: Routing, weight_on: WeightOn, carry: Mapping[str, Tensor]) -> Tensor:
        num_items, num_choices = routing.index_NK.shape
        rows = _Rows(routing)
        y_PD: Tensor | None = None
        for slot_of in self.waves(rows.experts, x_ND, routing.index_NK, carry):
            choice_R, offset_S = rows.of(slot_of, len(self.w13_SFD))
            choice_R, offset_S = choice_R.to(x_ND.device), offset_S.to(x_ND.device)
            weight_R1 = routing.weight_NK.reshape(-1, 1)[choice_R]
            y_RD = self._run(x_ND[choice_R // num_choices], offset_S, weight_R1, weight_on)
            if y_PD is None:
                y_PD = y_RD.new_zeros(num_items * num_choices, self.dim)
            y_PD.index_copy_(0, choice_R, y_RD)
            self.slots.mark_used(list(slot_of.values()))
        if y_PD is None:
            return torch.zeros_like(x_ND)
        y_NKD = y_PD.view(num_items, num_choices, self.dim)
        if self.packed is not None:
            return sum_choices(y_NKD, None if weight_on == "input" else routing.weight_NK)
        total_ND = y_NKD[:, 0].to(torch.promote_types(y_PD.dtype, torch.float32))
        for choice in range(1, num_choices):
            total_ND = total_ND + y_NKD[:, choice]
        return total_ND.to(y_PD.dtype)

    def _backward(
        self, dy_ND: Tensor, x_ND: Tensor, routing: Routing, weight_on: WeightOn, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(dx_ND, dweight_NK): each wave of experts is run again, and differentiated.

        As in `forward` it does not matter in which waves they come: each choice has a row of its own, added in the order of choices.
        """
        num_items, num_choices = routing.index_NK.shape
        rows = _Rows(routing)
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        dx_PD = torch.zeros(num_items * num_choices, x_ND.shape[1], dtype=wide, device=x_ND.device)
        dweight_P = torch.zeros_like(routing.weight_NK).reshape(-1)
        for slot_of in self.waves(rows.experts, x_ND, routing.index_NK, carry):
            choice_R, offset_S = (part.to(x_ND.device) for part in rows.of(slot_of, len(self.w13_SFD)))
            item_R = choice_R // num_choices
            with torch.enable_grad():
                x_RD = x_ND[item_R].requires_grad_()
                weight_R1 = routing.weight_NK.reshape(-1, 1)[choice_R].requires_grad_()
                y_RD = self._run(x_RD, offset_S, weight_R1, weight_on)
                dx_RD, dweight_R1 = torch.autograd.grad(y_RD, (x_RD, weight_R1), dy_ND[item_R].to(y_RD.dtype))
            dx_PD.index_copy_(0, choice_R, dx_RD.to(wide))
            dweight_P[choice_R] = dweight_R1.squeeze(1).to(dweight_P.dtype)
            self.slots.mark_used(list(slot_of.values()))
        dx_NKD = dx_PD.view(num_items, num_choices, -1)
        dx_ND = dx_NKD[:, 0]
        for choice in range(1, num_choices):
            dx_ND = dx_ND + dx_NKD[:, choice]
        return dx_ND.to(x_ND.dtype), dweight_P.view_as(routing.weight_NK)

    def _run(self, x_RD: Tensor, offset_S: Tensor, weight_R1: Tensor, weight_on: WeightOn) -> Tensor:
        """Rows that are sorted by slot, each an item with one choice; those of packed experts are not weighted yet."""
        if self.packed is not None:
            x_RD = x_RD * weight_R1.to(x_RD.dtype) if weight_on == "input" else x_RD
            return packed_experts(*self.packed, x_RD, offset_S.tolist())
        plan = DispatchPlan(torch.arange(len(x_RD), device=x_RD.device), offset_S, len(x_RD), 1)
        # Other slots may be filled while these are differentiated, which their tensor would be told of.
        slots = self.w13_SFD.data, self.w2_SDF.data
        return expert_mlp(x_RD, plan, weight_R1, *slots, weight_on=weight_on, backend=self.backend)

    def waves(
        self, experts: list[int], x_ND: Tensor | None, index_NK: Tensor, carry: Mapping[str, Tensor]
    ) -> Iterator[dict[int, int]]:
        """{expert: slot} of what can run now, until all have; what was given has run when the next is asked for.

        Args:
            experts: that any item goes to.
            x_ND: what the layer sees; may be None unless `is_watched`.
            index_NK: where its items go.
            carry: what its router hands on, see `RoutingContext`; empty unless `is_watched`.

        Raises DataError if an expert cannot be loaded.
        """
        return self._waves(self.layer, experts, x_ND, index_NK, carry)

    @property
    def packed(self) -> tuple[Packed, Packed] | None:
        """The slots of experts in few bits: gate and up of each, then the second matrix; None for others."""
        return self.slots.packed

    @property
    def w13_SFD(self) -> Tensor:
        """The slots: gate and up of each, [S, 2F, D], or [S, P, bytes]."""
        return self.slots.w13_SFD

    @property
    def w2_SDF(self) -> Tensor:
        """The slots: the second matrix of each, [S, D, F], or [S, P, bytes]."""
        return self.slots.w2_SDF

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, offloaded"


class _Through(torch.autograd.Function):
    """Keeps what goes in; experts are brought once more for the backward pass, one wave after another."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_NK: Tensor,
        pool: OffloadedPool,
        routing: Routing,
        weight_on: WeightOn,
        carry: Mapping[str, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x_ND, weight_NK)
        ctx.pool, ctx.weight_on = pool, weight_on
        ctx.routing, ctx.carry = routing.index_NK, dict(carry)
        return pool._forward(x_ND, routing, weight_on, carry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK = ctx.saved_tensors
        routing = Routing(ctx.routing, weight_NK, weight_NK.new_zeros(len(x_ND), ctx.pool.num_experts))
        dx_ND, dweight_NK = ctx.pool._backward(dy_ND, x_ND, routing, ctx.weight_on, ctx.carry)
        return dx_ND, dweight_NK, None, None, None, None


class _Rows:
    """The choices of a routing, sorted by expert once, so that a wave is some of them.

    Attributes:
        experts: that any choice goes to.
    """

    def __init__(self, routing: Routing) -> None:
        index_P = routing.index_NK.reshape(-1).cpu().numpy()
        order_P = np.argsort(index_P, kind="stable")
        experts, starts = np.unique(index_P[order_P], return_index=True)
        choices = np.split(order_P, starts[1:])
        self._choices = {
            expert: choice for expert, choice in zip(experts.tolist(), choices, strict=True) if expert >= 0
        }
        self.experts = list(self._choices)

    def of(self, slot_of: dict[int, int], num_slots: int) -> tuple[Tensor, Tensor]:
        """(choice_R, offset_S): the choices of these experts in the order of their slots, and where each slot's end."""
        experts = sorted(slot_of, key=slot_of.__getitem__)
        count_S = np.zeros(num_slots, np.int32)
        for expert in experts:
            count_S[slot_of[expert]] = len(self._choices[expert])
        choice_R = np.concatenate([self._choices[expert] for expert in experts])
        return torch.from_numpy(choice_R), torch.from_numpy(np.cumsum(count_S, dtype=np.int32))
