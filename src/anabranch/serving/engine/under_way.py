"""`UnderWay`: what a runner knows of the requests that it has, from the first step that they are in until they are gone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anabranch.serving.core.batch import PENDING, Chunk, Sampled
from anabranch.serving.core.request import Request
from anabranch.serving.engine.depths import Depths
from anabranch.serving.engine.overrides import RequestOverrides
from anabranch.serving.engine.pool import Pooling
from anabranch.serving.engine.recorders import Told
from anabranch.serving.engine.served_adapters import ServedAdapters
from anabranch.serving.engine.skips import Skips
from anabranch.serving.engine.variants import Variants

__all__ = ["UnderWay"]


class UnderWay:
    """The requests of a runner, and who decides about them.

    Args:
        variants: how they run the model, where neither adapters nor hooks say otherwise.
        adapters, depths, skips: see `ModelRunner`.
        overrides: what hooks say of single requests; None where none does.

    Attributes:
        recorded: ids of those that want to know where their tokens go.
        tops: of those that want their prompts scored, how many tokens of each place, see `Sampling.prompt_logprobs`.
        pooling: of those that want vectors.
        told: what recorders inside the model have been told of each.
    """

    def __init__(
        self,
        variants: Variants,
        *,
        adapters: ServedAdapters | None = None,
        depths: Depths | None = None,
        skips: Skips | None = None,
        overrides: RequestOverrides | None = None,
    ) -> None:
        self.variants, self.overrides = variants, overrides
        self.adapters, self.depths, self.skips = adapters, depths, skips
        self._deciding = [part for part in (overrides, depths, skips, adapters) if part is not None]
        self.recorded: set[str] = set()
        self.tops: dict[str, int] = {}
        self.pooling, self.told = Pooling(), Told()
        # The newest token of each, for chunks that carry `PENDING`.
        self._newest: dict[str, int] = {}

    def add(self, request: Request) -> None:
        """Note a request that appears in a step."""
        for part in self._deciding:
            part.add(request)
        is_open = self.skips is not None and self.skips.prompt_of(request.id) is not None
        self.variants.add(request, is_open=is_open)
        path = None if self.depths is None else self.depths.path_of(request.id)
        if path is not None:
            self.variants.chosen(request.id, path)
        if request.record_routing:
            self.recorded.add(request.id)
        if request.sampling.prompt_logprobs is not None:
            self.tops[request.id] = request.sampling.prompt_logprobs

    def handed_over(self) -> dict[str, Any]:
        """By request what was decided about its blocks: for who goes on with what is stored of them."""
        deciding = [part for part in (self.depths, self.skips) if part is not None]
        return {id: decided for part in deciding for id, decided in part.handed_over().items()}

    def take_over(self, decided: Mapping[str, Any]) -> None:
        """What another has `handed_over`, before its requests are added."""
        for part in (self.depths, self.skips):
            if part is not None:
                part.take_over(decided)

    def forget(self, id: str) -> None:
        """Drop what is kept of it."""
        for part in self._deciding:
            part.forget(id)
        self.variants.forget(id)
        self.recorded.discard(id)
        self.tops.pop(id, None)
        self.pooling.forget(id)
        self.told.forget(id)
        self._newest.pop(id, None)

    def tokens(self, chunks: Sequence[Chunk]) -> list[int]:
        """Of a step, with the newest ones in the places of those that were `PENDING` when it was formed."""
        newest = self._newest
        return [newest[chunk.id] if token == PENDING else token for chunk in chunks for token in chunk.tokens]

    def keep_newest(self, sampled: Iterable[Sampled]) -> None:
        """A step gave these."""
        last = [(result.later or (result,))[-1] for result in sampled]
        self._newest.update((result.id, result.token) for result in last if result.token != PENDING)

    def adapted(self) -> ServedAdapters | None:
        """The adapters, where requests under way use some."""
        return self.adapters if self.adapters is not None and self.adapters.is_used else None

    def tell_decisions(self, results: Mapping[str, Sampled]) -> None:
        """Say once of each what was decided about its blocks."""
        if self.depths is not None:
            for id, result in results.items():
                result.path = self.depths.take_untold(id)
        if self.skips is not None:
            for id, result in results.items():
                kept = self.skips.take_untold(id)
                if kept is not None:
                    result.path, result.computed = kept.path, kept.computed
