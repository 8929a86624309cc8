"""`EngineClient`: what a front end needs of an engine, be it in this process, in another, or many behind a coordinator."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from anabranch.bounds import is_whole, shown
from anabranch.errors import AnabranchError, InputError
from anabranch.seen_files import SeenFiles
from anabranch.serving.core.request import Output, Request

# How often a depth that is asked for over HTTP may run one block, as `anabranch.depth` has it; it needs torch.
MOST_VISITS = 2

# What a request may say of its depth, in words.
DEPTHS = "'full', 'routed', 'pruned' or a list of blocks"


class BusyError(AnabranchError):
    """Something that a request needs has no room for it now: no fault of the request, and worth asking again."""


class CalledOffError(InputError):
    """What an operator asked for was not done, as a later word of an operator's about the same took its place."""


class FieldInputError(InputError):
    """A field of a request has a value that it can never have.

    Attributes:
        field: its name.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


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
        adapter_versions: of the numbers of these, by name.
        planned: its config, with what ``memory`` means in its place; None where nothing was planned.
        num_layers: blocks of the model; 0 where nobody says.
        max_depth: most blocks that a request's own path may have; None where requests at a server say none.
        routes_depth: whether there are depth routers.
        skips_tokens: whether there is a skipper of tokens.
        rewires: whether routers may be turned to the text of a request.
        depth: ``routed``, ``pruned`` or ``full``, of a request that does not say.
        tasks: names of the tasks that the model itself goes by; none where it does not.
        files: that the model was read from, as they were; none where it was not read from files.
        beside: likewise, what was read beside them that all requests may go by: depth routers and a skipper of tokens.
        numbers: type and bits in which it computes; empty where nobody says.
        settings: what else of its config changes answers, see `anabranch.serving.answering`; empty where nobody says.
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
    adapter_versions: dict[str, str] = field(default_factory=dict)
    planned: Any = None
    num_layers: int = 0
    max_depth: int | None = None
    routes_depth: bool = False
    skips_tokens: bool = False
    rewires: bool = False
    depth: str = "full"
    tasks: tuple[str, ...] = ()
    files: SeenFiles = field(default_factory=SeenFiles)
    beside: SeenFiles = field(default_factory=SeenFiles)
    numbers: str = ""
    settings: str = ""

    def check_streams(self, num_streams: int | None) -> None:
        """Raises InputError for a number of parallel streams that a request cannot have."""
        # True and 2.0 equal numbers that there are, but no tensor has so many rows.
        if num_streams is None or (is_whole(num_streams) and num_streams in self.stream_choices):
            return
        if self.stream_choices == (1,):
            raise InputError(f"num_streams is {num_streams!r}, but the model has no parallel streams; leave it out")
        known = ", ".join(map(str, self.stream_choices))
        raise InputError(f"num_streams is {num_streams!r}; the model runs with {known}")

    def check_rewire(self, wanted: bool | Mapping[str, Any] | None) -> None:
        """Raises InputError where routers are to be turned and none can be. Settings and a state are the engine's to look at."""
        if wanted not in (None, False) and not self.rewires:
            raise InputError("rewire is set, but the server turns no routers (--rewire); leave it out")

    def check_depth(self, depth: Any) -> None:
        """Raises InputError for a depth that a request cannot have, or not here."""
        if depth is None or (isinstance(depth, str) and depth == "full"):
            return
        if isinstance(depth, str):
            if depth not in ("routed", "pruned"):
                raise InputError(f"depth is {shown(depth)}; it must be {DEPTHS}")
            if depth == "pruned" and not self.skips_tokens:
                raise InputError(
                    "depth is 'pruned', but the server has no skipper of tokens (--skipper); leave it out, or say 'full'"
                )
            if depth == "routed" and not self.routes_depth:
                raise InputError(
                    "depth is 'routed', but the server has no depth routers (--depth); leave it out, or say 'full'"
                )
            return
        if self.max_depth is None:
            raise InputError(
                "depth is a list of blocks, which this server does not take (--depth, or engine.max_depth); leave it out"
            )
        if not isinstance(depth, list | tuple) or not all(is_whole(block) for block in depth):
            raise InputError(f"depth is {shown(depth)}; it must be {DEPTHS}")
        self._check_path(depth)

    def check_depth_control(self, depth: Any, control: float | None) -> None:
        """Raises InputError for a control beside a depth that no routers choose; ``depth`` is what the request runs."""
        if control is None or depth == "routed":
            return
        if not self.routes_depth:
            raise InputError("depth_control is set, but the server has no depth routers (--depth); leave it out")
        named = shown(depth) if isinstance(depth, str) else "a list of blocks"
        raise InputError(f"depth_control goes with depth 'routed', and depth is {named}; leave one of them out")

    def _check_path(self, path: Sequence[int]) -> None:
        for block in path:
            if not 0 <= block < self.num_layers:
                raise InputError(f"depth has block {block}; the model has blocks 0 to {self.num_layers - 1}")
        block, times = max(Counter(path).items(), key=lambda item: item[1], default=(0, 0))
        if times > MOST_VISITS:
            raise InputError(f"depth has block {block} {times} times; a block may run at most {MOST_VISITS} times")
        assert self.max_depth is not None, "asked before"
        if len(path) > self.max_depth:
            raise InputError(
                f"depth has {len(path)} blocks; this server runs at most {self.max_depth} (engine.max_depth)"
            )


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
