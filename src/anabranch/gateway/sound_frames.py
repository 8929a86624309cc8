"""Seconds of sound, by the frames that a clip is made of: MPEG audio (MP3 and its older layers), AAC as ADTS, FLAC.

A decoder walks from frame to frame, and so is it done here: what a note or a table at the beginning says of the length is not believed.
Bytes that are of no frame are told too; whoever sets a limit takes them for the sparsest sound that there is.
"""

from dataclasses import dataclass

from anabranch.gateway.sound_packets import AAC_BLOCK, AAC_RATES, LONGEST_S

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
    """

    seconds: float
    rest: int


def framed(data: bytes) -> Framed | None:
    """Of a clip of MPEG audio or ADTS; None for what does not begin as one."""
    start = notes_end(data)
    if not _follow(data, start, _SURE):
        return None
    at, rest, seconds, tries = start, 0, 0.0, _TRIES
    size = len(data)
    while at < size:
        frame = _frame(data, at)
        if frame is None:
            # Lost: as decoders do, to the next place where frames follow one another.
            again, tries = _next_place(data, at + 1, tries)
            rest += again - at
            at = again
            continue
        length, lasts_s = frame
        seconds += lasts_s
        at += length
    return Framed(seconds, rest)


def notes_end(data: bytes) -> int:
    """Where the notes (ID3) end that a clip may begin with; 0 where they do not end within it."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        # A foot says the same as the head once more.
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at if at <= len(data) else 0


def flac_seconds(head: bytes) -> float | None:
    """Seconds that a FLAC file says it has; None for others, and where it does not say."""
    head = head[notes_end(head) :]
    if not head.startswith(b"fLaC") or head[4:5] not in (b"\x00", b"\x80") or len(head) < 26:
        return None
    told = int.from_bytes(head[18:26], "big")
    rate, samples = told >> 44, told & (1 << 36) - 1
    return min(samples / rate, LONGEST_S) if rate and samples else None


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


def _frame(data: bytes, at: int) -> tuple[int, float] | None:
    """Bytes and seconds of the frame that begins here; None if none does."""
    head = data[at : at + 7]
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
        return (12_000 * kilobits // rate + padding) * 4, 384 / rate
    num_samples = 576 if layer == 3 and version != 3 else 1152
    return num_samples * 125 * kilobits // rate + padding, num_samples / rate


def _adts(head: bytes) -> tuple[int, float] | None:
    """Of a frame of AAC."""
    if len(head) < 7 or head[1] < 0xF0:
        return None
    mark = head[2] >> 2 & 15
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    if mark >= len(AAC_RATES) or length < 7:
        return None
    return length, (1 + (head[6] & 3)) * AAC_BLOCK / AAC_RATES[mark]
