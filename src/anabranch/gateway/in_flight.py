"""How many requests each sender has under way, in all or at a deployment, and how many of those that may be are for one of them."""

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
        self.count(whose)

    def count(self, whose: str) -> None:
        """Count a request in of which is known that it may enter; `leave` counts it out."""
        self._counts[whose] = self._counts.get(whose, 0) + 1
        self._total += 1

    def look(self, whose: str, most: int | None) -> None:
        """Whether one more may enter. Raises RateError as `enter` does."""
        count = self._counts.get(whose, 0)
        has_part = self.has_part(whose)
        if most is not None and count >= most:
            raise refusal_of_many(most)
        if not has_part and self._room is not None:
            places, _ = self._room()
            message = (
                f"this key has {count:,} of the {places:,} requests that may be under way at a time, which is its part beside those of "
                "others; try again when one has ended"
            )
            raise RateError(message, limit="max_in_flight", retry_after_s=1.0)

    def has_part(self, whose: str, is_key: bool = True) -> bool:
        """Whether one more is within the part of whose it is, where there is a place.

        Those of the gateway itself, which are no key's (``is_key``), are held to their part, too, and bring no sharing out.
        """
        self._has_keys = self._has_keys or (is_key and bool(whose))
        count = self._counts.get(whose, 0)
        if self._room is None or not count or not (whose or self._has_keys):
            return True
        return count + 1 <= most_beside(self._total - count, *self._room())

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
