"""Fewest bytes of a second of a WAV file, by its formats; packed sound of which that is not fixed is refused."""

import struct

from anabranch.gateway.sound_packets import ELEMENT, OtherSoundError, Pieces

# Samples a second, channels, and bits of a sample that files of sound have; what says more is none, or lies.
_SOUND = (384_000, 32, 64)

# Formats whose seconds all have as many bytes, by their tag: whole numbers and floats, of as many bits as they say; A-law and mu-law, ADPCM
# of Microsoft and of IMA, of 8 and 4.
_AS_SAID, _LAW, _ADPCM = (1, 3), (6, 7), (2, 0x11)

# The tag that stands for a longer one behind the format, where it is, and how that goes on after the two bytes of a tag.
_LONG, _AT, _TAIL = 0xFFFE, 24, bytes.fromhex("0000 0000 1000 8000 00AA 0038 9B71")

# Tags that have a name.
_NAMES = {
    0x55: "MP3",
    0xFF: "AAC",
    0x1602: "AAC",
    0x6C61: "ALAC",
    0xF1AC: "FLAC",
    0x704F: "Opus",
    0x161: "WMA",
    0x31: "GSM",
}


def wave_rate(head: bytes, walked: Pieces) -> int | None:
    """Fewest bytes of a second of a WAV file, of all that it says.

    None for others, and where its samples do not begin within ``head`` or what it says cannot be. Raises OtherSoundError for what is packed
    so that nobody knows, and ManyPiecesError.
    """
    if not head.startswith(b"RIFF") or head[8:12] != b"WAVE":
        return None
    at, found = 12, list[int | None]()
    while at + 8 <= len(head):
        walked.add(ELEMENT)
        name, size = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if name == b"data":
            break
        if name == b"fmt ":
            found.append(_format_rate(head[at + 8 : at + 8 + min(size, _AT + 16)]))
        at += 8 + size + size % 2
    else:
        return None
    # Some take the first of several formats, some the last; of one that cannot be nobody knows what they take it for.
    rates = [rate for rate in found if rate is not None]
    return min(rates) if rates and len(rates) == len(found) else None


def _format_rate(told: bytes) -> int | None:
    """Of one format; None for what cannot be."""
    if len(told) < 16:
        return None
    form, channels, samples, rate, _, bits = struct.unpack_from("<HHIIHH", told)
    if form == _LONG and len(told) > _AT:
        form = int.from_bytes(told[_AT : _AT + 2], "little")
        if told[_AT + 2 :] != _TAIL:
            raise OtherSoundError("WAV of a format that has no tag")
    if form in _LAW:
        bits = 8
    elif form in _ADPCM:
        # Some go by fewer bits than four; none by more.
        bits = bits if bits in (2, 3) else 4
    elif form not in (*_AS_SAID, _LONG):
        raise OtherSoundError(f"WAV of {_NAMES.get(form, 'another format')} (tag 0x{form:04X})")
    can_be = all(0 < said <= most for said, most in zip((samples, channels, bits), _SOUND, strict=True))
    found = min(rate, samples * channels * bits // 8)
    return found if can_be and found > 0 else None
