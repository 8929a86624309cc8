"""`Retold`: kept answers, and their chunks, which all who read the same at a time have together.

Each with his own would fill the memory, for nothing: they count in no bound, and cost nobody anything.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anabranch.gateway.cache.entry import Entry

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
    """Those of one process. Use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By what they say: one from a store that processes share is another object each time.
        self._told: weakref.WeakValueDictionary[tuple[bytes, str, bool], ToldChunks] = weakref.WeakValueDictionary()
        self._read: weakref.WeakValueDictionary[tuple[bytes, str, int, int, int, str], Entry] = (
            weakref.WeakValueDictionary()
        )

    def one(self, entry: Entry) -> Entry:
        """Of an answer that came from elsewhere the one that is read here already; itself where nobody reads it."""
        said = entry.body, entry.model, entry.prompt_tokens, entry.completion_tokens, entry.nano, entry.spare
        with self._lock:
            return self._read.setdefault(said, entry)

    def known(self, answer: bytes, endpoint: str, with_usage: bool) -> ToldChunks | None:
        """An answer's chunks, if somebody reads them now."""
        with self._lock:
            return self._told.get((answer, endpoint, with_usage))

    def told(
        self, answer: bytes, endpoint: str, with_usage: bool, make: Callable[[bytes, str, bool], Sequence[bytes]]
    ) -> ToldChunks:
        """Those, else what ``make`` gives; where several make them at a time, those of the first."""
        asked = answer, endpoint, with_usage
        found = self.known(*asked)
        if found is None:
            made = ToldChunks(answer, tuple(make(*asked)))
            with self._lock:
                found = self._told.setdefault(asked, made)
        return found
