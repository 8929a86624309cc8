"""Seconds of sound, by the frames that a clip is made of: MPEG audio (MP3 and its older layers), AAC as ADTS, FLAC.

A decoder walks from frame to frame, and so is it done here: what a note or a table at the beginning says of the length is not believed.
Bytes that are of no frame are told too; whoever sets a limit takes them for the sparsest sound that there is.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from anabranch.gateway.sound_packets import AAC_BLOCK, AAC_FEWEST, AAC_RATES, LONGEST_S, Pieces

# Bits of a second in thousands, by version (1, or 2 and 2.5) and layer, by the mark in a frame's head; 0 where it is not said.
_RATES: dict[tuple[bool, int], tuple[int, ...]] = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}

# Samples of a second by version (the two bits of a frame's head).
_SAMPLES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}

# How frames of FLAC begin, bytes of the longest head of one with the first behind it, and by the marks in it the samples of a block and of
# a second.
_FLAC_SYNC, _FLAC_HEAD = re.compile(rb"\xff[\xf8\xf9]"), 17
_FLAC_BLOCKS = (0, 192, *(576 << one for one in range(4)), 0, 0, *(256 << one for one in range(8)))
# Kinds of what stands behind a head: one value, all as they are, predicted; others there are not.
_FLAC_KINDS = frozenset({0, 1, *range(8, 13), *range(32, 64)})
_FLAC_RATES = (0, 88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)

# Bytes of the head of a frame of AAC.
_ADTS_HEAD = 7

# Notes that a clip begins with.
_NOTES = 100

# Frames that follow one another before a place is taken for the beginning of one: two bytes of anything may look like a head.
_SURE = 3

# Places that are tried for one, of a whole clip: what is made to look like many beginnings is taken for no sound that is known.
_TRIES = 2_000


@dataclass(frozen=True, slots=True)
class Framed:
    """What a clip is made of.

    Attributes:
        seconds: of all its frames.
        rest: bytes that are of none, notes at the beginning left out.
        at_most: seconds that it is believed to last at most: frames of AAC may hold more than they say, see `AAC_FEWEST`.
    """

    seconds: float
    rest: int
    at_most: float


class FlacFrames(NamedTuple):
    """How many frames of FLAC begin in a clip, their seconds together, and those of the longest."""

    num: int
    seconds: float
    longest_s: float


def framed(data: bytes, walked: Pieces, *, is_sure: bool = True) -> Framed | None:
    """Of a clip of MPEG audio or ADTS; None for what does not begin as one. Raises ManyPiecesError.

    Args:
        data: the clip.
        walked: of its request.
        is_sure: it is none unless it begins so; else frames are looked for anywhere, as decoders do that know of nothing else.
    """
    start = notes_end(data)
    if is_sure and not _follow(data, start, _SURE):
        return None
    at, rest, seconds, tries = start, 0, 0.0, _TRIES
    aac_s, aac_bytes = 0.0, 0
    size = len(data)
    while at < size:
        walked.add()
        frame = _frame(data, at)
        if frame is None:
            # Lost: as decoders do, to the next place where frames follow one another.
            again, tries = _next_place(data, at + 1, tries)
            rest += again - at
            at = again
            continue
        length, lasts_s, body = frame
        seconds += lasts_s
        if body:
            aac_s, aac_bytes = aac_s + lasts_s, aac_bytes + body
        at += length
    return Framed(seconds, rest, seconds + max(0.0, aac_bytes / AAC_FEWEST - aac_s))


def notes_end(data: bytes) -> int:
    """Where the notes (ID3) end that a clip may begin with; 0 where they do not end within it."""
    at = 0
    for _ in range(_NOTES):
        if data[at : at + 3] != b"ID3" or len(data) < at + 10:
            break
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        # A foot says the same as the head once more.
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at if at <= len(data) else 0


def flac(data: bytes, walked: Pieces) -> Framed | None:
    """Of a FLAC file, by the heads of its frames; None for others. Without any, ``seconds`` are 0. Raises ManyPiecesError."""
    start = notes_end(data)
    if data[start : start + 4] != b"fLaC":
        return None
    frames = flac_frames(data, _flac_told(data[start:])[0], walked, start)
    seconds = min(frames.seconds, LONGEST_S)
    return Framed(seconds, 0 if frames.num else len(data) - start, seconds)


def flac_frames(data: bytes, rate: int, walked: Pieces, start: int = 0) -> FlacFrames:
    """All frames that begin in a clip, wherever they stand: those that decoders find. Raises ManyPiecesError.

    Args:
        data: the clip.
        rate: samples a second that it says; 0 where it does not, and those that do not say theirs count for nothing if none does.
        walked: of its request.
        start: where to begin.
    """
    num, seconds, longest_s = 0, 0.0, 0.0
    # Samples of frames that do not say how fast they are, and of the longest of them; and the lowest rate that is said at all.
    unsaid, longest_unsaid, lowest = 0, 0, rate
    for found in _FLAC_SYNC.finditer(data, start):
        walked.add()
        if (head := _flac_head(data[found.start() : found.start() + _FLAC_HEAD])) is None:
            continue
        num += 1
        samples, own = head
        if own:
            # It may say another than the file does, and decoders believe either.
            lasts_s = samples / min(own, rate or own)
            seconds, longest_s = seconds + lasts_s, max(longest_s, lasts_s)
            lowest = min(own, lowest or own)
        else:
            unsaid, longest_unsaid = unsaid + samples, max(longest_unsaid, samples)
    if lowest:
        seconds, longest_s = seconds + unsaid / lowest, max(longest_s, longest_unsaid / lowest)
    return FlacFrames(num, seconds, longest_s)


def flac_seconds(head: bytes) -> float | None:
    """Seconds that a FLAC file says it has; None for others, and where it does not say."""
    rate, samples = _flac_told(head[notes_end(head) :])
    return min(samples / rate, LONGEST_S) if rate and samples else None


def _flac_told(head: bytes) -> tuple[int, int]:
    """Samples of a second, and in all, that the head of a file says; 0 for what it does not."""
    if not head.startswith(b"fLaC") or head[4:5] not in (b"\x00", b"\x80") or len(head) < 26:
        return 0, 0
    told = int.from_bytes(head[18:26], "big")
    return told >> 44, told & (1 << 36) - 1


def _flac_head(head: bytes) -> tuple[int, int] | None:
    """Samples of the frame that begins here, and a second's, 0 where it does not say (RFC 9639, 9.1); None if none does."""
    if len(head) < 6:
        return None
    block, rate, at = head[2] >> 4, head[2] & 15, 4
    # The number of the frame is as long as its first byte says, as letters are.
    ones = 8 - (~head[4] & 0xFF).bit_length()
    at += ones or 1
    # Three of the marks of how long a value is, and of how many channels, mean nothing; so do numbers that go on otherwise.
    if block == 0 or rate == 15 or head[3] >> 4 > 10 or head[3] & 1 or head[3] & 14 == 6 or ones in (1, 8):
        return None
    if any(byte & 0xC0 != 0x80 for byte in head[5:at]):
        return None
    more = {6: 1, 7: 2}.get(block, 0)
    size = 1 + int.from_bytes(head[at : at + more], "big") if more else _FLAC_BLOCKS[block]
    at += more
    more = {12: 1, 13: 2, 14: 2}.get(rate, 0)
    said = int.from_bytes(head[at : at + more], "big") * {12: 1_000, 14: 10}.get(rate, 1) if more else _FLAC_RATES[rate]
    at += more
    # By chance some bytes of a long clip look like a head; fewer are followed by what may stand there.
    if at + 1 >= len(head) or _sum8(head[:at]) != head[at] or head[at + 1] >> 1 not in _FLAC_KINDS:
        return None
    return size, said


