"""Moving in from LiteLLM: numbers of its config, within bounds."""

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from anabranch.bounds import LARGEST_INT, shown

Leave = Callable[[str, str], None]

LARGEST = Decimal(LARGEST_INT)


def number_of(
    value: Any, field: str, leave: Leave, *, least: float = 0, most: Decimal = LARGEST, first: float | None = None
) -> Decimal | None:
    """A number above ``least``, or from ``first`` on where that is given; None for none, or, which is said, for anything else."""
    if value is None:
        return None
    try:
        number = Decimal(str(value)) if not isinstance(value, bool) else Decimal("nan")
    except (InvalidOperation, ValueError):
        number = Decimal("nan")
    if not number.is_finite() or number > most or (number <= least if first is None else number < first):
        bound = f"above {least:g}" if first is None else f"from {first:g} on"
        leave(field, f"is {shown(value)}, which is no number {bound} and up to {most:,}")
        return None
    return number
