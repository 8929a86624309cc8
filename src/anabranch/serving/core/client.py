"""`EngineClient`: what a front end needs of an engine, be it in this process, in another, or many behind a coordinator."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from anabranch.bounds import is_whole
from anabranch.errors import AnabranchError, InputError
from anabranch.serving.core.request import Output, Request


class BusyError(AnabranchError):
    """Something that a request needs has no room for it now: no fault of the request, and worth asking again."""


class NotBegunError(AnabranchError):
    """The engine failed before it did anything for a request, which may be given to the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves; known once it is ready.

    Attributes:
        model: name.
        vocab_size: V.
        max_positions: longest prompt and output together.
        block_tokens: tokens per block of the key-value cache.
        num_blocks: blocks it has.
        stop_tokens: the model's own end-of-text tokens.
        routed_layers: {layer: number of destinations} of layers that route; empty for a dense model.
        num_streams: parallel streams of a request that does not say it.
        stream_choices: the numbers of streams that a request may ask for, ascending.
        pooling: how it makes vectors of texts where a request does not say; None where it makes none. See `Request.pooling`.
        width: numbers in a vector.
        experts: how experts come where only some are in memory, as `anabranch.serving.expertflow.served.describe` has it; else empty.
        adapters: names of those that are there from the start; None where requests can have none.
    """

    model: str
    vocab_size: int
    max_positions: int
    block_tokens: int
    num_blocks: int
    stop_tokens: tuple[int, ...] = ()
    routed_layers: dict[int, int] = field(default_factory=dict)
    num_streams: int = 1
    stream_choices: tuple[int, ...] = (1,)
    pooling: str | None = None
    width: int = 0
    experts: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] | None = None

    def check_streams(self, num_streams: int | None) -> None:
        """Raises InputError for a number of parallel streams that a request cannot have."""
        # True and 2.0 equal numbers that there are, but no tensor has so many rows.
        if num_streams is None or (is_whole(num_streams) and num_streams in self.stream_choices):
            return
        if self.stream_choices == (1,):
            raise InputError(f"num_streams is {num_streams!r}, but the model has no parallel streams; leave it out")
        known = ", ".join(map(str, self.stream_choices))
        raise InputError(f"num_streams is {num_streams!r}; the model runs with {known}")


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """A picture of an engine, at most a second old.

    Attributes:
        counters: only grow: prompt_tokens, cached_prompt_tokens, generation_tokens, preemptions, steps, expert_hits, expert_misses,
            expert_late, expert_prefetched_unused, expert_bytes_moved, ...
        gauges: running, waiting, queued_tokens, kv_usage_ratio, expert_resident_bytes, ...
        samples: values since the last picture, for histograms: step_time (s), batch_tokens.
    """

    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)


class EngineClient(Protocol):
    """An engine seen from an event loop."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: loaded, warm, not draining and not dead."""

    async def start(self) -> EngineInfo:
        """Load and warm up; returns when ready. Raises AnabranchError if it cannot."""

    def submit(self, request: Request) -> AsyncIterator[Output]:
        """Run one request. The last output carries `Output.finish`; closing the iterator before aborts the request.

        The iterator raises InputError for a request that can never run (too long, tokens outside the vocabulary), `BusyError` for one
        that cannot now, and `NotBegunError` where the engine fails before it has begun with it.
        """

    async def abort(self, id: str) -> None:
        """End a request; its iterator gets `Finish.ABORT`. Unknown ids are left alone."""

    def stats(self) -> EngineStats:
        """How it is. Counters are zero, not missing, before traffic."""

    async def control(self, name: str, **arguments: Any) -> Any:
        """A command of an operator's: ``reset_prefix_cache``, ``expert_cache``, ``load_adapter``, ``scale``.

        Raises InputError for an unknown one.
        """

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those under way end for up to ``drain_s`` seconds, abort the rest, free everything."""


@runtime_checkable
class Mends(Protocol):
    """An engine that replaces parts of itself while it takes requests, which wait until it is whole."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing that answers requests is being replaced."""
