"""What goes over the wire, and what carries it: `HttpCall`, `Reply` and `Transport`."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from anabranch.gateway.providers.failures import excess
from anabranch.gateway.providers.usage import Usage

Headers = Mapping[str, str]

# Most bytes of an answer that are read; and about so many of one that says what went wrong.
BODY_BYTES, ERROR_BYTES = 32 << 20, 256 << 10


@dataclass(slots=True, repr=False)
class HttpCall:
    """What goes over the wire. Its repr shows neither the values of headers (keys) nor the body (prompts).

    Attributes:
        url: absolute; made of the config alone.
        headers: to send.
        body: JSON.
        proxy: URL of a proxy; None for none.
        sender: whose request it is, for an upstream that is in this process; it goes nowhere else.
        is_sent: it may have gone out, and be billed: set when a transport is given it. One that knows better sets it to False until
            the body goes out.
        made: of an upstream in this process that tells it: what it has done for the call, once it does no more, whoever has gone; None
            where nobody will say.
    """

    url: str
    headers: Headers
    body: bytes
    proxy: str | None = None
    sender: str = ""
    is_sent: bool = False
    made: "asyncio.Future[Usage] | None" = None

    def __repr__(self) -> str:
        return f"HttpCall({self.url!r}, headers of {sorted(self.headers)}, {len(self.body)} bytes)"


class Reply(Protocol):
    """An answer under way. Header names are lower case, or the mapping does not mind."""

    status: int

    @property
    def headers(self) -> Headers:
        """Of the answer."""

    def read_ready(self) -> bytes:
        """What has come, without waiting; empty if nothing has, or the end is reached."""

    async def read_some(self) -> bytes:
        """What comes next, empty at the end. May be cancelled and called again without losing a byte. Raises UpstreamError."""

    def close(self) -> None:
        """Drop the connection if the end has not been reached."""


class Transport(Protocol):
    """What carries calls."""

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""


async def read_all(
    reply: Reply,
    most: int = BODY_BYTES,
    begun: Sequence[bytes] = (),
    keep: Callable[[int], Awaitable[None]] | None = None,
) -> bytes:
    """The rest of an answer, behind what has ``begun``. Raises UpstreamError (``excess``) beyond ``most`` bytes.

    ``keep`` is awaited with the bytes of each piece, of what has begun as one, before more is asked for.
    """
    parts, size = list(begun), sum(map(len, begun))
    if keep is not None:
        await keep(size)
    while size <= most and (part := await reply.read_some()):
        size += len(part)
        parts.append(part)
        if keep is not None:
            await keep(len(part))
    if size > most:
        reply.close()
        raise excess(f"an answer of more than {most:,} bytes")
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def read_error(reply: Reply) -> bytes:
    """What an answer that is none says went wrong; of a long one its beginning."""
    parts, _ = await read_beginning(reply, ERROR_BYTES)
    return b"".join(parts)


async def read_beginning(reply: Reply, num_bytes: int) -> tuple[list[bytes], bool]:
    """The first pieces of an answer, of more than ``num_bytes`` if it has them; whether there may be more."""
    parts: list[bytes] = []
    size = 0
    while size <= num_bytes:
        part = await reply.read_some()
        if not part:
            return parts, False
        size += len(part)
        parts.append(part)
    return parts, True
