"""Amazon's event stream encoding (``application/vnd.amazon.eventstream``), read as server-sent events.

    4 bytes   length of the whole message
    4         length of the headers
    4         CRC-32 of these eight
              headers: length of the name (1), name, type (1), value by its type
              payload
    4         CRC-32 of all before

An event comes out as ``{"NAME": payload}``, an exception as ``{"exception": {"type": NAME, "message": ...}}``.
"""

import struct
import zlib

from anabranch.gateway.providers.provider import Json, garbage, parse_object
from anabranch.web.sse import event

# Of a message, as Amazon sets it.
MOST_BYTES, MOST_HEADERS = 16 << 20, 128 << 10
_PRELUDE, _CRC = 12, 4

# Bytes of a header's value by its type; those of types 6 and 7 (bytes, text) say their length.
_FIXED = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_BYTES, _TEXT = 6, 7


class EventStream:
    """Cuts one stream into events; see `anabranch.gateway.providers.reframed`."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Of the messages that are whole now. Raises UpstreamError (``garbage``)."""
        self._rest += data
        made, at = [], 0
        while len(self._rest) - at >= _PRELUDE:
            size = _size(self._rest[at : at + _PRELUDE])
            if len(self._rest) - at < size:
                break
            made.append(_event(self._rest[at : at + size]))
            at += size
        self._rest = self._rest[at:]
        return b"".join(made)

    def end(self) -> bytes:
        """Nothing; half a message is what broke off. Raises UpstreamError (``garbage``)."""
        if self._rest:
            raise garbage("a stream that ends within a message")
        return b""


def _size(prelude: bytes) -> int:
    """Of a whole message, which begins so."""
    size, headers, crc = struct.unpack(">III", prelude)
    if zlib.crc32(prelude[:8]) != crc:
        raise garbage("a message whose beginning has another checksum than it says")
    if not _PRELUDE + _CRC + headers <= size <= MOST_BYTES or headers > MOST_HEADERS:
        raise garbage(f"a message of {size:,} bytes with headers of {headers:,}")
    return int(size)


def _event(message: bytes) -> bytes:
    (crc,) = struct.unpack(">I", message[-_CRC:])
    if zlib.crc32(message[:-_CRC]) != crc:
        raise garbage("a message with another checksum than it says")
    (size,) = struct.unpack(">I", message[4:8])
    headers = _headers(message[_PRELUDE : _PRELUDE + size])
    payload = message[_PRELUDE + size : -_CRC]
    kind = headers.get(":message-type")
    if kind == "event":
        return event({headers.get(":event-type", ""): _object(payload)})
    if kind == "exception":
        return event({"exception": {**_object(payload), "type": headers.get(":exception-type", "")}})
    if kind == "error":
        told = {"type": headers.get(":error-code", ""), "message": headers.get(":error-message", "")}
        return event({"exception": told})
    raise garbage("a message of no known type")


def _headers(data: bytes) -> dict[str, str]:
    """Those that are text."""
    found, at = {}, 0
    try:
        while at < len(data):
            end = at + 1 + data[at]
            name, kind, at = data[at + 1 : end].decode(), data[end], end + 1
            if kind in (_BYTES, _TEXT):
                (size,) = struct.unpack_from(">H", data, at)
                at += 2
            else:
                size = _FIXED[kind]
            if at + size > len(data):
                raise garbage("a message with a header that is cut off")
            if kind == _TEXT:
                found[name] = data[at : at + size].decode()
            at += size
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise garbage("a message whose headers cannot be read") from None
    return found


def _object(payload: bytes) -> Json:
    return parse_object(payload or b"{}", "a message")
