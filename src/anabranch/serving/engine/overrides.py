"""Overrides of requests in a step: what hooks say of single requests, put into the step's forward pass row by row."""
# Shapes: N = P T items, P streams, T tokens of a step, K choices per item, E destinations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED
from anabranch.routing.discovery import find_routers
from anabranch.routing.layer_overrides import find_overrides, own_layers
from anabranch.routing.override import Override, Overrides
from anabranch.routing.sequences import ITEMS
from anabranch.serving.core.batch import PENDING, Batch, Chunk, Sampled
from anabranch.serving.core.hooks import OverrideHook, RequestOverride
from anabranch.serving.core.request import Request
from anabranch.serving.engine.passes import Variant

# Of `Request.options`.
OPTION = "routing"

# Overrides of requests by id: of each hook that says some, by router and pass.
OverridesById = dict[str, list[Mapping[nn.Module, Sequence[Override | None]]]]


class RequestOverrides:
    """Asks the hooks of an engine what they override, step by step.

    Args:
        model: the engine's.
        hooks: those of its hooks that override requests; there must be one.
        check: raises ConfigError for a number of streams or a path that cannot be.
    """

    def __init__(
        self,
        model: Decoder,
        hooks: Sequence[OverrideHook],
        check: Callable[[int | None, tuple[int, ...] | None], None],
    ) -> None:
        self._hooks, self._check = tuple(hooks), check
        self._layers = own_layers(model) if find_routers(model) else []
        # Requests that share keys and values only with those of the same option.
        self._apart: set[str] = set()
        # Number of streams and path, as they were said of each request in its first step.
        self._variants: dict[str, tuple[int | None, tuple[int, ...] | None]] = {}

    def add(self, request: Request) -> None:
        """Note a request that appears."""
        if any(name == OPTION for name, _ in request.options):
            self._apart.add(request.id)

    def forget(self, id: str) -> None:
        """Drop what is kept of a request."""
        self._apart.discard(id)
        self._variants.pop(id, None)

    def of(self, batch: Batch, tokens: Sequence[int]) -> tuple[OverridesById, dict[str, Sampled]]:
        """How the requests of the step are routed, and the errors of those that cannot have what was said of them, by id."""
        found: OverridesById = {}
        refused: dict[str, Sampled] = {}
        said = [hook.override(batch, tokens) for hook in self._hooks]
        for chunk in batch.chunks:
            own = [each[chunk.id] for each in said if chunk.id in each]
            try:
                found[chunk.id] = [self._checked(chunk, each) for each in own]
                self._note_variant(chunk, own)
            except ConfigError as error:
                # The next step may be formed already, with the token that this chunk was to sample: it needs one.
                refused[chunk.id] = Sampled(id=chunk.id, token=0 if chunk.samples else PENDING, error=str(error))
        return found, refused

    def variant_of(self, id: str, own: Variant) -> Variant:
        """How a request runs the model, where it does as ``own`` unless hooks say otherwise."""
        number, path = self._variants.get(id, (None, None))
        if path is not None:
            own = replace(own, path=path, chooser=None)
        return own if number is None else replace(own, num_streams=number)

    @staticmethod
    def placed(said: OverridesById, chunks: Sequence[Chunk], num_streams: int) -> list[Overrides]:
        """What the forward pass of some chunks carries, which has so many streams."""
        found: list[Overrides] = []
        start, num_rows = 0, sum(len(chunk.tokens) for chunk in chunks)
        for chunk in chunks:
            rows = slice(start, start + len(chunk.tokens))
            start = rows.stop
            found += [_RowOverrides(layers, rows, num_rows, num_streams) for layers in said.get(chunk.id, ())]
        return found

    def _note_variant(self, chunk: Chunk, said: Sequence[RequestOverride]) -> None:
        """Keep how a request runs the model. Raises ConfigError for what the model or the request cannot have."""
        for each in said:
            self._check(each.num_streams, each.path)
        numbers = [each.num_streams for each in said if each.num_streams is not None]
        paths = [tuple(each.path) for each in said if each.path is not None]
        first = next(iter(numbers), None), next(iter(paths), None)
        number, path = self._variants.setdefault(chunk.id, first)
        for name, told in (("num_streams", {number, first[0], *numbers}), ("path", {path, first[1], *paths})):
            if len(told) > 1:
                both = " and ".join(sorted("none" if value is None else str(value) for value in told))
                raise ConfigError(f"hooks say {name} {both} of request {chunk.id!r}; say one for all its steps")

    def _checked(self, chunk: Chunk, said: RequestOverride) -> Mapping[nn.Module, Sequence[Override | None]]:
        """The overrides of one request by router and pass. Raises ConfigError where they do not fit, or would leak into other requests."""
        if chunk.id not in self._apart:
            raise ConfigError(
                f"request {chunk.id!r} is to be routed otherwise, but shares keys and values with requests that are not; give it an entry "
                f"{OPTION!r} in Request.options that says how"
            )
        if said.routing and not self._layers:
            raise ConfigError("the model has no Router, so there is no decision to override")
        layers = find_overrides(self._layers, said.routing)
        for found, of_visits in layers.items():
            router: Any = found
            for override in filter(None, of_visits):
                override.check_fit(len(chunk.tokens), router.num_destinations, f"the router of layer {router.layer}")
        return layers


class _RowOverrides:
    """The overrides of one request in one step: of some of its rows, in every stream."""

    def __init__(
        self, layers: Mapping[nn.Module, Sequence[Override | None]], rows: slice, num_rows: int, streams: int
    ) -> None:
        self._layers, self._rows, self._num_rows, self._streams = layers, rows, num_rows, streams

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`."""
        of_visits = self._layers.get(router)
        override = of_visits[visit % len(of_visits)] if of_visits else None
        if override is None:
            return None
        item_R = context.state.get(ITEMS)
        if len(x_ND) != (self._num_rows * self._streams if item_R is None else len(item_R)):
            raise AnabranchError(
                f"a router sees {len(x_ND)} of the {self._num_rows * self._streams} items of a step, so nobody knows whose they are"
            )
        row_R = torch.arange(self._num_rows).repeat(self._streams) if item_R is None else item_R.cpu() % self._num_rows
        here_T = torch.zeros(self._num_rows, dtype=torch.bool)
        here_T[self._rows] = True if override.only_N is None else override.only_N.cpu()
        return replace(
            override,
            index_NK=self._spread(override.index_NK, UNUSED, row_R),
            weight_NK=self._spread(override.weight_NK, 0, row_R),
            bias_NE=self._spread(override.bias_NE, 0, row_R),
            open_NE=self._spread(override.open_NE, 1, row_R),
            logit_NE=self._spread(override.logit_NE, 0, row_R),
            only_N=here_T[row_R],
        )

    def _spread(self, value: Tensor | None, elsewhere: int, row_R: Tensor) -> Tensor | None:
        """What is said of each row of the request, at the rows of the step that a router sees; what is said of all stays."""
        if value is None or value.dim() == 1:
            return value
        all_TX = value.new_full((self._num_rows, value.shape[1]), elsewhere)
        all_TX[self._rows] = value
        return all_TX[row_R.to(value.device)]
