"""Seconds of sound within a container: Ogg, WebM (Matroska), M4A (ISO base media, fragments too).

As with frames (`sound_frames`), what a decoder would play is counted, not what a field says of the length: packets of Opus, each of
which says how long it is, and samples of AAC, of 1,024 at the rate of its own config. Of other codecs the length is read where the
container tells it, and that is believed as an estimate alone.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Milliseconds of a frame of Opus by the five bits that begin a packet (RFC 6716, table 2).
_OPUS_MS = (*(10, 20, 40, 60) * 3, *(10, 20) * 2, *(2.5, 5, 10, 20) * 4)

# A packet lasts no longer.
_PACKET_MS = 120.0
_AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
_AAC_SAMPLES = 1024

# No clip that is taken anywhere is longer, whatever it says: eleven days.
_LONGEST_S = 1_000_000.0

# Boxes within boxes that are walked through.
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class Contained:
    """What a container holds.

    Attributes:
        seconds: of sound.
        is_counted: they were counted, packet by packet; else told.
        rest: bytes that belong to nothing.
    """

    seconds: float
    is_counted: bool
    rest: int = 0


def is_container(head: bytes) -> bool:
    """Whether a clip begins as one."""
    return head.startswith((b"OggS", b"\x1aE\xdf\xa3")) or head[4:8] in (b"ftyp", b"styp", b"moov")


def contained(data: bytes) -> Contained | None:
    """Of a whole clip; None for what is no such container, or tells nothing."""
    try:
        if data.startswith(b"OggS"):
            found = _ogg(data)
        elif data.startswith(b"\x1aE\xdf\xa3"):
            found = _webm(data)
        else:
            found = _mp4(data) if is_container(data[:8]) else None
    except (IndexError, struct.error):
        # It ends in the middle of something that says how long it is.
        return None
    if found is None or not found.seconds > 0:
        return None
    return Contained(min(found.seconds, _LONGEST_S), found.is_counted, found.rest)


def opus_ms(packet: bytes) -> float:
    """Milliseconds of a packet of Opus, by its first two bytes."""
    if not packet:
        return 0.0
    code = packet[0] & 3
    count = (1, 2, 2)[code] if code < 3 else (packet[1] & 63 if len(packet) > 1 else 0)
    return min(count * _OPUS_MS[packet[0] >> 3], _PACKET_MS)


# Ogg (RFC 3533)


def _ogg(data: bytes) -> Contained | None:
    """Of all its streams, one after another or beside each other."""
    streams: dict[bytes, _OggStream] = {}
    at, rest = 0, 0
    while at < len(data):
        if data[at : at + 4] != b"OggS" or at + 27 > len(data):
            again = data.find(b"OggS", at + 1)
            again = len(data) if again < 0 else again
            rest += again - at
            at = again
            continue
        serial, count = data[at + 14 : at + 18], data[at + 26]
        sizes, body = data[at + 27 : at + 27 + count], at + 27 + count
        stream = streams.setdefault(serial, _OggStream())
        if data[at + 5] & 2:
            # It begins anew under the same number.
            stream.headers = 0
        stream.page(data, body, sizes, struct.unpack_from("<q", data, at + 6)[0])
        at = body + sum(sizes)
    seconds = sum(stream.seconds for stream in streams.values())
    return Contained(seconds, all(stream.is_opus for stream in streams.values()), rest)


class _OggStream:
    """One stream: packets of Opus are counted, of all others the place of the last page is read."""

    def __init__(self) -> None:
        self.headers, self.is_opus, self._rate = 0, False, 0
        self._counted_ms, self._told_s, self._begun = 0.0, 0.0, b""
        self._is_open = False

    def page(self, data: bytes, at: int, sizes: bytes, granule: int) -> None:
        """One page: its packets lie behind one another, each of pieces of which but the last has 255 bytes."""
        for size in sizes:
            if len(self._begun) < 48:
                self._begun += data[at : at + min(size, 48 - len(self._begun))]
            at += size
            self._is_open = size == 255
            if not self._is_open:
                self._packet(self._begun)
                self._begun = b""
        if self._rate and granule > 0:
            self._told_s = max(self._told_s, granule / self._rate)

    def _packet(self, begun: bytes) -> None:
        if self.headers == 0:
            self.headers = 1
            self.is_opus, self._rate = begun.startswith(b"OpusHead"), _ogg_rate(begun)
        elif self.is_opus and self.headers == 1:
            # What is told of it.
            self.headers = 2
        elif self.is_opus:
            self._counted_ms += opus_ms(begun)

    @property
    def seconds(self) -> float:
        return self._counted_ms / 1e3 if self.is_opus else self._told_s


def _ogg_rate(head: bytes) -> int:
    """Units of a second in which a stream counts, by its first packet; 0 for what is not known."""
    if head.startswith(b"\x01vorbis") and len(head) >= 16:
        return int.from_bytes(head[12:16], "little")
    if head.startswith(b"Speex   ") and len(head) >= 40:
        return int.from_bytes(head[36:40], "little")
    if head.startswith(b"\x7fFLAC") and len(head) >= 30:
        return int.from_bytes(head[27:30], "big") >> 4
    return 0


# WebM (RFC 8794, RFC 9559)

_SEGMENT, _INFO, _SCALE, _DURATION = 0x18538067, 0x1549A966, 0x2AD7B1, 0x4489
_TRACKS, _TRACK, _NUMBER, _CODEC = 0x1654AE6B, 0xAE, 0xD7, 0x86
_CLUSTER, _TIME, _SIMPLE, _GROUP, _BLOCK = 0x1F43B675, 0xE7, 0xA3, 0xA0, 0xA1
_WITHIN = (_SEGMENT, _INFO, _TRACKS, _TRACK, _CLUSTER, _GROUP)


def _webm(data: bytes) -> Contained | None:
    scale, told, time_at, last = 1_000_000, 0.0, 0, 0
    codecs: dict[int, bytes] = {}
    counted: dict[int, float] = {}
    number = 0
    for id, begin, end in _elements(data):
        if id == _SCALE:
            scale = int.from_bytes(data[begin:end], "big")
        elif id == _DURATION:
            told = _float(data[begin:end])
        elif id == _NUMBER:
            number = int.from_bytes(data[begin:end], "big")
        elif id == _CODEC:
            codecs[number] = data[begin:end]
        elif id == _TIME:
            time_at = int.from_bytes(data[begin:end], "big")
        elif id in (_SIMPLE, _BLOCK):
            track, size = _number(data, begin)
            head = begin + size
            last = max(last, time_at + struct.unpack_from(">h", data, head)[0])
            is_laced = data[head + 2] & 6
            # Of several in one block it is not looked at where each begins.
            ms = _PACKET_MS * (data[head + 3] + 1) if is_laced else opus_ms(data[head + 3 : min(head + 5, end)])
            counted[track] = counted.get(track, 0.0) + ms
    sounds = {track: codec for track, codec in codecs.items() if codec.startswith(b"A_")}
    if sounds and all(codec.startswith(b"A_OPUS") for codec in sounds.values()):
        return Contained(sum(counted.get(track, 0.0) for track in sounds) / 1e3, True)
    return Contained(max(told, last) * scale / 1e9, False)


def _elements(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Each element's number, and where its content begins and ends; those with elements in them are gone into."""
    at = 0
    while at < len(data):
        id, width = _number(data, at, keeps_mark=True)
        size, more = _number(data, at + width)
        begin = at + width + more
        is_endless = size == (1 << 7 * more) - 1
        if id in _WITHIN:
            at = begin
            continue
        if is_endless or begin + size > len(data):
            return
        yield id, begin, begin + size
        at = begin + size


