"""Linear layers of single experts: a pool's matrices replaced or added to by patterns of their names.

    Decoder.Config(feed_forward=MoE.Config(), linears={"blocks.*.feed_forward.experts.*.down": MyLayer.Config(rank=8)})

Expert e of a pool has the parts ``experts.e.gate`` (where its activation has a gate), ``experts.e.up`` and ``experts.e.down``; the pool
that a group of layers shares is ``shared.experts_0`` and so on. What stands beside a matrix leaves the stack of matrices as it is, under
its name in the state dict. Where a part is replaced, that matrix is no longer stacked: each expert has a layer of its own.

The stacked matrices may be in few bits.

Experts then run one after the other, each on its rows, in torch. In a compiled graph, whose shapes must not depend on routes, each runs on
all items: correct, but without the saving.
"""
# Shapes: N items, E experts, K choices per item, R rows of one expert, D width, F hidden, Z what the first matrix gives

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.nn.activation import activation_of
from anabranch.nn.count import Count
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.feed_forward import mlp_projections
from anabranch.nn.items import no_rows, on_items
from anabranch.nn.linear import Product, Projection, add_beside, build_linear, call_linear, count_linear, start_beside
from anabranch.nn.parts import Matrices
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, dispatch, plan_dispatch

if TYPE_CHECKING:
    from anabranch.nn.context import BuildContext

__all__ = ["ExpertLayers", "build_expert_layers", "count_experts", "layers_beside"]

# The matrices of experts, or one of them.
Stack = Tensor | Matrices


class ExpertLayers(nn.Module):
    """What the experts of one pool have beside, or instead of, its stacked matrices.

    Args:
        activation: its name.
        projections: of each expert: (``gate`` and ``up`` in one, ``down``).
        context: of the build; its ``linears`` name at least one part of them.

    Attributes:
        w13, w2: a layer per expert where the matrix is not stacked; else, by expert, the layers beside its parts.
    """

    def __init__(
        self, activation: str, projections: list[tuple[Projection, Projection]], context: "BuildContext"
    ) -> None:
        super().__init__()
        self.apply_to = activation_of(activation).apply
        self.num_experts, self.dim = len(projections), projections[0][0].in_dim
        self.hidden_dim = projections[0][1].in_dim
        self.rows = [dict(projection.parts) for projection in projections[0]]
        self.is_stacked = [not _is_replaced(kind, context) for kind in zip(*projections, strict=True)]
        made = []
        for kind, is_stacked in zip(zip(*projections, strict=True), self.is_stacked, strict=True):
            make = _build_beside if is_stacked else build_linear
            built = {str(number): make(projection, context) for number, projection in enumerate(kind)}
            made.append(nn.ModuleDict({number: layer for number, layer in built.items() if layer is not None}))
        self.w13, self.w2 = made

    def start(self, w13_EZD: Stack | None, w2_EDF: Stack | None) -> None:
        """Begin beside stacks with these numbers, see `Linear.start`."""
        for layers, rows, stack in zip((self.w13, self.w2), self.rows, (w13_EZD, w2_EDF), strict=True):
            if stack is None:
                continue
            for number, beside in layers.items():
                start_beside(beside, rows, partial(_numbers, _experts_of(stack)[int(number)]))

    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        w13_EZD: Stack | None,
        w2_EDF: Stack | None,
        *,
        weight_on: WeightOn = "output",
        context: Any = None,
    ) -> Tensor:
        """y_ND; ``w13_EZD`` and ``w2_EDF`` are the stacks, None where there is none."""
        stacks = [[None] * self.num_experts if stack is None else _experts_of(stack) for stack in (w13_EZD, w2_EDF)]
        experts = [partial(self._expert, number, w13, w2) for number, (w13, w2) in enumerate(zip(*stacks, strict=True))]
        run = self._masked if torch.compiler.is_compiling() else self._gathered
        return run(experts, x_ND, routing, weight_on == "input", context)

    def _expert(self, number: int, w13_ZD: Stack | None, w2_DF: Stack | None, x_RD: Tensor, context: Any) -> Tensor:
        """y_RD of one expert."""
        z_RZ = self._product(self.w13, self.rows[0], number, w13_ZD, x_RD, context)
        return self._product(self.w2, self.rows[1], number, w2_DF, self.apply_to(z_RZ), context)

    def _product(
        self, layers: Any, rows: Mapping[str, int], number: int, weight: Stack | None, x: Tensor, context: Any
    ) -> Tensor:
        if weight is None:
            return call_linear(layers[str(number)], x, context)
        if str(number) not in layers:
            return _times(weight, x)
        product = Product(x, partial(_times, weight), lambda: (_numbers(weight), None))
        return add_beside(product, layers[str(number)], rows, context)

    def _gathered(self, experts: list[Any], x_ND: Tensor, routing: Routing, on_input: bool, context: Any) -> Tensor:
        """Each expert runs on its own rows."""
        plan = plan_dispatch(routing)
        rows_RD = dispatch(x_ND, plan, routing.weight_NK if on_input else None)
        item_R, made, start = plan.item_R, [], 0
        for number, (expert, end) in enumerate(zip(experts, plan.offset_E.tolist(), strict=True)):
            if end > start:
                made.append(on_items(expert, rows_RD[start:end], context, item_R[start:end], len(x_ND)))
            elif torch.is_grad_enabled():
                own = [layers[str(number)] for layers in (self.w13, self.w2) if str(number) in layers]
                made.append(no_rows(own, rows_RD[:0]))
            start = end
        dtype = next((part.dtype for part in made if len(part)), rows_RD.dtype)
        # Of unused choices.
        made.append(rows_RD.new_zeros(len(rows_RD) - start, self.dim))
        return combine(torch.cat([part.to(dtype) for part in made]), plan, None if on_input else routing.weight_NK)

    def _masked(self, experts: list[Any], x_ND: Tensor, routing: Routing, on_input: bool, context: Any) -> Tensor:
        """Each expert runs on all items, those of others as padding."""
        if not on_input:
            return self._masked_by(experts, x_ND, routing, on_input, context)
        # Weights of two choices of one expert add up behind it, not before it: one choice at a time.
        parts = [
            Routing(routing.index_NK[:, k : k + 1], routing.weight_NK[:, k : k + 1], routing.score_NE)
            for k in range(routing.num_choices)
        ]
        total_ND = sum(self._masked_by(experts, x_ND, part, on_input, context) for part in parts)
        assert isinstance(total_ND, Tensor), "an item has a choice"
        return total_ND

    def _masked_by(self, experts: list[Any], x_ND: Tensor, routing: Routing, on_input: bool, context: Any) -> Tensor:
        choice_NK = routing.index_NK.clamp_min(0)
        used_NK = routing.used_NK.to(routing.weight_NK.dtype)
        zero_NE = routing.weight_NK.new_zeros(len(x_ND), self.num_experts)
        weight_NE = zero_NE.scatter_add(1, choice_NK, routing.weight_NK * used_NK)
        takes_NE = zero_NE.scatter_add(1, choice_NK, used_NK) > 0
        total_ND = None
        for number, expert in enumerate(experts):
            mask_N = takes_NE[:, number]
            # Items of others give and get zeros, whatever they hold.
            own_ND = x_ND.where(mask_N.unsqueeze(-1), 0.0)
            if context is not None and context.item_mask_N is not None:
                mask_N = mask_N & context.item_mask_N
            own = None if context is None else replace(context, item_mask_N=mask_N)
            weight_N1 = weight_NE[:, number : number + 1]
            y_ND = expert(own_ND * weight_N1.to(x_ND.dtype) if on_input else own_ND, own)
            y_ND = y_ND.where(takes_NE[:, number : number + 1], 0.0)
            part_ND = y_ND.to(torch.promote_types(y_ND.dtype, torch.float32))
            part_ND = part_ND if on_input else part_ND * weight_N1
            total_ND, dtype = part_ND if total_ND is None else total_ND + part_ND, y_ND.dtype
        assert total_ND is not None, "a pool has experts"
        return total_ND.to(dtype)


