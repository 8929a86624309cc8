"""Overrides of requests in a step: what hooks say of single requests, put into the step's forward pass row by row."""
# Shapes: N = P T items, P streams, T tokens of a step, K places per item, E destinations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED
from anabranch.routing.discovery import passes_of
from anabranch.routing.layer_overrides import find_overrides, own_layers
from anabranch.routing.override import Override, Overrides
from anabranch.routing.router import Router
from anabranch.serving.core.batch import PENDING, Batch, Chunk, Sampled
from anabranch.serving.core.hooks import OverrideHook, RequestOverride
from anabranch.serving.core.request import Request

OPTION = "routing"  # of `Request.options`


class RequestOverrides:
    """Asks the hooks of an engine what they override, step by step.

    Args:
        model: the engine's.
        hooks: those of its hooks that override requests; there must be one.

    Raises ConfigError for a model that does not route.
    """

    def __init__(self, model: Decoder, hooks: Sequence[OverrideHook]) -> None:
        self._hooks, self._layers = tuple(hooks), own_layers(model)
        self._streams = 1 if model.streams is None else model.streams.num_streams
        self._apart: set[str] = set()  # requests that share keys and values only with those of the same option

    def add(self, request: Request) -> None:
        """Note a request that appears."""
        if any(name == OPTION for name, _ in request.options):
            self._apart.add(request.id)

    def forget(self, id: str) -> None:
        """Drop what is kept of a request."""
        self._apart.discard(id)

    def of(self, batch: Batch, tokens: Sequence[int]) -> tuple[list[Overrides], dict[str, Sampled]]:
        """What the step's forward pass carries, and the errors of requests that cannot have what was said of them, by id."""
        found: list[Overrides] = []
        refused: dict[str, Sampled] = {}
        for hook in self._hooks:
            said, start = hook.override(batch, tokens), 0
            for chunk in batch.chunks:
                rows = slice(start, start + len(chunk.tokens))
                start = rows.stop
                if chunk.id not in said:
                    continue
                try:
                    layers = self._checked(chunk, said[chunk.id])
                except ConfigError as error:
                    # The next step may be formed already, with the token that this chunk was to sample: it needs one.
                    refused[chunk.id] = Sampled(id=chunk.id, token=0 if chunk.samples else PENDING, error=str(error))
                else:
                    found.append(_RowOverrides(layers, rows, batch.num_tokens, self._streams))
        return found, refused

    def _checked(self, chunk: Chunk, said: RequestOverride) -> Mapping[nn.Module, Mapping[int, Override]]:
        """The overrides of one request by router and pass. Raises ConfigError where they do not fit, or would leak into other requests."""
        if chunk.id not in self._apart:
            raise ConfigError(
                f"request {chunk.id!r} is to be routed otherwise, but shares keys and values with requests that are not; give it an entry "
                f"{OPTION!r} in Request.options that says how"
            )
        layers = find_overrides(self._layers, said.routing)
        for router, turns in layers.items():
            assert isinstance(router, Router), "own_layers are layers of routers"
            for override in turns.values():
                override.check_fit(len(chunk.tokens), router.num_destinations, f"the router of layer {router.layer}")
        return layers


class _RowOverrides:
    """The overrides of one request in one step: of some of its rows, in every stream."""

    def __init__(
        self, layers: Mapping[nn.Module, Mapping[int, Override]], rows: slice, num_rows: int, streams: int
    ) -> None:
        self._layers, self._rows, self._num_rows, self._streams = layers, rows, num_rows, streams

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`."""
        override = self._layers.get(router, {}).get(visit % passes_of(router))
        if override is None:
            return None
        if len(x_ND) != self._num_rows * self._streams:
            raise AnabranchError(
                f"a router sees {len(x_ND)} of the {self._num_rows * self._streams} items of a step, so nobody knows whose they are"
            )
        here_T = torch.zeros(self._num_rows, dtype=torch.bool)
        here_T[self._rows] = True if override.only_N is None else override.only_N.cpu()
        return replace(
            override,
            index_NK=self._spread(override.index_NK, UNUSED),
            weight_NK=self._spread(override.weight_NK, 0),
            bias_NE=self._spread(override.bias_NE, 0),
            open_NE=self._spread(override.open_NE, 1),
            only_N=here_T.repeat(self._streams),
        )

    def _spread(self, value: Tensor | None, elsewhere: int) -> Tensor | None:
        """What is said of each row, in all rows of the step; what is said of all stays."""
        if value is None or value.dim() == 1:
            return value
        all_TX = value.new_full((self._num_rows, value.shape[1]), elsewhere)
        all_TX[self._rows] = value
        return all_TX.repeat(self._streams, 1)
