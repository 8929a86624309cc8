"""Sums over the last so many seconds, in little memory."""

from collections import deque

# Times that were added up differently, and are the same.
_SAME_S = 1e-6


class SlidingSum:
    """The sum of what was added in the last ``window_s`` seconds.

    Times within a 64th of the window are kept as one, the later one: never counted too short, and at most a 64th too long.
    """

    __slots__ = ("_grain_s", "_parts", "_window_s", "total")

    def __init__(self, window_s: float) -> None:
        self._window_s, self._grain_s = window_s, window_s / 64
        self._parts: deque[list[float]] = deque()  # [first, last, amount]
        self.total = 0.0

    def add(self, now: float, amount: float = 1.0) -> None:
        """Add ``amount`` at ``now``; times never run back."""
        parts = self._parts
        if parts and now - parts[-1][0] < self._grain_s:
            parts[-1][1] = now
            parts[-1][2] += amount
        else:
            parts.append([now, now, amount])
        self.total += amount

    def give_back(self, amount: float) -> None:
        """Take so much off what was added last: it was not used."""
        parts = self._parts
        while parts and amount > 0:
            taken = min(parts[-1][2], amount)
            parts[-1][2] -= taken
            self.total -= taken
            amount -= taken
            if parts[-1][2] <= 0:
                parts.pop()

    def take_back(self, since: float, amount: float) -> None:
        """Take so much off what was added at ``since``, as far as it has not passed: less was used."""
        for part in reversed(self._parts):
            if part[0] - _SAME_S <= since <= part[1] + _SAME_S:
                taken = min(part[2], amount)
                part[2] -= taken
                self.total -= taken
                return

    def at(self, now: float) -> float:
        """The sum at ``now``."""
        parts, oldest = self._parts, now - self._window_s
        while parts and parts[0][1] <= oldest:
            self.total -= parts.popleft()[2]
        if not parts:
            self.total = 0.0
        return self.total

    def room_in_s(self, now: float, amount: float, limit: float) -> float:
        """Seconds until ``amount`` more keeps the sum within ``limit``; infinity if it never does."""
        if amount > limit:
            return float("inf")
        over = self.at(now) + amount - limit
        if over <= 0:
            return 0.0
        for _, last, part in self._parts:
            over -= part
            if over <= 1e-9:
                return last + self._window_s - now
        return self._window_s
