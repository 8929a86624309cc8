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
        count = self._counts.get(whose, 0)
        if most is not None and count >= most:
            message = f"this key may have {most:,} requests under way at a time; try again when one has ended"
            raise RateError(message, limit="max_in_flight", retry_after_s=1.0)
        self._counts[whose] = count + 1

    def leave(self, whose: str) -> None:
        """One has ended."""
        count = self._counts.pop(whose) - 1
        if count:
            self._counts[whose] = count
