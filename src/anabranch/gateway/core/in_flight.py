"""How many requests each sender has under way, and how many of those that may be under way in all are for one of them."""

from collections.abc import Callable

from anabranch.errors import RateError
from anabranch.sharing import most_beside


class InFlight:
    """Requests under way by whose they are, in this process. For one thread (an event loop).

    Who has none under way may always enter. Requests without a key ("") are not shared out before the first that has one: a gateway
    without keys has one sender.

    Args:
        room: gives (places in all, part of those that others leave that one sender may have); None shares nothing out.
    """

    def __init__(self, room: Callable[[], tuple[int, float]] | None = None) -> None:
        self._counts: dict[str, int] = {}
        self._room, self._total, self._has_keys = room, 0, False

    def enter(self, whose: str, most: int | None) -> None:
        """Count a request in; `leave` counts it out.

        Args:
            whose: of the sender.
            most: at a time; None for no limit.

        Raises RateError, and it is not counted.
        """
        self.look(whose, most)
        self._counts[whose] = self._counts.get(whose, 0) + 1
        self._total += 1

    def look(self, whose: str, most: int | None) -> None:
        """Whether one more may enter. Raises RateError as `enter` does."""
        self._has_keys = self._has_keys or bool(whose)
        count = self._counts.get(whose, 0)
        if most is not None and count >= most:
            raise refusal_of_many(most)
        if self._room is None or not count or not self._has_keys:
            return
        places, share = self._room()
        part = most_beside(self._total - count, places, share)
        if count + 1 > part:
            message = (
                f"this key has {count:,} of the {places:,} requests that may be under way at a time, which is its part beside those of "
                "others; try again when one has ended"
            )
            raise RateError(message, limit="max_in_flight", retry_after_s=1.0)

    def leave(self, whose: str) -> None:
        """One has ended."""
        count = self._counts.pop(whose) - 1
        self._total -= 1
        if count:
            self._counts[whose] = count


def refusal_of_many(most: int) -> RateError:
    """What a sender is told who has so many requests under way already."""
    message = f"this key may have {most:,} requests under way at a time; try again when one has ended"
    return RateError(message, limit="max_in_flight", retry_after_s=1.0)
