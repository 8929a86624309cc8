"""Amazon's event stream, and lines of JSON, as server-sent events."""

import json
import struct
import zlib

import pytest

from anabranch.gateway.providers import UpstreamError
from anabranch.gateway.providers.eventstream import EventStream
from anabranch.gateway.providers.reframed import Lines
from recorded_conversations import event_frame, exchanges, frame, pieces


def test_frames_cut_anywhere_are_read_the_same():
    data = b"".join(pieces(exchanges("bedrock")[2]["reply"]))
    whole = EventStream().feed(data)
    for size in (1, 7, 64):
        framer = EventStream()
        assert b"".join(framer.feed(data[at : at + size]) for at in range(0, len(data), size)) == whole
        assert framer.end() == b""


def test_headers_of_all_types_are_passed_over():
    values = b"".join(
        bytes([1]) + name + bytes([kind]) + value
        for name, kind, value in [
            (b"a", 0, b""),
            (b"b", 1, b""),
            (b"c", 2, b"x"),
            (b"d", 3, b"xx"),
            (b"e", 4, b"x" * 4),
            (b"f", 5, b"x" * 8),
            (b"g", 6, b"\0\3xyz"),
            (b"h", 8, b"x" * 8),
            (b"i", 9, b"x" * 16),
        ]
    )
    one = frame({":message-type": "event", ":event-type": "messageStop"}, b'{"a": 1}')
    size = int.from_bytes(one[4:8], "big")
    both = one[12 : 12 + size] + values

    prelude = struct.pack(">II", len(one) + len(values), len(both))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + both + b'{"a": 1}'
    assert EventStream().feed(message + struct.pack(">I", zlib.crc32(message))) == EventStream().feed(one)
    assert EventStream().feed(one) == b'data: {"messageStop":{"a":1}}\n\n'


GOOD = event_frame("messageStop", {"stopReason": "end_turn"})


@pytest.mark.parametrize("at", range(0, len(GOOD), 5))
def test_a_frame_with_a_wrong_byte_is_garbage(at):
    broken = bytearray(GOOD)
    broken[at] ^= 0x40
    framer = EventStream()
    with pytest.raises(UpstreamError) as caught:
        _ = framer.feed(bytes(broken)) + framer.end()
    assert caught.value.failure.kind == "garbage"


def test_half_a_frame_at_the_end_is_garbage():
    framer = EventStream()
    assert framer.feed(GOOD[:-1]) == b""
    with pytest.raises(UpstreamError, match="within a message"):
        framer.end()


def test_frames_are_those_of_amazons_own_reader():
    eventstream = pytest.importorskip("botocore.eventstream")
    buffer = eventstream.EventStreamBuffer()
    sent_frames = exchanges("bedrock")[2]["reply"]["frames"]
    buffer.add_data(b"".join(pieces(exchanges("bedrock")[2]["reply"])))
    found = [(one.headers[":event-type"], json.loads(one.payload)) for one in buffer]
    assert found == [(name, value) for name, value in sent_frames]


def test_lines_without_an_end_at_the_end():
    framer = Lines()
    assert framer.feed(b'{"a": 1}\r\n\n{"b"') == b'data: {"a": 1}\n\n'
    assert framer.feed(b": 2}") == b""
    assert framer.end() == b'data: {"b": 2}\n\n'
    assert framer.end() == b""


def test_each_of_the_two_checksums_counts():
    broken = bytearray(GOOD[:-4])
    broken[8] ^= 1
    with pytest.raises(UpstreamError, match="beginning has another checksum"):
        EventStream().feed(bytes(broken) + struct.pack(">I", zlib.crc32(bytes(broken))))
    with pytest.raises(UpstreamError, match="message with another checksum"):
        EventStream().feed(GOOD[:-1] + bytes([GOOD[-1] ^ 1]))
