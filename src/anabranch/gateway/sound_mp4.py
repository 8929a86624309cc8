"""Seconds of sound in M4A (ISO/IEC 14496-12, -14; fragments too), by its samples; see `sound_containers`."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from anabranch.gateway.sound_packets import AAC_BLOCK, AAC_RATES, Contained, Pieces

# Boxes with boxes in them, and how deep they are walked through.
_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_DEEPEST = 8

# What says how many samples there are, and of what rate.
_TABLES = (b"stsz", b"stz2", b"trun", b"esds")

# A head that is packed: decoders that unpack it find tables of which nothing is seen here.
_PACKED = b"cmov"

# Kinds of tracks that make no sound.
_SILENT = (b"vide", b"auxv", b"pict", b"text", b"sbtl", b"subt", b"clcp", b"tmcd", b"hint", b"meta")

# Bytes of the config of a codec, and configs of one track; each mostly has one of fewer than 64.
_CONFIG, _CONFIGS = 4_096, 16


@dataclass(slots=True)
class _Track:
    """Of one track.

    Attributes:
        scale: units of a second of its clock.
        length, told: how long it says it is, by that: in its head, and in its table of times.
        samples: that it has.
        rate: of its AAC, the lowest that is told; 0 for another codec.
        is_sound, is_silent: it says that it is sound; that it is pictures or words.
        rates: configs that were read.
    """

    scale: int = 0
    length: int = 0
    told: int = 0
    samples: int = 0
    rate: int = 0
    is_sound: bool = False
    is_silent: bool = False
    rates: int = 0


def mp4(data: bytes) -> Contained | None:
    """Of all its tracks of sound. Raises NoContainerError, IndexError, struct.error."""
    tracks: list[_Track] = []
    fragments, seen, is_cut = 0, 0, False
    for name, begin, end, is_longer in _boxes(data):
        # Decoders do not agree on what is in a box that is longer than what it is in.
        is_cut |= is_longer and name != b"mdat"
        if name == b"trak":
            tracks.append(_Track())
        elif name == b"trun":
            # All sound, as a rule, in a file of sound.
            fragments += int.from_bytes(data[begin + 4 : begin + 8], "big")
            seen += 1
        elif tracks and name in _LEARNT:
            seen += _learn(tracks[-1], name, data[begin:end], len(data))
    sounds = [track for track in tracks if track.is_sound and track.scale]
    if not sounds:
        return None
    # A sample has a byte at least.
    fragments = min(fragments, len(data))
    seconds = [max(track.length, track.told) / track.scale for track in sounds]
    counted = [
        (track.samples + (fragments if at == 0 else 0)) * AAC_BLOCK / track.rate if track.rate else 0.0
        for at, track in enumerate(sounds)
    ]
    whole = sum(max(one, other) for one, other in zip(seconds, counted, strict=True))
    # Where a table stands that was not walked to, another may find it.
    hidden = _PACKED in data or sum(data.count(name) for name in _TABLES) > seen
    hidden |= is_cut or any(track.samples and not (track.is_sound or track.is_silent) for track in tracks)
    return Contained(whole, not hidden and all(counted))


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
    """Each box's name, where its content begins and ends, and whether it says that it is longer; its own boxes behind it."""
    pieces, at = Pieces(), 0
    ends = [len(data)]
    while ends:
        end = ends[-1]
        if at + 8 > end:
            ends.pop()
            at = end
            continue
        pieces.add()
        size, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = end if size == 0 else min(at + size, end)
        if stop < at + head:
            ends.pop()
            at = end
            continue
        yield name, at + head, stop, at + size > end
        if name in _BOXES and len(ends) <= _DEEPEST:
            ends.append(stop)
            at += head
        else:
            at = stop


_LEARNT = frozenset({b"hdlr", b"mdhd", b"stts", b"stsz", b"stz2", b"stsd"})


def _learn(track: _Track, name: bytes, body: bytes, most: int) -> int:
    """What a box says of a track, in a file of ``most`` bytes. Gives how many tables were read."""
    if name == b"hdlr":
        track.is_sound |= body[8:12] == b"soun"
        track.is_silent |= body[8:12] in _SILENT
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
        track.samples = max(track.samples, min(count, most // size if size else (len(body) - 12) // 4))
        return 1
    elif name == b"stz2":
        bits, count = struct.unpack_from(">BI", body, 7)
        track.samples = max(track.samples, min(count, (len(body) - 12) * 8 // bits if bits else 0))
        return 1
    else:
        rate, found = _aac_rate(body)
        is_first = not track.rates
        track.rates += 1
        # One that is no AAC, or of another rate, may be the one that is played.
        track.rate = rate if is_first else min(track.rate, rate)
        return found
    return 0


def _aac_rate(body: bytes) -> tuple[int, int]:
    """Samples a second by AAC's own config (``esds``), which decoders go by; 0 for another codec. And configs that were read."""
    if body[12:16] != b"mp4a":
        return 0, 0
    rates: list[int] = []
    at = body.find(b"esds")
    while at >= 0 and len(rates) < _CONFIGS:
        rates.append(_told_rate(body[at + 8 : at + _CONFIG]))
        at = body.find(b"esds", at + 4)
    return min(rates, default=0), len(rates)


def _told_rate(body: bytes) -> int:
    """Of one config; 0 where there is none."""
    at, end = 0, len(body)
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
    return AAC_RATES[mark] if mark < len(AAC_RATES) else 0
