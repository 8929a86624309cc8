"""`Live`: one request under way, as the coordinator's `Ledger` has it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from anabranch.serving.core.request import Output, Request
from anabranch.serving.elasticmoe.instance import Instance

__all__ = ["SUSPECT", "Emit", "Live"]

Emit = Callable[[Output], None]

# Failures without a token between them after which a request is run alone.
SUSPECT = 2

# Fields of outputs that a client is told once, as they were at first: where a request is begun again they are found anew, and are others.
_ONCE = ("cached_tokens", "queue_s", "path", "computed")


@dataclass(slots=True)
class Live:
    """One request under way.

    Attributes:
        request: with a seed, and the path that routers have chosen, so that it can go on elsewhere as it would have here.
        emit: takes its outputs, in any thread.
        serial: order among requests of one priority and time.
        need: blocks at its longest.
        output: tokens so far.
        num_scored: log probabilities of the prompt so far.
        num_cached: tokens of the prompt that were cached when it began; None as long as nobody has said it.
        told: fields of its outputs that its client has been told, of those that are told once.
        instance, device: where it runs; None while it waits.
        reruns: how often it was begun again.
        failures: of the ranks that ran it, since it last gave something.
        came, first, last: times of arrival, first and newest token, seconds.
        longest_gap_s: between two outputs.
        is_held: its rank waits with it until no other is suspect.
        is_queued: it waits for a rank.
        paused: since when its reader is too slow for it; None while it may run.
        paused_s: how long that was so before; no fault of the devices.
    """

    request: Request
    emit: Emit
    serial: int
    need: int
    output: list[int] = field(default_factory=list)
    num_scored: int = 0
    num_cached: int | None = None
    told: set[str] = field(default_factory=set)
    instance: Instance | None = None
    device: int | None = None
    reruns: int = 0
    failures: int = 0
    is_held: bool = False
    is_queued: bool = False
    came: float = 0.0
    first: float | None = None
    last: float = 0.0
    longest_gap_s: float = 0.0
    paused: float | None = None
    paused_s: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether a rank has it and may run it."""
        return self.instance is not None and self.paused is None and not self.is_held

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ranks die of, and is to be run alone."""
        return self.failures >= SUSPECT and self.paused is None

    @property
    def rank(self) -> tuple[int, float, int]:
        """See `Waiting`, as the others."""
        return self.request.priority, self.came, self.serial

    @property
    def own_priority(self) -> int:  # noqa: D102
        return self.request.own_priority

    @property
    def key(self) -> str:  # noqa: D102
        return self.request.key

    @property
    def cost(self) -> int:
        """Tokens that it may have."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    def note(self, output: Output) -> None:
        """Its rank has given it this; what its client has been told already is left out of it."""
        self.output.extend(output.tokens)
        self.num_scored += len(output.prompt_logprobs)
        for name in _ONCE:
            if getattr(output, name) is not None and name in self.told:
                setattr(output, name, None)
            elif getattr(output, name) is not None:
                self.told.add(name)
        if output.cached_tokens is not None:
            self.num_cached = output.cached_tokens
        # The path that routers chose is told by now: wherever it goes on, that is the one it asks for.
        if output.path is not None and self.request.routes_depth:
            self.request = replace(self.request, path=output.path, routes_depth=False, depth_control=None)
