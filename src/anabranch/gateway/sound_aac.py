"""How long what containers hold of AAC and FLAC may last: both are played block by block, however many a sample or a frame holds."""

from anabranch.gateway.sound_frames import FlacFrames, flac_frames
from anabranch.gateway.sound_packets import AAC_RATES, LONGEST_S, pieces

# Seconds of the longest frame of FLAC that players take, 65,535 samples of 8,000 a second; of one whose head says otherwise, that.
FLAC_FRAME_S = 8.2
_FLAC_RATE = 8_000

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


def flac_within(data: bytes) -> FlacFrames:
    """The frames of FLAC in a container, wherever they stand, by their heads; none lasts over `LONGEST_S`.

    Where the rate is told nowhere it is taken for the lowest that is used, and the longest frame for `FLAC_FRAME_S` at least.

    Raises ManyPiecesError.
    """
    walked, rates = pieces(), []
    for mark, ahead in _FLAC_TOLD:
        at = data.find(mark)
        while at >= 0:
            walked.add()
            if (rate := int.from_bytes(data[at + ahead : at + ahead + 3], "big") >> 4) > 0:
                rates.append(rate)
            at = data.find(mark, at + 1)
    found = flac_frames(data, min(rates, default=_FLAC_RATE))
    longest_s = found.longest_s if rates else max(found.longest_s, FLAC_FRAME_S)
    return found._replace(seconds=min(found.seconds, LONGEST_S), longest_s=min(longest_s, LONGEST_S))
