"""VersatileFFN where every token goes only as far as it must: generation, without gradients.

Items are sorted by their number of loops, most first, so that those still looping are a prefix and those with a width path a suffix:

    0 ......... active[l] ......... wide_from ......... fused_from ......... N
    |- takes more than l loops -|   |----- width path -----|---- both paths in one product ----|
"""
# Shapes: N items, D width, F hidden; X items with a width path that is computed apart, R rows of a range of items

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.experts.versatile.branch import Branch, Layer
from anabranch.nn.items import on_items
from anabranch.routing import Routing, RoutingContext

if TYPE_CHECKING:
    from anabranch.experts.versatile.paths import Mix, Paths

__all__ = ["EarlyExit"]


class EarlyExit:
    """One call of ``paths`` over items whose numbers of loops are known. Its `change` is what all loops for all items would give.

    Args:
        paths: whose width path is taken.
        branch: the feed-forward.
        mix: what the heads decided.
        context: of the pass.
    """

    def __init__(self, paths: "Paths", branch: Branch, mix: "Mix", context: RoutingContext) -> None:
        self.paths, self.branch, self.mix, self.context = paths, branch, mix, context
        self.num_items = num_items = len(mix.loops_N)
        count = torch.bincount(mix.loops_N, minlength=paths.num_loops + 1).tolist()
        # How many items take more than so many loops.
        self.active = [num_items - sum(count[: number + 1]) for number in range(paths.num_loops)]
        # A single token, or all alike, need no sorting; but a replaced layer is told which items it gets.
        self.is_sorted = branch.is_replaced or max(count) < num_items
        self.order_N: Any = mix.loops_N.argsort(descending=True, stable=True) if self.is_sorted else slice(None)
        self.wide_from = num_items if mix.width is None else num_items - sum(count[: paths.last_wide + 1])
        # Tokens that end after one loop mix the same hidden units in both paths.
        is_fused = paths.is_fused(branch)
        self.fused_from = max([*self.active[1:2], self.wide_from]) if is_fused else num_items

    def change(self, x_ND: Tensor) -> Tensor:
        """The change of the stream."""
        order_N, wide_from, fused_from = self.order_N, self.wide_from, self.fused_from
        x_ND, share_N1 = x_ND[order_N], self.mix.lambda_N1[order_N].to(x_ND.dtype)
        state_ND, wide_XD = self._first_loop(x_ND, share_N1)
        for number in self.active[1:]:
            if number:
                state_ND[:number] += self._run(self.branch.change, x_ND[:number] + state_ND[:number], 0, number)
        if wide_XD is not None and fused_from > wide_from:
            share = share_N1[wide_from:fused_from]
            state_ND[wide_from:fused_from] = share * wide_XD + (1 - share) * state_ND[wide_from:fused_from]
        return torch.empty_like(state_ND).index_copy(0, order_N, state_ND) if self.is_sorted else state_ND

    def _first_loop(self, x_ND: Tensor, share_N1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The state of all items after one loop (of those from ``fused_from`` on, both paths), and the width path of those before."""
        paths, branch, wide_from = self.paths, self.branch, self.wide_from
        a_NF = self._run(branch.hidden, branch.norm(x_ND))
        if self.mix.width is not None and wide_from < self.num_items:
            width = _rows(self.mix.width, self.order_N, wide_from)
            if paths.is_masked and not branch.is_replaced:
                return self._one_product(a_NF, paths.gate_NF(width, a_NF.dtype), share_N1, x_ND.dtype)
        state_ND = self._run(branch.output, a_NF).to(x_ND.dtype)
        if self.mix.width is None or wide_from == self.num_items:
            return state_ND, None
        if paths.is_masked:
            gated_XF = paths.gate_NF(width, a_NF.dtype) * a_NF[wide_from:]
            return state_ND, self._run(branch.output, gated_XF, wide_from).to(x_ND.dtype)

        def apart(x_XD: Tensor, context: Any) -> Tensor:
            return paths.width_change(x_XD, branch, width, context)

        return state_ND, self._run(apart, x_ND[wide_from:], wide_from)

    def _one_product(
        self, a_NF: Tensor, gate_XF: Tensor, share_N1: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The first loop and the width path by one product with W_out, of mixed hidden units where both end in the same state."""
        wide_from, fused_from = self.wide_from, self.fused_from
        num_apart = fused_from - wide_from
        share = share_N1[fused_from:].to(a_NF.dtype)
        mixed = (share * gate_XF[num_apart:] + (1 - share)) * a_NF[fused_from:]
        rows = (a_NF[:fused_from], mixed, gate_XF[:num_apart] * a_NF[wide_from:fused_from])
        state_ND, wide_XD = self.branch.output(torch.cat(rows)).to(dtype).split((self.num_items, num_apart))
        return state_ND, wide_XD

    def _run(self, layer: Layer, x_RD: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """A layer on the sorted items from ``begin`` to ``end``."""
        if not self.branch.is_replaced:
            return layer(x_RD, None)
        return on_items(layer, x_RD, self.context, self.order_N[begin:end], self.num_items)


def _rows(routing: Routing, order_N: Any, start: int) -> Routing:
    """The items from ``start`` on, in that order."""
    parts = (routing.index_NK, routing.weight_NK, routing.score_NE)
    return Routing(*(part[order_N][start:] for part in parts))