def layers_beside(module: nn.Module) -> ExpertLayers | None:
    """What the experts of a pool have of their own, however its matrices are stored; None of another pool or module."""
    layers = getattr(module, "layers", None)
    return layers if isinstance(layers, ExpertLayers) else None


def _experts_of(stack: Stack) -> Sequence[Stack]:
    """The matrix of each expert."""
    if not isinstance(stack, Tensor):
        return [stack.expert(number) for number in range(stack.num_experts)]
    # Indexed one by one, each would get a gradient of the size of all.
    return stack.unbind(0)


def _times(weight: Stack, x: Tensor) -> Tensor:
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight.linear(x)


def _numbers(weight: Stack) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.weight_in(torch.float32)


def build_expert_layers(
    context: "BuildContext", num_experts: int, hidden_dim: int, activation: str
) -> ExpertLayers | None:
    """The layers of a pool whose place is ``context.path``; None where no pattern names a part of them, and all is stacked."""
    if not context.linears:
        return None
    projections = [mlp_projections(context.at(str(number)), hidden_dim, activation) for number in range(num_experts)]
    parts = [each for pair in projections for each in pair]
    if not any(each.chosen(context.linears) for each in parts):
        context.projections += [each.part_name(part) for each in parts for part in each.parts]
        return None
    return ExpertLayers(activation, projections, context)


def count_experts(context: "BuildContext", numbers: range, hidden_dim: int, activation: str, num_choices: int) -> Count:
    """Sizes of the experts ``numbers`` of the pool whose place is ``context.path``, of which a token uses ``num_choices``.

    Where they differ, active and FLOPs are those of the largest.
    """
    expert = activation_of(activation).num_matrices * context.dim * hidden_dim
    if not context.linears:
        return Count(len(numbers) * expert, num_choices * expert, 2 * num_choices * expert)
    counts = []
    for number in numbers:
        pair = mlp_projections(context.at(str(number)), hidden_dim, activation)
        counts.append(sum((count_linear(each, context) for each in pair), start=Count()))
    most = [max(getattr(count, name) for count in counts) for name in ("active", "flops")]
    return Count(sum(count.parameters for count in counts), num_choices * most[0], num_choices * most[1])


def _is_replaced(projections: tuple[Projection, ...], context: "BuildContext") -> bool:
    """Whether a part of one of these is something else than its matrix with something beside it."""
    return any(
        not config.is_added for projection in projections for config in projection.chosen(context.linears).values()
    )


def _build_beside(projection: Projection, context: "BuildContext") -> nn.Module | None:
    """The layers beside the parts of one matrix, by part; None without any."""
    context.projections += [projection.part_name(part) for part in projection.parts]
    chosen = projection.chosen(context.linears)
    built = {part: config.build(projection.part(part), context) for part, config in chosen.items()}
    return nn.ModuleDict(built) if built else None
