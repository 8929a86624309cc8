"""`Entry`: an answer as it is kept."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Entry:
    """A whole answer of a model.

    Attributes:
        body: the answer of ``/v1/chat/completions`` and its like, JSON.
        model: that gave it.
        prompt_tokens: it counted.
        completion_tokens: it gave.
        nano: nano-dollars that the call cost, and a hit saves.
        spare: why it stands in for another answer, as its first sender was told; "" for no word of that.
    """

    body: bytes
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nano: int = 0
    spare: str = ""

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory."""
        return len(self.body) + len(self.model) + len(self.spare) + 300
