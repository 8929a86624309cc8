"""`ModulePasses`: passes through the modules of a model, with all that they are told of a step."""
# Shapes: P streams, T tokens of a step, R rows of it, M prefix entries, G key-value heads, D width

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.nn.context import ForwardContext
from anabranch.routing.override import Overrides
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.request import Route
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import ToldSlot
from anabranch.serving.engine.record import RoutingTap
from anabranch.serving.engine.steady import steady
from anabranch.serving.engine.stores import Stores
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.engine.ways import Ways

__all__ = ["ModulePasses"]


class ModulePasses:
    """Runs them, one at a time.

    Args:
        model: the model.
        stores: its keys and values.
        requests: that the runner has.
        ways: how they run the model.
        is_steady: see `anabranch.serving.engine.steady`.

    Attributes:
        overrides: what hooks say of the pass under way.
        last: the context of the pass that ran last, for a head that routes; None once somebody has taken it.
    """

    def __init__(
        self, model: Decoder, stores: Stores, requests: UnderWay, ways: Ways, *, is_steady: bool = False
    ) -> None:
        self.model, self.device = model, model.embedding.weight.device
        self._stores, self._requests, self._ways, self._is_steady = stores, requests, ways, is_steady
        self._pool = stores.pools[0]
        self._prefixes = {number: _prefixes(model, number) for number in model.config.stream_choices}
        self.overrides: list[Overrides] = []
        self.last: ForwardContext | None = None
        # Of the pass under way: routes by row that routers beside matrices fill in.
        self._wanted: Mapping[int, Route] = {}

    def hidden(self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """x_RD of ``rows`` of chunks that run the model alike, after the last norm."""
        model = self.model
        token_1T, context = self.begin(chunks, tokens)
        keep_R = torch.tensor(rows, dtype=torch.int64, device=self.device)
        with self._stores.passing(chunks, tokens, rows), self.running(chunks, context):
            x_PRD = model.hidden(token_1T, context, keep_L=keep_R)
            return (x_PRD if model.streams is None or not rows else model.streams.merge(x_PRD, context))[0]

    def begin(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> tuple[Tensor, ForwardContext]:
        """(token_1T, context) of a pass that is the `last` from now on."""
        token_1T = torch.tensor([tokens], dtype=torch.int64, device=self.device)
        self.last = self.context(StepLayout(chunks, self._pool.block_tokens, self.device), token_1T, chunks)
        return token_1T, self.last

    @contextmanager
    def telling(self, tap: RoutingTap, routes: Mapping[int, Route], num_rows: int) -> Iterator[None]:
        """Fill in ``routes``, by row of a pass of ``num_rows``, by what the model's routers choose in it, and those beside its matrices."""
        self._wanted = routes
        try:
            with tap.listen(list(routes), num_rows) as found:
                yield
        finally:
            self._wanted = {}
        for route, noted in zip(routes.values(), found, strict=True):
            route.update(noted)

    @contextmanager
    def running(self, chunks: Sequence[Chunk], context: ForwardContext) -> Iterator[None]:
        """How a pass runs: with the adapters of its requests, and steadily where that is asked for."""
        variant, adapters = self._ways.of(chunks[0]), self._requests.adapters
        if adapters is not None and variant.task is not None:
            length = sum(len(chunk.tokens) for chunk in chunks)
            context.state |= adapters.told(variant.task, context.num_streams, length)
        if adapters is None or not variant.is_adapted:
            with steady(self.model) if self._is_steady else nullcontext():
                yield
            return
        own = adapters.of_pass(chunks, self._wanted)
        context.state |= own.state(context.num_streams, self.device)
        try:
            with adapters.on(), steady(self.model) if self._is_steady else nullcontext():
                yield
        finally:
            own.end()

    def context(
        self,
        layout: StepLayout,
        token_1T: Tensor,
        chunks: Sequence[Chunk],
        told: ToldSlot | None = None,
        stores: Stores | None = None,
    ) -> ForwardContext:
        """What the model is told of a pass of chunks that run it alike.

        Args:
            layout: of the pass.
            token_1T: its tokens.
            chunks: they.
            told: see `Stores.view`.
            stores: where keys and values are, if not where those of all requests are.
        """
        position_1T = torch.from_numpy(layout.position_T).to(self.device).unsqueeze(0) + self.model.first_position
        variant, requests = self._ways.of(chunks[0]), self._requests
        streams = variant.num_streams
        seen = requests.told.state(chunks, streams, layout.position_T.tolist()) if self._ways.is_watched else {}
        return ForwardContext(
            num_streams=streams,
            path=variant.path,
            sequences=requests.told.names(chunks),
            is_measured=False,
            refuses_nan=False,
            routing=list(self.overrides),
            state=seen,
            position_BL=position_1T.expand(streams, -1),
            rotary=self.model.rotary(position_1T, self._pool.shape.dtype),
            cache=(stores or self._stores).view(
                layout, chunks, self._prefixes[streams], variant.path, is_open=variant.chooser is not None, told=told
            ),
            token_BL=token_1T.expand(streams, -1),
            front_gates=None if self.model.streams is None else self.model.streams.front_gates,
        )


@torch.no_grad()
def _prefixes(model: Decoder, num_streams: int) -> list[tuple[Tensor, Tensor]]:
    """(key_PGMD, value_PGMD) of each layer, in front of all sequences of so many streams."""
    return [(key.detach(), value.detach()) for key, value in model.prefixes(num_streams)]
