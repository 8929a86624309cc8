"""`RoutedLowRank`: a pool of adapters beside one matrix, and who uses which: each token by a router, or each row as the caller says.

    Decoder.Config(linears={"blocks.*.attention.q": RoutedLowRank.Config(ranks=(8, 16))})                 # by token, learned
    Decoder.Config(linears={"blocks.*.attention.q": RoutedLowRank.Config(ranks=(8, 16), router=None)})    # as it is told
    model(token_BL, state=chosen_rows(index_BK, token_BL.shape[1]))

A row is told by `chosen_rows`: the adapters of each sequence, and their weights. Whoever is told nothing gets nothing added: the base.
"""
# Shapes: B batch, L positions, N items, K choices per item, E adapters, C inputs

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.pool import LowRankPool
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, is_hooked
from anabranch.routing import DispatchPlan, Router, Routing, TopK, plan_dispatch

__all__ = ["RoutedLowRank", "chosen_rows"]

# Of a forward context's state: what `chosen_rows` makes.
_INDEX, _WEIGHT = "adapters.index", "adapters.weight"


def chosen_rows(index_BK: Tensor, length: int, weight_BK: Tensor | None = None) -> dict[str, Tensor]:
    """The ``state`` of a forward pass in which each row has adapters of its own.

    Args:
        index_BK: int64 ``[B]`` or ``[B, K]``, the adapters of each row; -1 for none.
        length: L of the pass.
        weight_BK: what each is multiplied by; 1 if None. Whole numbers count as the floats that they are.

    Raises InputError for shapes that do not fit, and for an index that is no whole number.
    """
    if index_BK.is_floating_point() or index_BK.dtype == torch.bool:
        raise InputError(f"index has type {index_BK.dtype}; it must be int64, the numbers of adapters")
    index_BK = index_BK.unsqueeze(-1) if index_BK.dim() == 1 else index_BK
    weight_BK = torch.ones(index_BK.shape, device=index_BK.device) if weight_BK is None else weight_BK
    weight_BK = weight_BK.unsqueeze(-1) if weight_BK.dim() == 1 else weight_BK
    weight_BK = weight_BK if weight_BK.is_floating_point() else weight_BK.to(torch.get_default_dtype())
    if index_BK.dim() != 2 or weight_BK.shape != index_BK.shape:
        raise InputError(
            f"index has shape {list(index_BK.shape)} and weight {list(weight_BK.shape)}; both must be [rows] or [rows, choices]"
        )
    shape = (index_BK.shape[0], length, index_BK.shape[1])
    return {_INDEX: index_BK.unsqueeze(1).expand(shape), _WEIGHT: weight_BK.unsqueeze(1).expand(shape)}


def is_told(state: Mapping[str, Any]) -> bool:
    """Whether the state of a pass says which adapters rows have."""
    return _INDEX in state


