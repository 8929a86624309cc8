"""What the readers of sound share: how long a packet of Opus and a block of AAC last, what containers hold, and when readers give up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from anabranch.web.api_error import wrong

# Milliseconds of a frame of Opus by the five bits that begin a packet (RFC 6716, table 2).
_OPUS_MS = (*(10, 20, 40, 60) * 3, *(10, 20) * 2, *(2.5, 5, 10, 20) * 4)

# A packet lasts no longer.
PACKET_MS = 120.0

# Samples a second of AAC by the mark in its heads, and samples of one block; newer kinds double the rate at which a block is played, never
# its time.
AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
AAC_BLOCK = 1024

# Bytes of a second of AAC, of the fewest that are believed where blocks are not told of: 16 kbit/s. Samples of M4A, blocks of WebM and
# frames of ADTS mostly hold one block each, and decoders play as many as there are: only decoding tells how many that is. The shortest has
# four bytes (one element with nothing in it, and the end), so a clip that is made of nothing else lasts longer than that; but a memo of
# 64 kbit/s would be taken for 50 times its length if that was believed of it.
AAC_FEWEST = 2_000

# Bytes of the shortest frame of FLAC: its head, one value, and two sums.
FLAC_LEAST = 10

# No clip that is taken anywhere is longer, whatever it says: eleven days.
LONGEST_S = 1_000_000.0

# What is walked through of all clips of one request, in frames: an hour of sound has fewer, even if sent live, as Ogg with a page for each
# packet of 10 ms (360,000 of them). What has more is made of next to nothing but heads, and would hold up whoever waits for a turn behind
# it.
MOST_PIECES = 1_100_000

# What takes as long to be read as so many frames: an element or a box, and a page; and what is kept of each stream or track, as much room.
ELEMENT, PAGE, STREAM = 2, 2, 400

_TAKEN = "send WAV of PCM (float, A-law, mu-law or ADPCM, too), MP3, FLAC, Ogg, WebM, M4A (MP4) or AAC as ADTS"


class NoContainerError(ValueError):
    """It is not made as the container that it begins as."""


@dataclass(frozen=True, slots=True)
class Contained:
    """What a container holds.

    Attributes:
        seconds: of sound.
        is_counted: they were counted, packet by packet; else told.
        rest: bytes that belong to nothing.
        at_most: seconds that it is believed to last at most, if they are more than ``seconds``; 0 where nobody knows.
    """

    seconds: float
    is_counted: bool
    rest: int = 0
    at_most: float = 0.0


class ManyPiecesError(Exception):
    """The clips of a request are made of too many pieces to be read."""


class OtherSoundError(Exception):
    """A clip is of a form that nobody can say the length of before it is decoded; it says which."""


class Pieces:
    """How many pieces have been walked through, of all clips of one request."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MOST_PIECES

    def add(self, count: int = 1) -> None:
        """So many more. Raises ManyPiecesError where they are too many."""
        self._left -= count
        if self._left < 0:
            raise ManyPiecesError


@contextmanager
def one_request(field: str, walked: Pieces | None = None) -> Iterator[Pieces]:
    """What the clips of one request are read with.

    Args:
        field: that holds them, as an error names it.
        walked: of a request around it, which names what is wrong; None for one of its own.

    Raises ApiError where they have too many pieces, and for clips of a form that is not read: how long they are nobody could say, and
    whoever waits behind the many would wait long.
    """
    if walked is not None:
        yield walked
        return
    try:
        yield Pieces()
    except ManyPiecesError:
        message = (
            f"{field}: the sound in this request is made of more than {MOST_PIECES:,} frames, too many to be read; "
            "send it in several requests, or put together otherwise"
        )
        raise wrong(field, message) from None
    except OtherSoundError as error:
        raise wrong(
            field, f"{field}: a clip is {error}, and how long it lasts cannot be told before it is decoded; {_TAKEN}"
        ) from None


def _whole_ms(first: int) -> float:
    """Milliseconds of a packet by its first byte; 0 where that does not say it."""
    return (1, 2, 2, 0)[first & 3] * _OPUS_MS[first >> 3]


# By the first byte, where that says it.
FIRST_MS = tuple(map(_whole_ms, range(256)))


def opus_ms(packet: bytes) -> float:
    """Milliseconds of a packet of Opus, by its first two bytes."""
    if not packet:
        return 0.0
    if ms := FIRST_MS[packet[0]]:
        return ms
    count = packet[1] & 63 if len(packet) > 1 else 0
    return min(count * _OPUS_MS[packet[0] >> 3], PACKET_MS)
