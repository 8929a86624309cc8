"""What goes between an engine's loop and whoever asks it: plain values, so that a thread or a pipe may lie between."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import AnabranchError, InputError
from anabranch.serving.core.client import BusyError, EngineStats, FieldInputError
from anabranch.serving.core.request import Output, Request

# Commands, to the loop


@dataclass(frozen=True, slots=True)
class Add:
    """Run a request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request."""

    id: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Compute nothing more for a request, whose reader is slow, until told to resume."""

    id: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a paused request go on."""

    id: str


@dataclass(frozen=True, slots=True)
class Control:
    """A command of an operator's; it is answered by a `Reply` of the same number. ``ping`` is answered and does nothing."""

    number: int
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Close:
    """Take no more requests, go on for up to ``drain_s`` seconds, abort the rest, end."""

    drain_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a request needs before it can run is there, or cannot be had; the loop tells itself."""

    id: str


@dataclass(frozen=True, slots=True)
class Turned:
    """What a request waits for in the midst of its text is done; the loop tells itself."""

    id: str
    future: Future[Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """The future that a control has given is done; the loop tells itself."""

    number: int
    future: Future[Any]


Command = Add | Abort | Pause | Resume | Control | Close | Prepared | Turned | Answered

# Events, from the loop


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that can never run, or with ``is_busy`` cannot now, and why; ``field`` names the one of its fields that is wrong."""

    id: str
    error: str
    is_busy: bool = False
    field: str = ""

    @property
    def reason(self) -> AnabranchError:
        """The error to raise."""
        if self.is_busy:
            return BusyError(self.error)
        return FieldInputError(self.error, self.field) if self.field else InputError(self.error)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a `Control` gave, or the AnabranchError it raised."""

    number: int
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """Requests that are in the step which runs next, for the first time."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """The loop has ended; with an error if it crashed."""

    error: str | None = None


Event = Output | Refused | Reply | EngineStats | Begun | Closed