def _number(data: bytes, at: int, keeps_mark: bool = False) -> tuple[int, int]:
    """A number of which the first bits say how long it is, and its length. Raises IndexError at the end."""
    first = data[at]
    width = 9 - first.bit_length()
    if width > 8 or at + width > len(data):
        raise IndexError
    value = first if keeps_mark else first & (1 << 8 - width) - 1
    for byte in data[at + 1 : at + width]:
        value = value << 8 | byte
    return value, width


def _float(raw: bytes) -> float:
    made = struct.unpack(">f" if len(raw) == 4 else ">d", raw)[0] if len(raw) in (4, 8) else 0.0
    return made if 0 < made < 1e18 else 0.0


# M4A (ISO/IEC 14496-12, -14)

_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")


@dataclass(slots=True)
class _Mp4Track:
    """Of one track: its clock and length by that, its samples, and the rate of its AAC (0 for another codec)."""

    scale: int = 0
    length: int = 0
    told: int = 0
    samples: int = 0
    rate: int = 0
    is_sound: bool = False


def _mp4(data: bytes) -> Contained | None:
    tracks: list[_Mp4Track] = []
    fragments = 0
    for name, begin, end in _boxes(data, 0, len(data), 0):
        if name == b"trak":
            tracks.append(_Mp4Track())
        elif name == b"trun":
            # All sound, as a rule, in a file of sound.
            fragments += int.from_bytes(data[begin + 4 : begin + 8], "big")
        elif tracks:
            _learn(tracks[-1], name, data[begin:end])
    sounds = [track for track in tracks if track.is_sound and track.scale]
    if not sounds:
        return None
    seconds = [max(track.length, track.told) / track.scale for track in sounds]
    counted = [
        (track.samples + (fragments if at == 0 else 0)) * _AAC_SAMPLES / track.rate if track.rate else 0.0
        for at, track in enumerate(sounds)
    ]
    whole = sum(max(one, other) for one, other in zip(seconds, counted, strict=True))
    return Contained(whole, all(track.rate for track in sounds))


