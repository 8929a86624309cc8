"""`Retold`: kept answers as chunks, which all who read the same at a time have together.

Each with chunks of its own would fill the memory, for nothing: they count in no bound, and cost nobody anything.
"""

import weakref
from dataclasses import dataclass

__all__ = ["Retold", "ToldChunks"]


@dataclass(frozen=True, eq=False)
class ToldChunks:
    """All of an answer, as long as somebody reads it.

    Attributes:
        answer: that they tell.
        chunks: of a stream.
    """

    answer: bytes
    chunks: tuple[bytes, ...]


class Retold:
    """Those of one process."""

    def __init__(self) -> None:
        # By what they say: one from a store that processes share is another object each time.
        self._told: weakref.WeakValueDictionary[tuple[bytes, str, bool], ToldChunks] = weakref.WeakValueDictionary()

    def known(self, answer: bytes, endpoint: str, with_usage: bool) -> ToldChunks | None:
        """Those that somebody reads now."""
        return self._told.get((answer, endpoint, with_usage))

    def keep(self, answer: bytes, endpoint: str, with_usage: bool, chunks: list[bytes]) -> ToldChunks:
        """Those that were made; where several made them at a time, those of the first."""
        found = self.known(answer, endpoint, with_usage)
        if found is None:
            found = self._told[answer, endpoint, with_usage] = ToldChunks(answer, tuple(chunks))
        return found
