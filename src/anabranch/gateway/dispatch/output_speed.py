"""`OutputSpeed`: how fast a deployment makes tokens at most, as its whole streams of the last day tell (`Lesson`, see `stream_pace`).

By it is charged what nobody saw: a stream that was left, of which something was made and not shown. So it must not be too low, and, as each
sender's streams teach what all are charged, nobody's odd stream may make it very high or very low:

- It is kept for each tier for itself, and is that of one answer; a request for eight is made eight times as fast.
- It is that of the fastest stream, and forgotten by time alone: however many slow ones somebody has, they take nothing back.
- Below three lessons it is not known, and what is left is charged the most that it can have been, or by what it showed.
- Lessons that may be too high (part of what was told was not shown, or nothing was told) count only while there are not three others.
- The time of a whole request tells how fast it was at least. That is no lesson, but it raises what others told.
"""

from dataclasses import dataclass

# Lessons below which it is not known.
LESSONS = 3

# For so many hours a lesson counts.
HOURS = 24
HOUR_S = 3600.0

# Streams are not all of one speed: what is not seen is charged as so much faster than the fastest of which that was measured.
HEADROOM = 1.25

# Tiers of which it is learned. Senders choose their names.
MOST_TIERS = 16

# Names of the usual one.
_USUAL_TIER = frozenset({"", "auto", "default", "standard", "standard_only"})


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one stream tells.

    Attributes:
        speed: tokens a second of one answer; None where it does not tell.
        is_exact: of ``speed``: what was told was shown. Else it may be too high.
        least: tokens a second that it was at least, over the whole time of the request; 0 if that does not tell.
    """

    speed: float | None
    is_exact: bool = True
    least: float = 0.0


@dataclass(slots=True)
class _Hour:
    """Lessons of one hour."""

    number: int
    exact: int = 0
    others: int = 0
    fastest: float = 0.0
    fastest_other: float = 0.0
    least: float = 0.0

    def add(self, lesson: Lesson) -> None:
        self.least = max(self.least, lesson.least)
        if lesson.speed is None:
            return
        if lesson.is_exact:
            self.exact, self.fastest = self.exact + 1, max(self.fastest, lesson.speed)
        else:
            self.others, self.fastest_other = self.others + 1, max(self.fastest_other, lesson.speed)


class OutputSpeed:
    """See the module. Times are seconds that never run back."""

    def __init__(self) -> None:
        self._hours: dict[str, list[_Hour]] = {}

    def learn(self, tier: str, lesson: Lesson, now: float) -> None:
        """Take note of what a whole stream told that had asked for a ``tier``."""
        tier = _of_tier(tier)
        if lesson.speed is None and not lesson.least:
            return
        if tier not in self._hours and len(self._hours) >= MOST_TIERS:
            return
        hours, number = self._hours.setdefault(tier, []), int(now // HOUR_S)
        if not hours or hours[-1].number < number:
            hours.append(_Hour(number))
            hours[:] = [hour for hour in hours if hour.number > number - HOURS]
        hours[-1].add(lesson)

    def of(self, tier: str, now: float) -> float | None:
        """Tokens a second of one answer at most; None if it is not known."""
        number = int(now // HOUR_S)
        hours = [hour for hour in self._hours.get(_of_tier(tier), ()) if hour.number > number - HOURS]
        num_exact = sum(hour.exact for hour in hours)
        if num_exact + sum(hour.others for hour in hours) < LESSONS:
            return None
        speeds = [max(hour.fastest, hour.least) for hour in hours]
        if num_exact < LESSONS:
            speeds += [hour.fastest_other for hour in hours]
        return HEADROOM * max(speeds)


def _of_tier(tier: str) -> str:
    return "" if tier in _USUAL_TIER else tier
