"""`LowRankPool`: E low-rank adapters of one linear layer as stacked weights, and one grouped product of a routed batch with them.

    pool = LowRankPool(in_dim=512, out_dim=512, ranks=[8, 16, 64], alphas=[16, 16, 64])
    y_NO = pool(x_NC, routing)          # routing: the Routing that any router returns

It is a form of `ExpertPool`: in ``sum_k weight_nk scale_e B_e A_e x_n`` an adapter is an expert whose activation is the identity, so rows
are sorted by adapter and go through `anabranch.nn.grouped` as those of experts do. Ranks may differ: the stacks have the greatest, and what
is beyond an adapter's own rank is zero in A and in B. It adds nothing, and its gradients are exactly zero, so it stays zero.
"""
# Shapes: N items, E adapters, K choices per item, C inputs, O outputs, R greatest rank

import functools
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import Pair, draw_a, scale_of
from anabranch.adapters.segmented import add_segmented, can_add_segmented, can_segment, segmented
from anabranch.adapters.side_by_side import is_mostly_used, side_by_side
from anabranch.errors import ConfigError, InputError
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.kernels.low_rank import can_add
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import DispatchPlan, plan_dispatch

__all__ = ["LowRankPool", "scales_of"]


class LowRankPool(nn.Module):
    """E adapters of one linear layer: ``scale_e B_e A_e x``. B is zero at first, so that nothing is added.

    Args:
        in_dim: C.
        out_dim: O.
        ranks: of each adapter.
        alphas: of each adapter, or one for all; None for the rank of each, which makes scales 1.
        rslora: whether scales are alpha / sqrt(rank), of each adapter or of all; otherwise they are alpha / rank.
        generator: source of the initial A; the default generator if None.
        recompute: keep nothing of the forward pass for the backward one.
        backend: how to compute, see `anabranch.nn.grouped`; its compiled kernels do not compute this form. On a CPU ``auto`` goes adapter
            by adapter (`anabranch.adapters.segmented`), with a compiled kernel of its own where it is there, or computes all at once
            where items use most of them (`anabranch.adapters.side_by_side`).

    Attributes:
        a: parameter [E, R, C].
        b: parameter [E, O, R].
        scales: what each product is multiplied by: numbers, which no change of the pool's type rounds.

    Raises:
        ConfigError: a size or rank below 1, no adapter, another number of alphas than of adapters, or one that is not finite.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        ranks: Sequence[int],
        *,
        alphas: Sequence[float] | float | None = None,
        rslora: Sequence[bool] | bool = False,
        generator: torch.Generator | None = None,
        recompute: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("the number of adapters", len(ranks))):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self.ranks = tuple(ranks)
        self.alphas = _each("alphas", self.ranks if alphas is None else alphas, len(ranks))
        self.rslora = _each("rslora", rslora, len(ranks))
        self.recompute, self.backend = recompute, backend
        self.scales = tuple(scale_of(*numbers) for numbers in zip(self.ranks, self.alphas, self.rslora, strict=True))
        widest = max(self.ranks)
        self.a = nn.Parameter(torch.zeros(len(ranks), widest, in_dim, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(len(ranks), out_dim, widest, device=device, dtype=dtype))
        for number, rank in enumerate(self.ranks):
            draw_a(self.a.data[number, :rank], generator)

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair], *, backend: str = "auto", recompute: bool = False) -> Self:
        """The pool of adapters of one layer, in the widest of their types, on their device.

        Raises ConfigError where they are of layers of other widths.
        """
        if not pairs:
            raise ConfigError("the number of adapters is 0; it must be at least 1")
        sizes = {(pair.a_RC.shape[1], pair.b_OR.shape[0]) for pair in pairs}
        if len(sizes) > 1:
            raise ConfigError(f"adapters are of layers of (inputs, outputs) {sorted(sizes)}; they must be of one layer")
        first = pairs[0].a_RC
        dtype = first.dtype
        for pair in pairs:
            dtype = torch.promote_types(torch.promote_types(dtype, pair.a_RC.dtype), pair.b_OR.dtype)
        made = cls(
            *sizes.pop(),
            [pair.rank for pair in pairs],
            alphas=[pair.alpha for pair in pairs],
            rslora=[pair.rslora for pair in pairs],
            backend=backend,
            recompute=recompute,
            device=first.device,
            dtype=dtype,
        )
        with torch.no_grad():
            for number, pair in enumerate(pairs):
                made.a[number, : pair.rank] = pair.a_RC
                made.b[number, :, : pair.rank] = pair.b_OR
        return made

    @property
    def stacks(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(a, b)."""
        return self.a, self.b

    @property
    def dtype(self) -> torch.dtype:
        """Of both."""
        return self.a.dtype

    @property
    def num_experts(self) -> int:
        """E."""
        return self.a.shape[0]

    @property
    def dim(self) -> int:
        """C."""
        return self.a.shape[2]

    @property
    def out_dim(self) -> int:
        """O."""
        return self.b.shape[1]

    @property
    def hidden_dim(self) -> int:
        """R, the greatest rank."""
        return self.a.shape[1]

    def pair(self, number: int) -> Pair:
        """One adapter as it is now, without what is beyond its rank; views of the stacks."""
        rank = self.ranks[number]
        a_RC, b_OR = self.a[number, :rank].detach(), self.b[number, :, :rank].detach()
        return Pair(a_RC, b_OR, self.alphas[number], self.rslora[number])

    def forward(
        self,
        x_NC: Tensor,
        routing: Routing,
        *,
        weight_on: WeightOn = "output",
        context: RoutingContext | None = None,
        plan: DispatchPlan | None = None,
    ) -> Tensor:
        """y_NO: what each item's adapters add, weighted and summed; zero for an item that has none.

        Called as an `ExpertPool` is. There is nothing between the two matrices, so that it is the same where weights act. ``plan`` is that
        of the routing, where it was made before. A negative index names nobody, as -1.

        Raises InputError for an adapter that there is not, on a CPU and eagerly; elsewhere nobody looks.
        """
        weight_NK = routing.weight_NK * scales_of(self.scales, routing)
        if self.backend == "auto" and not self.recompute:
            can = can_segment(x_NC, weight_NK, self.a, self.b)
            # The kernel has no backward pass.
            is_compiled = can and not torch.is_grad_enabled() and can_add(x_NC, self.a, self.b)
            if is_mostly_used(routing, is_compiled=is_compiled):
                y_NO = side_by_side(x_NC, routing, weight_NK, self.a, self.b)
                if y_NO is not None:
                    return y_NO
            if can:
                return segmented(x_NC, plan or plan_dispatch(routing), weight_NK, self.a, self.b, self.ranks)
        return expert_mlp(
            x_NC,
            plan or plan_dispatch(routing),
            weight_NK,
            self.a,
            self.b,
            weight_on=weight_on,
            backend=self.backend,
            recompute=self.recompute,
            activation="identity",
        )

    def add_to(
        self,
        y_NO: Tensor,
        x_NC: Tensor,
        routing: Routing,
        *,
        context: RoutingContext | None = None,
        plan: DispatchPlan | None = None,
    ) -> None:
        """Add to ``y_NO``, in place and without a gradient, what the call makes. Its rows may be parts of wider ones."""
        if self.backend == "auto" and can_add_segmented(y_NO, x_NC, routing.weight_NK, self.a, self.b):
            if not is_mostly_used(routing, is_compiled=True):
                weight_NK = routing.weight_NK * scales_of(self.scales, routing)
                return add_segmented(y_NO, x_NC, plan or plan_dispatch(routing), weight_NK, self.a, self.b, self.ranks)
        y_NO.add_(self(x_NC, routing, context=context, plan=plan))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_adapters={self.num_experts}, in_dim={self.dim}, out_dim={self.out_dim}, ranks={list(self.ranks)}"


def scales_of(scales: tuple[float, ...], routing: Routing) -> Tensor:
    """scale_NK of each choice, floats also where weights are whole numbers; one that names nobody has some scale, and weight 0.

    Raises InputError for an adapter that there is not, where looking makes nobody wait.
    """
    like = routing.weight_NK
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    if torch.compiler.is_compiling() or like.device.type != "cpu":
        return like.new_tensor(scales, dtype=dtype)[routing.index_NK.clamp_min(0)]
    try:
        return _scale_row(scales, dtype)[routing.index_NK.clamp_min(0)]
    except IndexError:
        most = int(routing.index_NK.max())
        raise InputError(f"adapter {most} is chosen; there are 0 to {len(scales) - 1}") from None


@functools.lru_cache(maxsize=1024)
def _scale_row(scales: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Scales as a tensor, which a decoding step wants of every layer and which does not change."""
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=dtype)


def _each(name: str, values: "Sequence[float] | float", number: int) -> tuple:
    """One value for each adapter. Raises ConfigError for another number of them."""
    if not isinstance(values, Sequence):
        return (values,) * number
    if len(values) != number:
        raise ConfigError(f"{name} has {len(values)} values for {number} adapters; give one for each, or one for all")
    return tuple(values)
