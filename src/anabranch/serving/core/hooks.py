"""Hooks of a step: how offload, recording and pipelines see an engine's work without the engine knowing them, or change what it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from anabranch.serving.core.batch import Batch, Sampled

if TYPE_CHECKING:
    from anabranch.routing.override import Override


class StepHook(Protocol):
    """Called by the runner in its own thread. A hook that fails fails the step."""

    def before_step(self, batch: Batch, tokens: Sequence[int]) -> None:
        """``tokens``: the ids of all chunks, in order, none `PENDING`."""

    def after_step(self, batch: Batch, sampled: Sequence[Sampled]) -> None:
        """The step is done."""

    def close(self) -> None:
        """The engine ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOverride:
    """What is otherwise for one request.

    Attributes:
        routing: overrides by the layer's number or name, as traces of the model have them. Their N items are the tokens of the request's
            chunk; what has no row per item holds for all of them.
        num_streams: parallel streams, instead of the request's own; None leaves those.
        path: the blocks to run, likewise.
    """

    routing: "Mapping[int | str, Override]" = field(default_factory=dict)
    num_streams: int | None = None
    path: tuple[int, ...] | None = None


@runtime_checkable
class OverrideHook(Protocol):
    """A `StepHook` that changes how single requests are computed.

    An engine with such a hook takes every step layer by layer, as compiled steps know no overrides; so what other requests get does not
    depend on whether one is overridden. With ``deterministic`` it is the same to the bit.

    What is said of a request changes its keys and values. It must be the same in all of its steps, unless all of it is computed again
    (`Scheduler.go_on`), and the request must have an entry
    ``routing`` in `Request.options`, whose value names what is said: the prefix cache shares only among requests of the same options.
    """

    def override(self, batch: Batch, tokens: Sequence[int]) -> Mapping[str, RequestOverride]:
        """By request id, for requests of this step; those that are left out are computed as ever. Called after ``before_step``.

        A request whose override does not fit the model, or that has no such option, ends with an error; the others go on.
        """
