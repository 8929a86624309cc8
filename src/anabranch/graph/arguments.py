"""What an argument of this package's methods may be, whatever it is given: a name of several, a truth value, a number; or an InputError."""

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
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


# Bytes of a name in most file systems, and of a path in a call of the system.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def as_path(value: Any, name: str = "path") -> Path:
    """A path, of text or of `pathlib.Path`. Raises InputError for what is none, and for names that file systems do not take."""
    try:
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        encoded = b"" if not isinstance(text, str) or "\0" in text else os.fsencode(text)
    except (TypeError, UnicodeEncodeError):
        encoded = b""
    if not 0 < max(map(len, encoded.split(b"/"))) <= _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise InputError(
            f"{name} is {shown(value)}; it must be a path (text, or a pathlib.Path) whose names have 1 to {_LONGEST_NAME} bytes"
        )
    return Path(value)


def as_number_type(value: Any, name: str = "dtype") -> np.dtype:
    """A numpy type of numbers or truth values. Raises InputError for others."""
    try:
        found = np.dtype(value)
    except (TypeError, ValueError, SyntaxError, OverflowError):
        found = np.dtype(object)
    if found.kind not in "biufc" or found.shape:
        raise InputError(f"{name} is {shown(value)}; it must be a type of numbers, say numpy.float32")
    return found


def plain(value: Any) -> Any:
    """A number, truth value or text of numpy as that of Python: whose integers have no end, and which JSON can hold."""
    for kind, of_python in ((np.bool_, bool), (np.integer, int), (np.floating, float), (np.str_, str)):
        if isinstance(value, kind):
            return of_python(value)
    return value


def within(params: Mapping[str, Any], most: Mapping[str, float]) -> dict[str, Any]:
    """Arguments whose numbers, or lists of them, are no larger than ``most`` says by their names.

    A file of before may hold larger ones: what was fitted with them is as good as ever, and only another fit is refused.
    """

    def cut(value: Any, limit: float) -> Any:
        if isinstance(value, list):
            return [cut(one, limit) for one in value]
        is_beyond = is_number(value) and limit < abs(value) < math.inf
        return (limit if value > 0 else -limit) if is_beyond else value

    return {name: cut(value, most[name]) if name in most else value for name, value in params.items()}


def params_of_file(params: Any, flags: Iterable[str]) -> dict[str, Any]:
    """Arguments that a file holds: files of before `check_flag` was asked hold what was given, which counted as Python counts it."""
    return {name: bool(value) if name in flags else value for name, value in dict(params).items()}
