"""`OffloadedLowRank`: stands where a `LowRankPool` stood, computes the same, and owns no numbers: adapters come when they are wanted.

    model, tokenizer, engine = load_offloaded("runs/mixture", "64MiB")       # of anabranch.serving.expertflow: adapters stay in their file

On a CPU, where nothing learns, the compiled kernel makes sums that are the same to the bit as those of the pool in memory, whatever the
budget: adapters are added one after another by their numbers, as many at a time as there are slots. Where items use most adapters the pool
computes all at once (`anabranch.adapters.side_by_side`); so does this where all of the layer have a slot, and otherwise sums are rounded
otherwise. So they are on a GPU, in float64 and where nothing compiles: what a library's product of matrices rounds to depends on where they
lie in memory.
"""
# Shapes: N items, E adapters, K choices per item, R rows of a wave, S slots, C inputs, O outputs, Q greatest rank

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from anabranch.adapters.pool import LowRankPool, scales_of
from anabranch.adapters.segmented import add_adapter, can_add_segmented, can_segment
from anabranch.adapters.side_by_side import is_mostly_used, side_by_side
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.kernels.low_rank import can_add
from anabranch.nn.offloaded import ExpertSlots, OffloadedPool, Waves
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import DispatchPlan, plan_dispatch

__all__ = ["OffloadedLowRank"]


class OffloadedLowRank(OffloadedPool):
    """Adapters of one linear layer that come when they are wanted, and do not learn.

    Args:
        layer: number among the layers with adapters.
        pool: whose place it takes.
        slots: where adapters are while they run: A ``[S, Q, C]``, then B ``[S, O, Q]``.
        waves: see `OffloadedPool`.
    """

    def __init__(self, layer: int, pool: LowRankPool, slots: ExpertSlots, waves: Waves) -> None:
        sizes = (pool.num_experts, pool.dim, pool.hidden_dim, pool.backend)
        super().__init__(layer, *sizes, slots, waves, False, activation="identity")
        self.out_dim, self.ranks, self.scales = pool.out_dim, pool.ranks, pool.scales

    @property
    def dtype(self) -> torch.dtype:
        """Of A and B in their slots."""
        return self.w13_SFD.dtype

    @property
    def num_weights(self) -> tuple[int, int]:
        """Of all A, and of all B."""
        return self.num_experts * self.hidden_dim * self.dim, self.num_experts * self.hidden_dim * self.out_dim

    @torch.compiler.disable
    def forward(
        self,
        x_NC: Tensor,
        routing: Routing,
        *,
        weight_on: WeightOn = "output",
        context: RoutingContext | None = None,
        plan: DispatchPlan | None = None,
    ) -> Tensor:
        """y_NO, as `LowRankPool`. Raises DataError if an adapter cannot be loaded."""
        routing = replace(routing, weight_NK=routing.weight_NK * scales_of(self.scales, routing))
        weight_NK, (a_SQC, b_SOQ) = routing.weight_NK, self._slots()
        learns = torch.is_grad_enabled() and (x_NC.requires_grad or weight_NK.requires_grad)
        if self.backend != "auto" or learns:
            return super().forward(x_NC, routing, weight_on=weight_on, context=context)
        can, has_kernel = can_segment(x_NC, weight_NK, a_SQC, b_SOQ), can_add(x_NC, a_SQC, b_SOQ)
        is_compiled = can and not torch.is_grad_enabled() and has_kernel
        if self.num_experts <= len(a_SQC) and is_mostly_used(routing, is_compiled=is_compiled):
            made_NO = self._side_by_side(x_NC, routing)
            if made_NO is not None:
                return made_NO
        if not can:
            return super().forward(x_NC, routing, weight_on=weight_on, context=context)
        kind = torch.float32 if has_kernel else x_NC.dtype
        y_NO = torch.zeros(len(x_NC), self.out_dim, dtype=kind)
        self._add_each(y_NO, x_NC, routing, plan or plan_dispatch(routing))
        return y_NO.to(x_NC.dtype)

    @torch.compiler.disable
    def add_to(
        self,
        y_NO: Tensor,
        x_NC: Tensor,
        routing: Routing,
        *,
        context: RoutingContext | None = None,
        plan: DispatchPlan | None = None,
    ) -> None:
        """See `LowRankPool.add_to`."""
        can = self.backend == "auto" and can_add_segmented(y_NO, x_NC, routing.weight_NK, *self._slots())
        if not can or is_mostly_used(routing, is_compiled=True):
            y_NO.add_(self(x_NC, routing, context=context, plan=plan))
            return
        routing = replace(routing, weight_NK=routing.weight_NK * scales_of(self.scales, routing))
        made_NO = y_NO if y_NO.dtype == torch.float32 else torch.zeros(y_NO.shape)
        self._add_each(made_NO, x_NC, routing, plan or plan_dispatch(routing))
        if made_NO is not y_NO:
            # Rounded once, with what is there already.
            y_NO.add_(made_NO)

    def _add_each(self, y_NO: Tensor, x_NC: Tensor, routing: Routing, plan: DispatchPlan) -> None:
        """Add what each adapter makes, by their numbers, as many at a time as there are slots."""
        ends = plan.offset_E.tolist()
        wanted = [expert for expert, end in enumerate(ends) if end > (ends[expert - 1] if expert else 0)]
        for slot_of in self._chunks(wanted, routing):
            for expert, slot in slot_of.items():
                a_QC, b_OQ = (stack[slot] for stack in self._slots())
                add_adapter(y_NO, x_NC, plan, routing.weight_NK, expert, a_QC, b_OQ, self.ranks[expert])

    def _side_by_side(self, x_NC: Tensor, routing: Routing) -> Tensor | None:
        """All at once, which takes a copy of them in order; None as of `side_by_side`."""
        everybody, y_NO = list(range(self.num_experts)), None
        for slot_of in self._chunks(everybody, routing):
            a_EQC, b_EOQ = (stack[[slot_of[expert] for expert in everybody]] for stack in self._slots())
            y_NO = side_by_side(x_NC, routing, routing.weight_NK, a_EQC, b_EOQ)
        return y_NO

    def _chunks(self, experts: list[int], routing: Routing) -> Iterator[dict[int, int]]:
        """{adapter: slot} of the next of these, in order, until all had their turn."""
        most = len(self.w13_SFD)
        for first in range(0, len(experts), most):
            chunk = experts[first : first + most]
            for slot_of in self.waves(chunk, None, routing.index_NK, {}, together=True):
                yield slot_of
                self.slots.mark_used(list(slot_of.values()))

    def _slots(self) -> tuple[Tensor, Tensor]:
        # Others may be filled while these are differentiated, which their tensor would be told of.
        return self.w13_SFD.data, self.w2_SDF.data

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_adapters={self.num_experts}, in_dim={self.dim}, out_dim={self.out_dim}, offloaded"
