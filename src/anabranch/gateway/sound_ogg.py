"""Seconds of sound in Ogg (RFC 3533), by its packets; see `sound_containers`."""

import struct
import zlib

from anabranch.gateway.sound_packets import PAGE, STREAM, Contained, Pieces, opus_ms

# Of a packet, what is looked at.
_HEAD = 80

# Seconds of a packet at most, of what is not known, and samples of one of FLAC.
_OTHER_S, _FLAC_SAMPLES = 0.512, 65_535

# Each byte with its bits turned round: Ogg's sum runs through them from the other end than zlib's.
_TURNED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg(data: bytes, walked: Pieces) -> Contained | None:
    """Of all its streams, one after another or beside each other.

    A page whose sum is wrong is dropped by most decoders, which look on behind its first byte: it counts, and its bytes do once more.
    """
    streams: dict[bytes, _Stream] = {}
    at, rest = 0, 0
    while at < len(data):
        if data[at : at + 4] != b"OggS" or at + 27 > len(data):
            again = data.find(b"OggS", at + 1)
            again = len(data) if again < 0 else again
            rest += again - at
            at = again
            continue
        flags, serial, count = data[at + 5], data[at + 14 : at + 18], data[at + 26]
        sizes, body = data[at + 27 : at + 27 + count], at + 27 + count
        walked.add(PAGE + count)
        if serial not in streams:
            walked.add(STREAM)
            streams[serial] = _Stream()
        stream = streams[serial]
        stream.begin(is_first=bool(flags & 2), goes_on=bool(flags & 1))
        stream.page(data, body, sizes, struct.unpack_from("<q", data, at + 6)[0])
        end = body + sum(sizes)
        if end > len(data) or _sum(data, at, end) != data[at + 22 : at + 26]:
            rest += min(end, len(data)) - at
        at = end
    seconds = sum(stream.seconds for stream in streams.values())
    at_most = sum(max(stream.seconds, stream.at_most_s) for stream in streams.values())
    return Contained(seconds, all(stream.is_opus for stream in streams.values()), rest, at_most)


def _sum(data: bytes, at: int, end: int) -> bytes:
    """The sum of a page, as it stands in it: over all of it, with zeros in place of the sum."""
    page = (data[at : at + 22] + b"\0\0\0\0" + data[at + 26 : end]).translate(_TURNED)
    # zlib's begins and ends with all bits turned over; this one does not.
    return (zlib.crc32(page, 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "big").translate(_TURNED)


class _Stream:
    """One stream: packets of Opus are counted, of all others the place of the last page is read."""

    def __init__(self) -> None:
        self._headers, self._rate = 0, 0
        # What it was at any of its beginnings: a page that decoders drop may call it something else.
        self._was_opus = self._was_other = False
        self.counted_ms, self._told_s, self._begun = 0.0, 0.0, b""
        self._num_packets, self._packet_s = 0, 0.0
        self._is_open = False

    def begin(self, *, is_first: bool, goes_on: bool) -> None:
        """A page begins, of a stream that begins anew under the same number, or with the rest of the packet before."""
        if self._is_open and not goes_on:
            # What was begun is lost, and what comes now is none of it.
            self._end()
        if is_first:
            self._headers = 0

    def page(self, data: bytes, at: int, sizes: bytes, granule: int) -> None:
        """Its packets lie behind one another, each of pieces of which but the last has 255 bytes."""
        for size in sizes:
            if len(self._begun) < _HEAD:
                self._begun += data[at : at + min(size, _HEAD - len(self._begun))]
            at += size
            self._is_open = size == 255
            if not self._is_open:
                self._end()
        if self._rate and granule > 0:
            self._told_s = max(self._told_s, granule / self._rate)

    def _end(self) -> None:
        self._packet(self._begun)
        self._begun, self._is_open = b"", False

    def _packet(self, begun: bytes) -> None:
        self._num_packets += 1
        if self._headers == 0:
            self._headers = 1
            is_opus = begun.startswith(b"OpusHead")
            self._was_opus, self._was_other = self._was_opus or is_opus, self._was_other or not is_opus
            self._rate = _rate(begun) or self._rate
            self._packet_s = max(self._packet_s, 0.0 if is_opus else _packet_s(begun))
        elif self._was_opus and self._headers == 1 and begun.startswith(b"OpusTags"):
            # What is told of it.
            self._headers = 2
        elif self._was_opus:
            self.counted_ms += opus_ms(begun)

    @property
    def is_opus(self) -> bool:
        return self._was_opus and not self._was_other

    @property
    def seconds(self) -> float:
        return self.counted_ms / 1e3 if self.is_opus else max(self._told_s, self.counted_ms / 1e3)

    @property
    def at_most_s(self) -> float:
        """Where its packets are not counted: as many as there are, each as long as its head lets one be."""
        return self._num_packets * self._packet_s


def _packet_s(head: bytes) -> float:
    """Seconds of a packet at most, by the first one."""
    rate = _rate(head)
    if rate and head.startswith(b"\x01vorbis") and len(head) > 28:
        # Of two blocks that overlap, half of the longer one.
        return (1 << (head[28] >> 4)) / 2 / rate
    if rate and head.startswith(b"Speex   ") and len(head) >= 68:
        mode, frames = (int.from_bytes(head[at : at + 4], "little") for at in (40, 64))
        return 160 * (1 << min(mode, 2)) * max(1, frames) / rate
    if rate and head.startswith(b"\x7fFLAC"):
        return _FLAC_SAMPLES / rate
    return _OTHER_S


def _rate(head: bytes) -> int:
    """Units of a second in which a stream counts, by its first packet; 0 for what is not known."""
    if head.startswith(b"\x01vorbis") and len(head) >= 16:
        return int.from_bytes(head[12:16], "little")
    if head.startswith(b"Speex   ") and len(head) >= 40:
        return int.from_bytes(head[36:40], "little")
    if head.startswith(b"\x7fFLAC") and len(head) >= 30:
        return int.from_bytes(head[27:30], "big") >> 4
    return 0
