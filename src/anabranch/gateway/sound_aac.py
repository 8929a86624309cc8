"""How long what containers hold of AAC and FLAC may last: both are played block by block, however many a sample or a frame holds."""

from anabranch.gateway.sound_frames import FLAC_HEAD, FLAC_SYNC, flac_head
from anabranch.gateway.sound_packets import AAC_RATES, LONGEST_S, pieces

# Seconds of the longest frame of FLAC that players take, 65,535 samples of 8,000 a second; of one whose head says otherwise, that.
FLAC_FRAME_S = 8.2

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


def flac_frame_s(data: bytes) -> float:
    """Seconds of the longest frame of FLAC that a clip holds, wherever it stands; `FLAC_FRAME_S` where its rate is told nowhere.

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
    told, longest = min(rates, default=0), FLAC_FRAME_S if not rates else 0.0
    for found in FLAC_SYNC.finditer(data):
        walked.add()
        if (head := flac_head(data[found.start() : found.start() + FLAC_HEAD])) is not None and (
            rate := head[1] or told
        ):
            longest = max(longest, head[0] / rate)
    return min(longest, LONGEST_S)
