"""Calls over HTTP: one session with one pool of connections for all upstreams.

URLs come from the config alone. A redirect is followed only to the same scheme, host and port; proxies of the environment are not used;
no cookies are kept. Nothing here has a timeout: whoever waits sets one.
"""

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from anabranch.gateway.dispatch.upstream_socket import upstream_socket
from anabranch.gateway.name_resolver import NameResolver
from anabranch.gateway.providers.provider import Failure, HttpCall, Reply, UpstreamError, garbage

REDIRECTS = 3

# Common servers drop a connection after 5 s: none is to be used while it is dropped.
KEEP_ALIVE_S = 4.0

# A URL of which every character stands as it goes out (RFC 3986).
_WRITTEN = re.compile(
    r"https?://[A-Za-z0-9.:\[\]_-]+(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-F]{2})*)?(?:\?[A-Za-z0-9._~=&-]*)?"
)

# What is read ahead of a slow reader, at most twice this.
READ_BYTES = 64 << 10

# Written in one go: about a tenth of a millisecond, and few enough turns of the loop for a body of megabytes.
WRITE_BYTES = 256 << 10


class Upstream:
    """The transport over HTTP. Use within a running event loop; ``close`` ends its connections.

    Args:
        connections: most at once, to all hosts; 0 for no limit.
    """

    def __init__(self, connections: int = 0) -> None:
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[str, URL] = {}

    def _started(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self._connections,
                limit_per_host=0,
                keepalive_timeout=KEEP_ALIVE_S,
                ttl_dns_cache=60,
                resolver=NameResolver(),
                socket_factory=upstream_socket,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
                trust_env=False,
                auto_decompress=True,
                read_bufsize=READ_BYTES,
                headers={"accept-encoding": "identity", "user-agent": "anabranch"},
                skip_auto_headers=("accept",),
            )
        return self._session

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""
        session, url = self._started(), self._urls.get(call.url)
        if url is None:
            # What is written as it goes out stays so: a signature may be of it.
            url = self._urls[call.url] = URL(call.url, encoded=_WRITTEN.fullmatch(call.url) is not None)
        for _ in range(REDIRECTS + 1):
            call.is_sent = False
            try:
                response = await session.post(
                    url, data=_Body(call), headers=call.headers, allow_redirects=False, proxy=call.proxy
                )
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise _failed(error, call.is_sent) from None
            call.is_sent = True
            if response.status not in (307, 308):
                break
            target = _same_origin(url, response.headers.get("location", ""))
            if target is None:
                break
            response.close()
            url = target
        return HttpReply(response)

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Body(aiohttp.Payload):
    """The body of a call, which notes when it goes out, and goes by pieces, between which others get their turn.

    Nothing of it is copied; `aiohttp.BytesIOPayload` copies all of it to learn how long it is.
    """

    _autoclose = True

    def __init__(self, call: HttpCall) -> None:
        super().__init__(memoryview(call.body))
        self._call, self._size = call, len(call.body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """As text."""
        return self._call.body.decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        """All of it."""
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        """So much of it."""
        self._call.is_sent = True
        end = len(self._value) if content_length is None else min(content_length, len(self._value))
        for start in range(0, end, WRITE_BYTES):
            if start:
                await asyncio.sleep(0)
            await writer.write(self._value[start : min(start + WRITE_BYTES, end)])


class HttpReply:
    """An answer of aiohttp's client."""

    __slots__ = ("_content", "_response", "headers", "status")
    headers: Mapping[str, str]

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response, self._content = response, response.content
        self.status, self.headers = response.status, response.headers

    def read_ready(self) -> bytes:
        """What has come, without waiting."""
        try:
            return self._content.read_nowait()
        except (aiohttp.ClientError, OSError) as error:
            raise _failed(error) from None

    async def read_some(self) -> bytes:
        """What comes next; empty at the end."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise _failed(error) from None

    def close(self) -> None:
        """Drop the connection if the end has not been reached."""
        self._response.close()


def _same_origin(url: URL, location: str) -> URL | None:
    try:
        target = url.join(URL(location))
    except ValueError:
        return None
    return target if location and target.origin() == url.origin() else None


def _failed(error: Any, is_sent: bool = True) -> UpstreamError:
    """aiohttp's exceptions in our vocabulary, without their texts: those name hosts, and clients are told what went wrong.

    Once the call ``is_sent``, a connection that breaks may cut off an answer that was made.
    """
    if isinstance(error, asyncio.TimeoutError):
        return UpstreamError(Failure(kind="timeout", message="the upstream took too long"))
    if isinstance(error, aiohttp.ClientPayloadError):
        return garbage("the upstream's answer ended early or has another length than it said")
    if isinstance(error, aiohttp.ClientResponseError):
        return garbage("the upstream's answer is no HTTP")
    if not isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError):
        return UpstreamError(
            Failure(
                kind="cut" if is_sent else "connect", message=f"the call of the upstream failed: {type(error).__name__}"
            )
        )
    if is_sent:
        return UpstreamError(Failure(kind="cut", message=f"the upstream broke the connection: {_said(error)}"))
    return UpstreamError(Failure(kind="connect", message=f"no connection to the upstream: {_said(error)}"))


def _said(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if isinstance(number, int) and number > 0 else type(error).__name__
