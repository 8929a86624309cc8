"""`Vectors` put vectors of requests into a forward pass; `run` is that pass, and `Watch` sees what its routers decide."""
# Shapes: B rows, L positions, N items, E destinations, K choices per item, V vocabulary

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from anabranch.adapters.by_row import check_told, told_rows
from anabranch.adapters.rewiring.prefix import Prefix
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.routing.context import RoutingContext, argument_of
from anabranch.routing.decision import Routing
from anabranch.routing.discovery import RouterLayer, router_layers
from anabranch.routing.override import Override
from anabranch.routing.router import Router
from anabranch.routing.sequences import ITEMS


def routed_layers(model: nn.Module) -> list[RouterLayer]:
    """The routers of ``model`` that choose experts, once for each of their passes. Raises ConfigError where there is none.

    Routers of adapters beside single matrices are not among them, nor are gates that choose how often a layer runs.
    """
    layers = router_layers(model)
    found = [layer for layer in layers if isinstance(layer.router, Router) and layer.router.matrix is None]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no router that chooses experts, so there is nothing to rewire")
    return found


def router_of(layer: RouterLayer) -> Router:
    """The router of one of `routed_layers`."""
    return cast(Router, layer.router)


def is_shift_free(router: Router) -> bool:
    """Whether a constant on all logits changes nothing: softmax, over all or over the chosen."""
    return router.score.config.activation == "softmax"


def has_gradient(router: Router) -> bool:
    """Whether weights follow scores: not where one expert is chosen and its weight divided by itself, whose gradient is rounding."""
    select = router.select.config
    return not (select.exact_choices == 1 and select.normalize != "none")


class Vectors:
    """Vectors of B requests, for ``context.routing`` (`anabranch.routing.override.Overrides`).

    Args:
        layers: of the model, in order.
        delta: ``[B, E]`` of each.
        length: L, positions of each row in the pass.
    """

    def __init__(self, layers: Sequence[RouterLayer], delta: Sequence[Tensor], length: int) -> None:
        self.length, self.batch = length, len(delta[0])
        self._delta: dict[nn.Module, list[Tensor]] = {}
        for layer, delta_BE in zip(layers, delta, strict=True):
            self._delta.setdefault(layer.router, []).append(delta_BE)

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`."""
        passes = self._delta.get(router)
        if passes is None:
            return None
        delta_BE = passes[visit % len(passes)]
        if self.batch == 1:
            return Override(logit_NE=delta_BE[0])
        # Whose gradient is summed row after row, which that of an index is not.
        return Override(logit_NE=delta_BE.index_select(0, self.rows(len(x_ND), context).to(delta_BE.device)))

    def items(self, num_items: int, context: RoutingContext) -> Tensor:
        """int64 ``[N]``: which of the pass the next N items of a router are, in row-major order. Raises ConfigError if nobody says."""
        item_N = context.state.get(ITEMS)
        if item_N is None:
            item_N = torch.arange(self.batch * self.length * context.num_streams)
        if len(item_N) != num_items:
            raise ConfigError(f"a router sees {num_items} of {len(item_N)} items, so nobody knows whose they are")
        return item_N

    def rows(self, num_items: int, context: RoutingContext) -> Tensor:
        """int64 ``[N]``: the row of each item, whatever its stream."""
        return self.items(num_items, context) // self.length % self.batch


@dataclass(frozen=True)
class Texts:
    """Which texts the rows of a pass are, of those that whoever calls was given: they may be told something each (`telling`).

    Attributes:
        rows: of each row of the pass, the number of its text.
        total: how many texts there are.
    """

    rows: tuple[int, ...]
    total: int

    @classmethod
    def all(cls, total: int) -> Self:
        """Each once."""
        return cls(tuple(range(total)), total)

    def of(self, rows: Sequence[int]) -> Self:
        """Some of these rows."""
        return type(self)(tuple(self.rows[row] for row in rows), self.total)

    def state(self, model: Decoder, length: int) -> dict[str, Any]:
        """What these rows are told. Raises ConfigError where others are told something than these texts."""
        check_told(model, self.total, "a rerouter")
        return told_rows(model, self.rows, length)


def run(
    model: Decoder,
    token_BL: Tensor,
    mask_BL: Tensor | None,
    vectors: Vectors,
    texts: Texts | None = None,
    *,
    cache: KeyValueCache | None = None,
    last: int | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """logits_BLV of a forward pass with ``vectors``; a row that is not finite does not end it for the others.

    Of the ``last`` so many positions, None for all. ``prefix`` is what the model makes of these rows before its first router.
    """
    told = {} if texts is None else texts.state(model, token_BL.shape[1])
    context = model.context(token_BL, cache=cache, token_mask_BL=mask_BL, state=told)
    context.routing.append(vectors)
    context.refuses_nan = False
    length = token_BL.shape[1]
    keep_L = None if last is None else torch.arange(length - last, length, device=token_BL.device)
    x_BLD = model.hidden(token_BL, context) if prefix is None else prefix.hidden(model, token_BL, context)
    x_BLD = x_BLD if last is None else x_BLD[:, length - last :]
    if model.streams is not None:
        x_BLD = model.streams.merge(x_BLD, context)
    return model.logits(x_BLD, context, keep_L=keep_L)


@dataclass(frozen=True)
class Seen:
    """What one router decided in one of its passes. Padding is left out.

    Attributes:
        item_N: which item of the pass each is.
        row_N: its row.
        routing: the decisions, detached.
    """

    item_N: Tensor
    row_N: Tensor
    routing: Routing

    def of_row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """(position ``[N]`` in all streams, index_NK) of one row of a pass of ``length`` positions."""
        here_N = self.row_N == row
        return self.item_N[here_N] % length, self.routing.index_NK[here_N]


class Watch:
    """Decisions of ``layers`` in the passes of a block `seeing`, an entry for each layer."""

    def __init__(self, layers: Sequence[RouterLayer]) -> None:
        self._layers = layers
        self._calls: dict[nn.Module, list[Seen]] = {}

    @property
    def seen(self) -> list[Seen]:
        """Of each layer, of the last pass. Raises ConfigError for a router that was not called."""
        silent = [layer.router_name for layer in self._layers if not self._calls.get(layer.router)]
        if silent:
            raise ConfigError(f"the model never calls router {silent[0]}, so there is nothing to rewire by it")
        return [self._calls[layer.router][layer.pass_index] for layer in self._layers]

    @contextmanager
    def seeing(self, vectors: Vectors) -> Iterator[None]:
        """Look at one forward pass with ``vectors``."""
        self._calls = {}

        def note(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
            context = argument_of(RoutingContext, args, kwargs)
            # Other passes may run beside this one, of other threads.
            if context is None or not any(each is vectors for each in context.routing):
                return
            item_N = vectors.items(routing.num_items, context).to(routing.index_NK.device)
            row_N = item_N // vectors.length % vectors.batch
            plain = Routing(routing.index_NK.detach(), routing.weight_NK.detach(), routing.score_NE.detach())
            if context.item_mask_N is not None:
                real_N = context.item_mask_N
                item_N, row_N = item_N[real_N], row_N[real_N]
                plain = Routing(plain.index_NK[real_N], plain.weight_NK[real_N], plain.score_NE[real_N])
            self._calls.setdefault(router, []).append(Seen(item_N, row_N, plain))

        with ExitStack() as stack:
            for router in dict.fromkeys(layer.router for layer in self._layers):
                stack.callback(router.register_forward_hook(note, with_kwargs=True).remove)
            yield
