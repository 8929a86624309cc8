"""Periods of budgets, in UTC, as pure functions of time."""

from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from anabranch.errors import InputError

Period = Literal["total", "hour", "day", "week", "month"]
PERIODS: tuple[Period, ...] = get_args(Period)
SECOND_US = 10**6
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LENGTH = {"hour": 3600 * SECOND_US, "day": 86_400 * SECOND_US}


def window(period: Period, now_us: int) -> tuple[int, int | None]:
    """When the period that ``now_us`` lies in began, and when it ends; a total began in 1970 and never ends. Weeks begin on Monday."""
    if period == "total":
        return 0, None
    if period in _LENGTH:
        start = now_us - now_us % _LENGTH[period]
        return start, start + _LENGTH[period]
    midnight = (_EPOCH + timedelta(microseconds=now_us)).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "week":
        first = midnight - timedelta(days=midnight.weekday())
        return _us(first), _us(first + timedelta(days=7))
    first = midnight.replace(day=1)
    return _us(first), _us((first + timedelta(days=32)).replace(day=1))


def check_period(text: str) -> Period:
    """``text`` if it is a period. Raises InputError."""
    for period in PERIODS:
        if text == period:
            return period
    raise InputError(f"the period is {text!r}; use one of {', '.join(PERIODS)}")


def iso(us: int) -> str:
    """Microseconds since 1970 as ``2026-11-25T02:00:00Z``."""
    return (_EPOCH + timedelta(microseconds=us)).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def _us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
