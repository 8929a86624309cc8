"""`OffloadedPool`: stands where an `ExpertPool` stood, computes the same, and owns no weights."""
# Shapes: N items, K choices, E experts, P = N K choices in a row, R rows of a wave, S slots, D width, F hidden

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.activation import activation_of
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.expert_loop import experts_in_turn
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.parts import Matrices
from anabranch.nn.quantize import packed_experts
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import DispatchPlan, sum_choices

Waves = Callable[[int, list[int], Tensor | None, Tensor, Mapping[str, Tensor], bool], Iterator[dict[int, int]]]


class ExpertSlots(Protocol):
    """Places in memory for experts of one shape and type, each for one expert at a time."""

    @property
    def w13_SFD(self) -> Tensor:
        """Gate and up of each, [S, 2F, D]; [S, P, bytes] or, of rows in several kinds, [S, bytes] of experts in few bits."""

    @property
    def w2_SDF(self) -> Tensor:
        """The second matrix of each, [S, D, F], or [S, P, bytes]."""

    @property
    def packed(self) -> tuple[Matrices, Matrices] | None:
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
        activation: as the pool's.
        biases: b13_EZ and b2_ED of all experts, which are small beside their matrices and stay in memory; None without biases.
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
        *,
        activation: str = "swiglu",
        biases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        # Not among the tensors that a model is filled with: who made it has them.
        for name, bias in zip(("b13", "b2"), biases or (None, None), strict=True):
            self.register_buffer(name, None if bias is None else bias.detach(), persistent=False)
        self.layer, self.num_experts, self.dim, self.hidden_dim = layer, num_experts, dim, hidden_dim
        self.out_dim = dim
        self.backend, self.slots, self._waves = backend, slots, waves
        self.is_shared, self.is_watched = False, is_watched

    b13: Tensor | None
    b2: Tensor | None

    @property
    def is_plain(self) -> bool:
        """As of an `ExpertPool`."""
        return self.activation == "swiglu" and self.b13 is None

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
                    "no gradient goes through experts in few bits that come when they are wanted; leave the budget (--expert-budget) out, "
                    "or load them in floating point (--quantize none)"
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
            y_RD = self._run(x_ND[choice_R // num_choices], offset_S, weight_R1, weight_on, slot_of)
            if y_PD is None:
                y_PD = y_RD.new_zeros(num_items * num_choices, self.out_dim)
            y_PD.index_copy_(0, choice_R, y_RD)
            self.slots.mark_used(list(slot_of.values()))
        if y_PD is None:
            return x_ND.new_zeros(len(x_ND), self.out_dim)
        y_NKD = y_PD.view(num_items, num_choices, self.out_dim)
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
                y_RD = self._run(x_RD, offset_S, weight_R1, weight_on, slot_of)
                dx_RD, dweight_R1 = torch.autograd.grad(y_RD, (x_RD, weight_R1), dy_ND[item_R].to(y_RD.dtype))
            dx_PD.index_copy_(0, choice_R, dx_RD.to(wide))
            dweight_P[choice_R] = dweight_R1.squeeze(1).to(dweight_P.dtype)
            self.slots.mark_used(list(slot_of.values()))
        dx_NKD = dx_PD.view(num_items, num_choices, -1)
        dx_ND = dx_NKD[:, 0]
        for choice in range(1, num_choices):
            dx_ND = dx_ND + dx_NKD[:, choice]
        return dx_ND.to(x_ND.dtype), dweight_P.view_as(routing.weight_NK)

    def _run(
        self, x_RD: Tensor, offset_S: Tensor, weight_R1: Tensor, weight_on: WeightOn, slot_of: Mapping[int, int]
    ) -> Tensor:
        """Rows that are sorted by slot, each an item with one choice; those of packed experts are not weighted yet."""
        # Other slots may be filled while these are differentiated, which their tensor would be told of.
        slots = self.w13_SFD.data, self.w2_SDF.data
        if self.packed is None and self.b13 is None:
            plan = DispatchPlan(torch.arange(len(x_RD), device=x_RD.device), offset_S, len(x_RD), 1)
            options: Any = {"weight_on": weight_on, "backend": self.backend, "activation": self.activation}
            return expert_mlp(x_RD, plan, weight_R1, *slots, **options)
        weight_R1 = weight_R1.to(x_RD.dtype)
        x_RD = x_RD * weight_R1 if weight_on == "input" else x_RD
        b13, b2 = self._biases(self.b13, slot_of), self._biases(self.b2, slot_of)
        ends = offset_S.tolist()
        if self.packed is not None:
            return packed_experts(*self.packed, x_RD, ends, b13_EZ=b13, b2_ED=b2, activation=self.activation)
        first, second = partial(_times, slots[0], b13), partial(_times, slots[1], b2)
        y_RD = experts_in_turn(first, second, x_RD, ends, activation=self.activation)
        return y_RD if weight_on == "input" else y_RD * weight_R1

    def _biases(self, bias_EX: Tensor | None, slot_of: Mapping[int, int]) -> dict[int, Tensor] | None:
        """Of the experts in these slots, by slot."""
        return None if bias_EX is None else {slot: bias_EX[expert] for expert, slot in slot_of.items()}

    def waves(
        self,
        experts: list[int],
        x_ND: Tensor | None,
        index_NK: Tensor,
        carry: Mapping[str, Tensor],
        *,
        together: bool = False,
    ) -> Iterator[dict[int, int]]:
        """{expert: slot} of what can run now, in the order of ``experts``, until all have; what was given has run when the next is asked
        for.

        Args:
            experts: that any item goes to.
            x_ND: what the layer sees; may be None unless `is_watched`.
            index_NK: where its items go.
            carry: what its router hands on, see `RoutingContext`; empty unless `is_watched`.
            together: all of them at once, of which there may be no more than slots.

        Raises DataError if an expert cannot be loaded.
        """
        return self._waves(self.layer, experts, x_ND, index_NK, carry, together)

    @property
    def num_weights(self) -> tuple[int, int]:
        """Of all experts, wherever they are: numbers of the first matrices, and of the second ones."""
        size = self.num_experts * self.dim * self.hidden_dim
        return len(activation_of(self.activation).parts) * size, size

    @property
    def packed(self) -> tuple[Matrices, Matrices] | None:
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


def _times(weight_SNK: Tensor, biases: Mapping[int, Tensor] | None, slot: int, x_RK: Tensor) -> Tensor:
    return F.linear(x_RK, weight_SNK[slot], None if biases is None else biases[slot])


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
        # Of no choices at all there would be one part.
        choices = np.split(order_P, starts[1:]) if len(experts) else []
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
