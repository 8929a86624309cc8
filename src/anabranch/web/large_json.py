"""JSON of megabytes, read and written in steps, so that no other thread waits long for Python's lock.

The json module holds the lock from beginning to end: ten megabytes stop an event loop for a tenth of a second, also when another thread
reads them. What is long in a large body is mostly a few texts (documents, images in base64). Those are cut out, read or written on their
own in short steps, and put back; the rest, in which places are kept for them, is small.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from anabranch.web.api_error import ApiError
from anabranch.web.body import is_too_deep, parse

# Bytes of a body, from which on it is worth while to give it to another thread, and to go by steps there.
LARGE = 1 << 18

# Characters of a text that is read or written on its own, and of one step.
_LONG, _STEP = 1 << 12, 1 << 18

# No step ends so near behind a backslash: an escape, or the second half of a pair of them, could be cut.
_ESCAPE = 12

# Places for the end of a step that are tried; a text without any, full of escapes, is read at once.
_LOOKS = 4096

# Quotes of a body; one with more has many short texts, or escapes, and steps would take longer than they save.
_QUOTES = 20_000

# So that no sender can write what stands for a long text.
_SALT = secrets.token_hex(16)


def parse_large(raw: bytes) -> dict[str, Any]:
    """What `anabranch.web.body.parse` gives, or raises, of the same body."""
    pieces: list[bytes] = []
    texts: list[str] = []
    mark, at, kept = secrets.token_hex(16), 0, 0
    if raw.count(b'"') > _QUOTES:
        return parse(raw)
    while (start := raw.find(b'"', at)) >= 0:
        end = _end(raw, start + 1)
        if end < 0:
            return parse(raw)
        if end - start > _LONG:
            text = _text(raw, start + 1, end)
            if text is None:
                # What is wrong with it is told as ever.
                return parse(raw)
            pieces += (raw[kept:start], f'"{mark}{len(texts)}"'.encode())
            texts.append(text)
            kept = end + 1
        at = end + 1
    if not texts:
        return parse(raw)
    try:
        body = parse(b"".join([*pieces, raw[kept:]]))
    except ApiError:
        # It is told of the body as it came, where the place of a mistake is another.
        return parse(raw)
    if is_too_deep(body):
        return parse(raw)
    places = {f"{mark}{number}": text for number, text in enumerate(texts)}
    return _mapped(body, lambda text: places.get(text, text))


def _end(raw: bytes, at: int) -> int:
    """Where the text ends that begins before ``at``; -1 if it does not."""
    while (end := raw.find(b'"', at)) >= 0:
        before = end
        while raw[before - 1] == 0x5C:
            before -= 1
        # A quote is part of the text behind an odd number of backslashes.
        if (end - before) % 2 == 0:
            return end
        at = end + 1
    return -1


def _text(raw: bytes, start: int, end: int) -> str | None:
    """The text between its quotes; None if it may not be so."""
    if np.any(np.frombuffer(raw, np.uint8, end - start, start) < 0x20):
        return None
    parts = []
    while start < end:
        stop = _cut(raw, start, end)
        piece = raw[start:stop]
        try:
            text = piece.decode("utf-8")
            parts.append(json.loads(f'"{text}"') if "\\" in text else text)
        except ValueError:
            return None
        start = stop
    return "".join(parts)


def _cut(raw: bytes, start: int, end: int) -> int:
    """Where a step ends: at a whole sign that has no backslash before it."""
    for stop in range(start + _STEP, min(start + _STEP + _LOOKS, end)):
        if raw[stop] < 0x80 and b"\\" not in raw[stop - _ESCAPE : stop + 1]:
            return stop
    return end


def dump_large(value: Any) -> bytes:
    """The same as ``json.dumps(value, separators=(",", ":"), allow_nan=False).encode()``."""
    texts: list[str] = []
    mark = secrets.token_hex(16)

    def placed(text: str) -> str:
        if len(text) <= _LONG:
            return text
        texts.append(text)
        return f"{mark}{len(texts) - 1}."

    rest = json.dumps(_mapped(value, placed), separators=(",", ":"), allow_nan=False)
    if not texts:
        return rest.encode()
    first, *others = rest.split(mark)
    pieces = [first.encode()]
    for other in others:
        number, _, behind = other.partition(".")
        text = texts[int(number)]
        pieces += (json.dumps(text[at : at + _STEP])[1:-1].encode() for at in range(0, len(text), _STEP))
        pieces.append(behind.encode())
    return b"".join(pieces)


def shortened(value: Any) -> Any:
    """A copy in which a digest stands for each long text: equal where ``value`` is, in this process."""

    def short(text: str) -> str:
        if len(text) <= _LONG:
            return text
        return _SALT + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    return _mapped(value, short)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with other texts, those that are names of values among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            change(name) if isinstance(name, str) else name: _mapped(inner, change) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(inner, change) for inner in value]
    return value
