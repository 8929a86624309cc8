"""How many requests each sender has under way."""

from anabranch.errors import RateError


class InFlight:
    """Requests under way by whose they are, in this process. For one thread (an event loop)."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def enter(self, whose: str, most: int | None) -> None:
        """Count a request in; `leave` counts it out.

        Args:
            whose: of the sender.
            most: at a time; None for no limit.

        Raises RateError, and it is not counted.
        """
        self.look(whose, most)
        self._counts[whose] = self._counts.get(whose, 0) + 1

    def look(self, whose: str, most: int | None) -> None:
        """Whether one more may enter. Raises RateError as `enter` does."""
        count = self._counts.get(whose, 0)
        if most is not None and count >= most:
            raise refusal_of_many(most)

    def leave(self, whose: str) -> None:
        """One has ended."""
        count = self._counts.pop(whose) - 1
        if count:
            self._counts[whose] = count


def refusal_of_many(most: int) -> RateError:
    """What a sender is told who has so many requests under way already."""
    message = f"this key may have {most:,} requests under way at a time; try again when one has ended"
    return RateError(message, limit="max_in_flight", retry_after_s=1.0)
