"""How long what containers hold of AAC, FLAC and ALAC may last; the first two are played block by block, whatever a sample holds."""

from anabranch.gateway.sound_frames import FlacFrames, flac_frames
from anabranch.gateway.sound_packets import AAC_RATES, LONGEST_S, Pieces

# Seconds of the longest frame of FLAC that players take, 65,535 samples of 8,000 a second; of one whose head says otherwise, that.
FLAC_FRAME_S = 8.2
_FLAC_RATE = 8_000

# Bytes of the config of a codec, and configs of one track; each mostly has one of fewer than 64.
_CONFIG, _CONFIGS = 4_096, 16

# The mark of FLAC's own head within its file, and of the box that holds it in M4A; and bytes of each before the rate.
_FLAC_TOLD = ((b"fLaC", 18), (b"dfLa", 22))


def config_rate(config: bytes) -> int:
    """Samples a second of an AudioSpecificConfig (ISO/IEC 14496-3, 1.6.2.1), those of the core; 0 where it says none."""
    bits = int.from_bytes(config[:8].ljust(8, b"\0"), "big")
    # Its kind, then the rate, by a number or in full.
    skip = 5 if bits >> 59 != 31 else 11
    # What is newer (xHE-AAC) has blocks of up to four times as many samples.
    slower = 4 if skip == 11 and 32 + (bits >> 53 & 63) == 42 else 1
    mark = bits >> 64 - skip - 4 & 15
    if mark == 15:
        return (bits >> 64 - skip - 28 & (1 << 24) - 1) // slower
    return AAC_RATES[mark] // slower if mark < len(AAC_RATES) else 0


def flac_within(data: bytes, walked: Pieces) -> FlacFrames:
    """The frames of FLAC in a container, wherever they stand, by their heads; none lasts over `LONGEST_S`.

    Where the rate is told nowhere it is taken for the lowest that is used, and the longest frame for `FLAC_FRAME_S` at least.

    Raises ManyPiecesError.
    """
    rates = []
    for mark, ahead in _FLAC_TOLD:
        at = data.find(mark)
        while at >= 0:
            walked.add()
            if (rate := int.from_bytes(data[at + ahead : at + ahead + 3], "big") >> 4) > 0:
                rates.append(rate)
            at = data.find(mark, at + 1)
    found = flac_frames(data, min(rates, default=_FLAC_RATE), walked)
    longest_s = found.longest_s if rates else max(found.longest_s, FLAC_FRAME_S)
    return found._replace(seconds=min(found.seconds, LONGEST_S), longest_s=min(longest_s, LONGEST_S))


def aac_rate(body: bytes) -> tuple[int, int]:
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
            return config_rate(body[at : at + min(size, 8)])
        # A number and flags before what is in them; what hangs on a flag is not used in files.
        at += {3: 3, 4: 13}.get(tag, size)
    return 0


def alac_frame_s(body: bytes) -> float:
    """Seconds of the longest frame of ALAC by its config (``alac`` in ``stsd``), which decoders go by; 0 for another codec, or without it.

    A sample has one frame.
    """
    longest_s, at = 0.0, body.find(b"alac", 16) if body[12:16] == b"alac" else -1
    for _ in range(_CONFIGS):
        if at < 0:
            break
        # Samples of a frame, and of a second; what they are like stands in between.
        samples, rate = (int.from_bytes(body[place : place + 4], "big") for place in (at + 8, at + 28))
        if rate:
            longest_s = max(longest_s, samples / rate)
        at = body.find(b"alac", at + 4)
    return longest_s
