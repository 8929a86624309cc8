"""Server-sent events of ours: writing them, and reading the JSON of what was written here.

Those of upstreams come in any form, cut anywhere and without end: `anabranch.gateway.providers.sse` reads them, and says what is wrong with
them in the gateway's words. The two share no code.
"""

import json
from collections.abc import Iterator
from typing import Any

from anabranch.web.json_text import to_json
from anabranch.web.large_json import is_light, json_slices

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event with JSON data."""
    text = _dump(data)
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + text + b"\n\n"


def event_slices(data: Any, name: str | None = None) -> Iterator[bytes]:
    """`event` in slices, none of which takes long to make (`json_slices`)."""
    if is_light(data):
        yield event(data, name)
        return
    yield (b"event: " + name.encode() + b"\n" if name else b"") + b"data: "
    yield from json_slices(data, _dump)
    yield b"\n\n"


def _dump(data: Any) -> bytes:
    return to_json(data, (",", ":"))


def read_data(chunk: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of the ``data:`` lines of whole events; what is none (``[DONE]``, comments) is left out."""
    for line in chunk.splitlines():
        if line.startswith(b"data:") and (text := line[5:].strip()).startswith(b"{"):
            yield json.loads(text)
