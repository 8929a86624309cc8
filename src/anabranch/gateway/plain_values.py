"""Numbers and truths that code of others gives: taken where they equal one of Python's own, whichever library they are from."""

import math
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from anabranch.bounds import shown

__all__ = ["number_of", "plain_numbers", "said", "truth_of", "whole_of"]

_PLAIN = (int, float, bool, str, type(None))


def whole_of(value: Any) -> int | None:
    """The integer that ``value`` equals (12, 12.0, a scalar of numpy, a tensor of one number); None for none, and for a truth.

    Nor is it what a Decimal or a fraction is beyond all floats, above 1.8e308, which would take long to be made an integer.
    What it asks of ``value`` is code of others: call it by `plainly`.
    """
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, Real | Decimal):
        return None
    if isinstance(found, Integral):
        return int(found)
    number: Any = found
    try:
        # A few characters say a Decimal of millions of digits, which take minutes to be made an integer: none has more than a float may.
        if not math.isfinite(float(number)):
            return None
        whole = int(number)
    except (ValueError, OverflowError):
        # NaN and infinity.
        return None
    return whole if whole == number else None


def number_of(value: Any) -> int | float | None:
    """The number that ``value`` equals, or is nearest to (of numpy's float32, a Decimal, a fraction); None for none. As `whole_of`."""
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, Real | Decimal):
        return None
    number: Any = found
    try:
        return int(number) if isinstance(found, Integral) else float(number)
    except (ValueError, OverflowError):
        # A fraction beyond all floats, and a Decimal that signals.
        return None


def truth_of(value: Any) -> bool | None:
    """The truth that ``value`` equals (True, 1, a truth of numpy or a tensor of one); None for none. To be called as `whole_of`."""
    found = _scalar(value)
    if isinstance(found, bool):
        return found
    whole = whole_of(found)
    return bool(whole) if whole in (0, 1) else None


def plain_numbers(value: Any, depth: int = 4) -> Any:
    """A table, or a list, with numbers and truths of Python's in place of others that equal them; to be called as `whole_of`.

    Args:
        value: what is neither a table, a list, a number nor a truth stays.
        depth: how many tables within one another are looked at.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict | list):
        if depth == 0:
            return value
        if isinstance(value, list):
            return [plain_numbers(one, depth - 1) for one in value]
        return {name: plain_numbers(one, depth - 1) for name, one in value.items()}
    scalar = _scalar(value)
    whole = whole_of(scalar)
    found = scalar if isinstance(scalar, bool) else number_of(scalar) if whole is None else whole
    return value if found is None else found


def said(value: Any) -> str:
    """What it is, for a message. It may be long, and its author says how it is written: numbers and short words alone are quoted."""
    is_plain = value is None or type(value) in (bool, int, float, str)
    return shown(value)[:60] if is_plain else f"a {type(value).__name__}"


def _scalar(value: Any) -> Any:
    """What stands in an array without dimensions, as a number of Python's."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value
