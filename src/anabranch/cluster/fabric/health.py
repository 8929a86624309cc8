"""Which paths timed out lately: a sender that waited too long for an acknowledgement sends nothing over that path for a while."""

from collections.abc import Iterable

from anabranch.bounds import finite, whole

# The authors' code: a path is left alone for 100 ms after a time-out of 1 ms.
HOLD_S = 0.1


class PathHealth:
    """Marks of failed paths, each for (sender, destination leaf, path), that end by themselves.

    Args:
        hold_s: seconds for which a mark counts.

    Raises InputError for a time that is none.
    """

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self.hold_s = finite("hold_s", hold_s, 0.0, 1e9)
        self._until: dict[tuple[int, int], dict[int, float]] = {}

    def mark(self, host: int, leaf: int, path: int, now_s: float) -> None:
        """Path ``path`` from ``host`` to ``leaf`` (a node) timed out."""
        path = whole("path", path, 0)
        self._until.setdefault((int(host), int(leaf)), {})[path] = now_s + self.hold_s

    def reset(self, host: int, leaf: int, path: int) -> None:
        """The path works again."""
        self._until.get((int(host), int(leaf)), {}).pop(path, None)

    def failed(self, hosts: Iterable[int], leaf: int, now_s: float) -> set[int]:
        """Paths to ``leaf`` that are marked by any of these hosts at this time."""
        found: set[int] = set()
        for host in hosts:
            marks = self._until.get((int(host), int(leaf)), {})
            found |= {path for path, until in marks.items() if now_s < until}
        return found
