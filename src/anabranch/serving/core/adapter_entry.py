"""One adapter of a shelf (`anabranch.serving.core.adapter_shelf`), and what is read for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Entry", "Held", "Read"]


class Held(Protocol):
    """An adapter in memory."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""

    @property
    def version(self) -> str:
        """Equal where the numbers are, whatever the name or folder."""

    @property
    def told(self) -> dict[str, Any]:
        """What it says of itself: its kind, and whom it chooses among."""


H = TypeVar("H", bound=Held)
# Of a folder, and the folder that it has to be below (None: it may be anywhere); what is given last is called with the bytes that the
# numbers will take before any of them is read, and raises where there is no room.
Read = Callable[[str, str | None, Callable[[int], None]], H]


@dataclass(eq=False)
class Entry(Generic[H]):
    """One adapter.

    Attributes:
        name, folder: see above.
        root: folder that ``folder`` has to be below whenever it is read; None where it may be anywhere.
        is_pinned: it never leaves memory, once it is there.
        held: its numbers; None where they are not in memory.
        uses: requests under way with it.
        used_at: when one last began, by a count.
        used_by: keys that have used it of late: when a request of each last began, by that count, and when the last one ended, in seconds;
            infinity while one is under way.
        version: of its numbers when they were first in memory; "" before, unless it was told.
        size: bytes of the numbers, in memory or not; 0 before they were first looked at.
    """

    name: str
    folder: str
    root: str | None = None
    is_pinned: bool = False
    held: H | None = None
    uses: int = 0
    used_at: int = 0
    used_by: dict[str, tuple[int, float]] = field(default_factory=dict)
    size: int = 0
    version: str = ""

    @property
    def nbytes(self) -> int:
        """Memory that it takes now."""
        return 0 if self.held is None else self.held.nbytes

    @property
    def stays(self) -> bool:
        """Whether it is in memory for good."""
        return self.is_pinned and self.held is not None

    def facts(self) -> dict[str, Any]:
        """What an operator is told."""
        return {
            "name": self.name,
            "folder": self.folder,
            "pinned": self.is_pinned,
            "in_memory": self.held is not None,
            "bytes": self.nbytes,
            "version": self.version or None,
            "requests": self.uses,
            **({} if self.held is None else self.held.told),
        }
