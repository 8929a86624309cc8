"""What an argument of this package's methods may be, whatever it is given: a name of several, a truth value, a number; or an InputError."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError


def check_one_of(name: str, value: Any, allowed: Iterable[str], also: str = "") -> None:
    """Raise InputError unless ``value`` is one of these names; ``also`` is what else is allowed, for the message."""
    names = tuple(allowed)
    # An array compares with a name to an array, and a list is not looked up in a dict.
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{name} is {shown(value)}; it must be one of {', '.join(names)}{also}")


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is a truth value, of Python or of numpy; 0 and 1 count as such. Raises InputError for others, say "no"."""
    if isinstance(value, bool | np.bool_) or (is_number(value) and value in (0, 1)):
        return bool(value)
    raise InputError(f"{name} is {shown(value)}; it must be True or False")


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number, of Python or of numpy: maybe infinite or nan, but no truth value, text or array."""
    return isinstance(value, Integral | float | np.floating) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A number, truth value or text of numpy as that of Python: whose integers have no end, and which JSON can hold."""
    for kind, of_python in ((np.bool_, bool), (np.integer, int), (np.floating, float), (np.str_, str)):
        if isinstance(value, kind):
            return of_python(value)
    return value


def params_of_file(params: Any, flags: Iterable[str]) -> dict[str, Any]:
    """Arguments that a file holds: files of before `check_flag` was asked hold what was given, which counted as Python counts it."""
    return {name: bool(value) if name in flags else value for name, value in dict(params).items()}