def _sum8(data: bytes) -> int:
    """The sum at the end of a head (RFC 9639, 9.1.8)."""
    found = 0
    for byte in data:
        found = _SUMS[found ^ byte]
    return found


def _sum_of(byte: int) -> int:
    for _ in range(8):
        byte = byte << 1 & 0xFF ^ (7 if byte & 0x80 else 0)
    return byte


_SUMS = tuple(map(_sum_of, range(256)))


def _next_place(data: bytes, at: int, tries: int) -> tuple[int, int]:
    """Of the next frame that others follow, the end of the clip if there is none; and how many tries are left."""
    while tries > 0 and (at := data.find(b"\xff", at)) >= 0:
        if _follow(data, at, _SURE):
            return at, tries
        at, tries = at + 1, tries - 1
    return len(data), tries


def _follow(data: bytes, at: int, count: int) -> bool:
    """Whether so many frames follow one another here, or frames to the very end."""
    for _ in range(count):
        frame = _frame(data, at)
        if frame is None:
            return False
        at += frame[0]
        if at >= len(data):
            return True
    return True


def _frame(data: bytes, at: int) -> tuple[int, float, int] | None:
    """Bytes and seconds of the frame that begins here, and bytes of AAC in it; None if none does."""
    head = data[at : at + _ADTS_HEAD]
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    if layer == 4:
        return _adts(head)
    bits, samples = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bits in (0, 15) or samples == 3:
        return None
    rate = _SAMPLES[version][samples]
    kilobits, padding = _RATES[version == 3, layer][bits], head[2] >> 1 & 1
    if layer == 1:
        return (12_000 * kilobits // rate + padding) * 4, 384 / rate, 0
    num_samples = 576 if layer == 3 and version != 3 else 1152
    return num_samples * 125 * kilobits // rate + padding, num_samples / rate, 0


def _adts(head: bytes) -> tuple[int, float, int] | None:
    """Of a frame of AAC, which says how many blocks it has, and may have more."""
    if len(head) < _ADTS_HEAD or head[1] < 0xF0:
        return None
    mark = head[2] >> 2 & 15
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    if mark >= len(AAC_RATES) or length < _ADTS_HEAD:
        return None
    return length, (1 + (head[6] & 3)) * AAC_BLOCK / AAC_RATES[mark], length - _ADTS_HEAD
