"""`KeptStream`: what is kept of a stream while it is passed on, for whoever wants all of it in the end (caches, logs, programs, judges).

All that is kept of streams has one room (`room_for_streams`), of which one sender has a part. A stream for which there is no more of it is
passed on all the same, and is not kept.
"""

from anabranch.gateway.providers.provider import BODY_BYTES, Failure, UpstreamError, excess
from anabranch.web.answer_room import AnswerRoom
from anabranch.web.api_error import ApiError

# Of all streams together, and of what others leave of it, the part that one sender may have.
KEPT_BYTES, SHARE = 128 << 20, 0.5

# Room is taken in such pieces: a stream comes in very many blocks.
STEP = 16 << 10


def room_for_streams() -> AnswerRoom:
    """For all streams of a gateway, on its event loop."""
    return AnswerRoom(KEPT_BYTES, SHARE, 503)


def no_room() -> UpstreamError:
    """The failure of a stream that should have been kept."""
    message = "there is no room now to keep all of this stream: others that are under way have it"
    return UpstreamError(Failure(kind="busy", message=message, status=503, code="overloaded", retry_after_s=1.0))


class KeptStream:
    """Of one stream. `close` it when nobody wants it any more.

    Attributes:
        size: bytes that were to be kept, whether or not they are.

    Args:
        room: of all.
        whose: of the sender.
    """

    def __init__(self, room: AnswerRoom, whose: str) -> None:
        # Nobody is cut for others: what is kept stays so.
        self._held = room.enter(whose, lambda: None)
        self._blocks: list[bytes] = []
        self._lost: UpstreamError | None = None
        self.size = 0

    def add(self, block: bytes) -> None:
        """Keep a block behind those before it, or from now on nothing, where it is too much."""
        self.size += len(block)
        if self._lost is not None:
            return
        if self.size > BODY_BYTES:
            self._lost = excess(f"a stream of more than {BODY_BYTES:,} bytes, which is too long to be kept")
        elif not self.has_room(self.size):
            self._lost = no_room()
        if self._lost is None:
            self._blocks.append(block)
        else:
            self.close()

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes in all may be kept of it; they are counted then."""
        more = num_bytes - self._held.num_bytes
        if more <= 0:
            return True
        try:
            self._held.more(-(-more // STEP) * STEP)
        except ApiError:
            return False
        return True

    def blocks(self) -> list[bytes]:
        """All that was kept. Raises UpstreamError (``excess``, ``busy``) where that is not all there was."""
        if self._lost is not None:
            raise self._lost
        return self._blocks

    def begin_anew(self) -> None:
        """What came so far is not part of it."""
        self._blocks.clear()
        self._lost, self.size = None, 0

    def close(self) -> None:
        """Let go of what is kept. A second call does nothing."""
        self._blocks.clear()
        self._held.close()