def _boxes(data: bytes, at: int, end: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """Each box's name, and where its content begins and ends, its own boxes behind it."""
    while at + 8 <= end:
        size, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = end if size == 0 else min(at + size, end)
        if stop < at + head:
            return
        yield name, at + head, stop
        if name in _BOXES and depth < _DEEPEST:
            yield from _boxes(data, at + head, stop, depth + 1)
        at = stop


def _learn(track: _Mp4Track, name: bytes, body: bytes) -> None:
    if name == b"hdlr":
        track.is_sound = body[8:12] == b"soun"
    elif name == b"mdhd":
        is_long = body[0] == 1
        track.scale, track.length = struct.unpack_from(">IQ" if is_long else ">II", body, 20 if is_long else 12)
        if track.length == (1 << 64 if is_long else 1 << 32) - 1:
            # It does not say.
            track.length = 0
    elif name == b"stts":
        count = min(int.from_bytes(body[4:8], "big"), (len(body) - 8) // 8)
        track.told = sum(num * each for num, each in struct.iter_unpack(">II", body[8 : 8 + 8 * count]))
    elif name == b"stsz":
        size, count = struct.unpack_from(">II", body, 4)
        # Those without a size of their own are all alike; of others there are no more than have one.
        track.samples = count if size else min(count, (len(body) - 12) // 4)
    elif name == b"stsd":
        track.rate = _aac_rate(body)


def _aac_rate(body: bytes) -> int:
    """Samples a second by AAC's own config (``esds``), which decoders go by; 0 for another codec."""
    at = body.find(b"esds")
    if body[12:16] != b"mp4a" or at < 0:
        return 0
    at, end = at + 8, len(body)
    while at < end:
        tag, at = body[at], at + 1
        size = 0
        for _ in range(4):
            byte, at = body[at], at + 1
            size = size << 7 | byte & 0x7F
            if not byte & 0x80:
                break
        if tag == 5:
            return _config_rate(int.from_bytes(body[at : at + min(size, 8)].ljust(8, b"\0"), "big"))
        # A number and flags before what is in them; what hangs on a flag is not used in files.
        at += {3: 3, 4: 13}.get(tag, size)
    return 0


def _config_rate(bits: int) -> int:
    """Of the first 64 bits of an AudioSpecificConfig: kind, then the rate of the core, by a number or in full."""
    skip = 5 if bits >> 59 != 31 else 11
    mark = bits >> 64 - skip - 4 & 15
    if mark == 15:
        return bits >> 64 - skip - 28 & (1 << 24) - 1
    return _AAC_RATES[mark] if mark < len(_AAC_RATES) else 0
