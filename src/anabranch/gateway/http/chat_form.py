"""A chat's stream in the form of another API: what all such forms share."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Protocol

from anabranch.web.slices import told
from anabranch.web.sse import HEARTBEAT, read_data
from anabranch.web.turns import Turns


class Events(Protocol):
    """What makes the events of a form (`anabranch.web.messages`, `anabranch.web.responses`), in pieces none of which takes long to make."""

    def add(self, chunk: dict[str, Any], /) -> Iterable[bytes]:
        """The events that a chunk makes."""

    def end(self) -> Iterable[bytes]:
        """The last events of a whole answer."""

    def fail(self, message: str, code: str | None) -> Iterable[bytes]:
        """The last events of one that broke off."""


class ChatForm:
    """One stream in the form of an API. Each form may have chunks of its own to look at first.

    Attributes:
        beat: what is sent as a sign of life; nothing if it is empty.
        is_over: nothing comes any more.

    Args:
        made: makes the events.
    """

    beat = b""

    def __init__(self, made: Events) -> None:
        self._made, self.is_over = made, False

    def take(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """The events that a chunk makes."""
        error = chunk.get("error")
        if error:
            self.is_over = True
            yield from self._made.fail(str(error.get("message")), error.get("code"))
        else:
            yield from self._made.add(chunk)

    def end(self) -> Iterator[bytes]:
        """The last events of a whole answer."""
        yield from self._made.end()

    def fail(self, message: str, code: str | None) -> Iterator[bytes]:
        """The last events of one that broke off."""
        yield from self._made.fail(message, code)


async def translated(
    stream: AsyncIterator[bytes], made: Callable[[], ChatForm], turns: Turns, whose: str
) -> AsyncIterator[bytes]:
    """A chat's stream as the events of the form that ``made()`` is. What the stream cannot go on from becomes the form's failure.

    What takes long to make, as the last events of a response do that say all of it once more, is made in slices, and other streams go on
    between. The stream is closed in any case.

    Args:
        stream: of a chat.
        made: makes the form.
        turns: of the loop, the same for all streams.
        whose: the sender it is for.
    """
    form = made()
    try:
        async for piece in stream:
            if piece == HEARTBEAT:
                if form.beat:
                    yield form.beat
                continue
            for chunk in read_data(piece):
                async with contextlib.aclosing(told(turns, whose, form.take(chunk))) as events:
                    async for one in events:
                        yield one
                if form.is_over:
                    return
        async with contextlib.aclosing(told(turns, whose, form.end())) as events:
            async for one in events:
                yield one
    except (AttributeError, LookupError, TypeError, ValueError):
        broken = form.fail("the upstream sent chunks that make no answer", "upstream_garbage")
        async with contextlib.aclosing(told(turns, whose, broken)) as events:
            async for one in events:
                yield one
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
