"""What the readers of sound share: how long a packet of Opus and a block of AAC last, what containers hold, and when readers give up."""

from dataclasses import dataclass

# Milliseconds of a frame of Opus by the five bits that begin a packet (RFC 6716, table 2).
_OPUS_MS = (*(10, 20, 40, 60) * 3, *(10, 20) * 2, *(2.5, 5, 10, 20) * 4)

# A packet lasts no longer.
PACKET_MS = 120.0

# Samples a second of AAC by the mark in its heads, and samples of one block; newer kinds double the rate at which a block is played, never
# its time.
AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
AAC_BLOCK = 1024

# No clip that is taken anywhere is longer, whatever it says: eleven days.
LONGEST_S = 1_000_000.0

# Elements, boxes or packets that are walked through: more than five hours of packets of Opus have. What has more is made of next to
# nothing but heads, and would hold up whoever waits for a turn behind it.
MOST_PIECES = 1_000_000


class NoContainerError(ValueError):
    """It is not made as the container that it begins as."""


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


class Pieces:
    """How many pieces have been walked through."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MOST_PIECES

    def add(self, count: int = 1) -> None:
        """So many more. Raises NoContainerError where they are too many."""
        self._left -= count
        if self._left < 0:
            raise NoContainerError(f"more than {MOST_PIECES:,} pieces")


def opus_ms(packet: bytes) -> float:
    """Milliseconds of a packet of Opus, by its first two bytes."""
    if not packet:
        return 0.0
    code = packet[0] & 3
    count = (1, 2, 2)[code] if code < 3 else (packet[1] & 63 if len(packet) > 1 else 0)
    return min(count * _OPUS_MS[packet[0] >> 3], PACKET_MS)
