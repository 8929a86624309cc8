"""What the readers of containers of sound share: what they find, how long a packet of Opus lasts, and when they give up."""

from dataclasses import dataclass

# Milliseconds of a frame of Opus by the five bits that begin a packet (RFC 6716, table 2).
_OPUS_MS = (*(10, 20, 40, 60) * 3, *(10, 20) * 2, *(2.5, 5, 10, 20) * 4)

# A packet lasts no longer.
PACKET_MS = 120.0

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
