"""`Reply`: what a gateway gives back for one request, before it is HTTP or Python."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from anabranch.gateway.cache import Entry


@dataclass(slots=True, kw_only=True)
class Reply:
    """A whole answer or a stream.

    Attributes:
        body: JSON of a whole answer; None of a stream.
        stream: server-sent events as bytes; None of a whole answer. Whoever takes it reads it to the end or closes it.
        headers: ``x-request-id``, ``x-route-*``, ``x-cache``, ``x-overhead-ms``.
        status: of HTTP.
        content_type: of a whole answer.
        kept: that it is of, which all have together who are sent it at a time: hold it as long as the body; None of what is not kept.
    """

    body: bytes | None = None
    stream: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    content_type: str = "application/json"
    kept: Entry | None = None