class RoutedLowRank(Linear, kind="routed_low_rank"):
    """sum_k w_k scale_e B_e A_e x of the adapters e that a router, or the caller, chooses. B is zero at first."""

    told_by: ClassVar[tuple[str, ...]] = (_INDEX, _WEIGHT)

    @configclass
    class Config(Linear.Config):
        """The pool, and who chooses.

        Attributes:
            ranks: of each adapter.
            alphas: of each; None for its rank, which makes scales 1.
            rslora: scales are alpha / sqrt(rank).
            router: chooses for each token, by what goes into the matrix; None where the caller chooses for each row.
            recompute: keep nothing of the forward pass for the backward one.
            dropout: share of the inputs of A that is zero in training, as LoRA's; the router sees all of them.
        """

        is_added: ClassVar[bool] = True

        ranks: tuple[int, ...] = Field(default=(8, 8, 8, 8), min_length=1)
        alphas: tuple[float, ...] | None = None
        rslora: bool = False
        router: Router.Config | None = Router.Config(select=TopK.Config(top_k=1))
        recompute: bool = False
        dropout: float = Field(default=0.0, ge=0, lt=1)

        def __post_init__(self) -> None:
            if min(self.ranks) < 1:
                raise ConfigError(f"ranks is {list(self.ranks)}; each must be at least 1")
            if self.alphas is not None and len(self.alphas) != len(self.ranks):
                raise ConfigError(
                    f"alphas has {len(self.alphas)} values for {len(self.ranks)} adapters; give one for each"
                )
            if self.router is not None:
                self.router.check(len(self.ranks))

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """E (C + O) weights of the greatest rank each; K of the adapters are active (one where the caller chooses), and the router."""
            pair = max(self.ranks) * (projection.in_dim + projection.out_dim)
            choices = 1 if self.router is None else self.router.num_choices(len(self.ranks))
            made = Count(len(self.ranks) * pair, choices * pair, 2 * choices * pair)
            if self.router is None:
                return made
            score, size = self.router.score, (projection.in_dim, len(self.ranks))
            parameters = score.num_parameters(*size)
            return made + Count(parameters, parameters, score.num_flops(*size))

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.pool = LowRankPool(
            projection.in_dim,
            projection.out_dim,
            config.ranks,
            alphas=config.alphas,
            rslora=config.rslora,
            generator=context.generator,
            recompute=config.recompute,
        )
        self.router: Router | None = None
        if config.router is not None:
            self.router = config.router.build(
                projection.in_dim,
                len(config.ranks),
                layer=context.layer,
                generator=context.generator,
                share=context.share,
            )
            self.router.matrix = projection.name

    @property
    def lacking(self) -> tuple[int, ...]:
        """Adapters that are none here: each that is one has an A, be its B zero still. Raises ConfigError where they are offloaded."""
        if not isinstance(self.pool, LowRankPool):
            raise ConfigError("adapters are offloaded, so which of them a matrix lacks cannot be told; ask before that")
        has_E = self.pool.a.detach().flatten(1).any(1)
        return tuple((~has_E).nonzero().flatten().tolist())

    @classmethod
    def config_of(cls, pairs: Sequence[Pair | None]) -> Config:
        """The config for adapters that the caller chooses from; None is one that adds nothing here, and has a rank of 1."""
        ranks = tuple(1 if pair is None else pair.rank for pair in pairs)
        # Whichever way it is made, a scale is alpha / rank of some alpha.
        alphas = tuple(1.0 if pair is None else pair.scale * pair.rank for pair in pairs)
        return cls.Config(ranks=ranks, alphas=alphas, router=None)

    def put(
        self,
        pairs: Sequence[Pair | None],
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take over the numbers of the pairs that `config_of` was given, on ``device``, frozen, in ``dtype``: float32 at least if None."""
        kinds = [half.dtype for pair in pairs if pair is not None for half in (pair.a_RC, pair.b_OR)]
        kind = dtype or functools.reduce(torch.promote_types, kinds, torch.float32)
        num_adapters, rank, inputs = self.pool.a.shape
        a_ERC = torch.zeros(num_adapters, rank, inputs, dtype=kind, device=device)
        # Turned in memory: of an adapter of few ranks it lies in one piece, and no product turns it each time.
        b_EOR = torch.zeros(num_adapters, rank, self.pool.out_dim, dtype=kind, device=device).transpose(1, 2)
        self.pool.a, self.pool.b = (nn.Parameter(stack, requires_grad=False) for stack in (a_ERC, b_EOR))
        with torch.no_grad():
            for number, pair in enumerate(pairs):
                if pair is not None:
                    self.pool.a[number, : pair.rank] = pair.a_RC.to(device, kind)
                    self.pool.b[number, :, : pair.rank] = pair.b_OR.to(device, kind)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y, in the pool's type, which may be wider than that of ``x``."""
        routing = self.route(x, context)
        if routing is None:
            return x.new_zeros(*x.shape[:-1], self.pool.out_dim)
        y_NO = self.pool(self._dropped(x), routing, context=context, plan=self._plan(routing, context))
        return y_NO.view(*x.shape[:-1], self.pool.out_dim)

    def add_to(self, y: Tensor, x: Tensor, context: Any = None) -> None:
        """See `Linear.add_to`: row by row into y, without a tensor of what is added where the pool can."""
        if is_hooked(self) or type(self).forward is not RoutedLowRank.forward:
            return super().add_to(y, x, context)
        routing = self.route(x, context)
        if routing is not None:
            plan = self._plan(routing, context)
            y_NO = y.view(-1, self.pool.out_dim)
            self.pool.add_to(y_NO, self._dropped(x), routing, context=context, plan=plan)

    def _dropped(self, x: Tensor) -> Tensor:
        """What goes into A: x_NC in the pool's type."""
        x_NC = x.flatten(0, -2)
        if self.training and self.config.dropout > 0:
            x_NC = F.dropout(x_NC, self.config.dropout)
        return x_NC.to(self.pool.dtype)

    def _plan(self, routing: Routing, context: Any) -> DispatchPlan | None:
        """That of a routing which all layers are told; None where this one chose."""
        return _plan_of(routing, context) if self.router is None else None

    def route(self, x: Tensor, context: Any) -> Routing | None:
        """Who uses which adapters, of the items of ``x``; None where nobody uses any."""
        x_NC = x.flatten(0, -2)
        return self._told(x_NC, context, x.shape[:-1]) if self.router is None else self.router(x_NC, context)

    def _told(self, x_NC: Tensor, context: Any, shape: Sequence[int] | None = None) -> Routing | None:
        """What the caller chose for these items, of a pass of ``shape``; None for nothing.

        Raises InputError for adapters that there are not, and for rows or a length that the pass has not.
        """
        state = {} if context is None else context.state
        if _INDEX not in state:
            return None
        once, index, weight = getattr(context, "once", None), state[_INDEX], state[_WEIGHT]
        # A graph of the weights belongs to the layer that made it, which may be recomputed.
        if once is None or torch.compiler.is_compiling() or weight.requires_grad:
            return self._told_now(x_NC, state, shape)
        # Every layer is told the same. What is told is kept with it, so that no other tensor gets its id meanwhile.
        found = once(index, lambda: {"told": index})
        key = id(weight), tuple(shape or ()), len(x_NC), self.pool.num_experts, x_NC.dtype
        if key not in found:
            found[key] = weight, self._told_now(x_NC, state, shape)
        routing: Routing = found[key][1]
        return routing

    def _told_now(self, x_NC: Tensor, state: Mapping[str, Any], shape: Sequence[int] | None) -> Routing:
        """`_told`, of a state that says something."""
        told = state[_INDEX].shape[:-1]
        # As many tokens of other rows would give them each other's adapters.
        if shape is not None and len(shape) == len(told) and tuple(shape) != tuple(told) and told.numel() == len(x_NC):
            raise InputError(
                f"adapters are chosen for {told[0]} rows of {told[1]} tokens in a pass of {shape[0]} rows of {shape[1]}"
            )
        index_NK, weight_NK = (state[name].flatten(0, -2) for name in (_INDEX, _WEIGHT))
        if len(index_NK) != len(x_NC):
            raise InputError(f"adapters are chosen for {len(index_NK)} tokens of a pass of {len(x_NC)}")
        if not torch.compiler.is_compiling() and index_NK.numel() and int(index_NK.max()) >= self.pool.num_experts:
            raise InputError(f"adapter {int(index_NK.max())} is chosen; there are 0 to {self.pool.num_experts - 1}")
        used_NK = index_NK >= 0
        return Routing(
            index_NK.masked_fill(~used_NK, -1),
            weight_NK * used_NK,
            x_NC.new_zeros(len(x_NC), self.pool.num_experts),
        )


def _plan_of(routing: Routing, context: Any) -> DispatchPlan | None:
    """The plan of a routing that all layers of a pass have been told, made once; None where a compiler looks on."""
    once = getattr(context, "once", None)
    if once is None or torch.compiler.is_compiling():
        return None
    # With the routing, so that no other gets its id meanwhile.
    found: tuple[Routing, DispatchPlan] = once(routing, lambda: (routing, plan_dispatch(routing)))
    return found[1]
