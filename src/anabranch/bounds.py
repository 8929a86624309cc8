"""What numbers in configs and options may be: one set of limits for everything that a user sets.

Python's integers have no end and its floats have three values that are no numbers; tensors, files and loops have neither. A config
field of one of these types refuses what would only fail later, with the field, the value and the limits:

    class Config(BaseConfig):
        dim: Size = Field(default=128, ge=2)
        seed: Seed = 0

Fields of plain ``int`` and ``float`` have the widest limits (see `check_number`), without being asked for.
"""

import json
import math
import re
from difflib import get_close_matches
from numbers import Integral
from typing import Annotated, Any

from pydantic import Field

from anabranch.errors import ConfigError, InputError

__all__ = [
    "LARGEST_FLOAT",
    "LARGEST_INT",
    "MOST_LAYERS",
    "MOST_QUERY",
    "MOST_REPEATS",
    "MOST_SEED",
    "MOST_SIZE",
    "SMALLEST_FLOAT",
    "Repeats",
    "Seed",
    "Size",
    "as_finite",
    "check_number",
    "finite",
    "is_whole",
    "near_name",
    "shown",
    "shown_json",
    "whole",
]

MOST_SEED = 2**63 - 1  # what every generator takes: torch's, numpy's and Python's
MOST_SIZE = 2**31 - 1  # kernels and file formats index a dimension with 32 bits
MOST_REPEATS = 65_536
MOST_LAYERS = 4096  # thirty times the deepest model there is; what counts layers may look at all of them for each
MOST_QUERY = (
    2000  # characters of a query that are compared with what adapters are for, in every command and by a server
)
LARGEST_INT = 2**53  # the last up to which every reader of JSON agrees
_LONGEST = 240  # characters of a value in a message
_LINE_END = re.compile(r"\s*\n\s*")
LARGEST_FLOAT, SMALLEST_FLOAT = 1e37, 1e-37  # float32 has these as normal numbers; beyond them are infinity and 0

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]  # of a random generator
Size = Annotated[int, Field(ge=1, le=MOST_SIZE)]  # of a dimension of tensors: widths, tokens, positions, batches
Repeats = Annotated[
    int, Field(ge=1, le=MOST_REPEATS)
]  # what is built or run one by one: layers, experts, streams, passes


def check_number(name: str, value: Any, *, is_positive: bool = False) -> None:
    """Raise ConfigError for an integer beyond ``LARGEST_INT`` and for a float that is no number or too large for float32.

    Looks into lists, tuples and dicts; what is neither number nor container is let through. ``name`` is the field.
    ``is_positive`` is for fields that must be above 0: a float that float32 would round to 0 is refused too.
    """
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > LARGEST_INT:
            raise ConfigError(f"{name} is {shown(value)}; it must be between {-LARGEST_INT} and {LARGEST_INT}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number")
        if abs(value) > LARGEST_FLOAT:
            raise ConfigError(f"{name} is {value}; it must be between {-LARGEST_FLOAT} and {LARGEST_FLOAT}")
        if is_positive and 0 < value < SMALLEST_FLOAT:
            raise ConfigError(f"{name} is {value}; it must be at least {SMALLEST_FLOAT}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            check_number(f"{name}.{place}", item, is_positive=is_positive)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_number(f"{name}.{key}", item, is_positive=is_positive)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number, of Python or of numpy; True and 1.0 equal one, but are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int, most: int = LARGEST_INT) -> int:
    """``value`` if it is a whole number from ``least`` to ``most``. Raises InputError, which begins with ``name``."""
    if not is_whole(value) or not least <= value <= most:
        raise InputError(f"{name} is {shown(value)}; it must be a whole number from {least:,} to {most:,}")
    return int(value)


def as_finite(value: Any) -> float | None:
    """``value`` as a float if it is a finite number that has one; None for all else, true and false among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        made = float(value)
    except OverflowError:  # beyond 1e308
        return None
    return made if math.isfinite(made) else None


def finite(name: str, value: Any, least: float, most: float) -> float:
    """``value`` if it is a number from ``least`` to ``most``; true, false and what is infinite are none. Raises InputError, as `whole`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise InputError(f"{name} is {shown(value)}; it must be a number from {least:,} to {most:,}")
    return float(value)


def shown(value: Any) -> str:
    """``repr`` for a message: cut in the middle where it is long, and only how long an integer is that Python refuses to print."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # such an integer, or no end of brackets, inside
        return f"a {type(value).__name__} that cannot be shown"
    text = _LINE_END.sub(" ", text)  # of an array of rows: a message is one line
    return _cut(text)


def shown_json(value: Any) -> str:
    """Like `shown`, of a value that was read from JSON, in the words that stand there: null, true, double quotes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return shown(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # such an integer inside, no end of brackets, or nothing that JSON has
        return shown(value)
    # Half of a character is none that could be printed.
    return _cut("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 40]} ... {text[-30:]}"


def near_name(unknown: Any, known: Any) -> str:
    """What to add to a message about a name that is not there: one much like it, if it is text."""
    near = (
        get_close_matches(unknown, [name for name in known if isinstance(name, str)], 1)
        if isinstance(unknown, str)
        else []
    )
    return f"; did you mean {near[0]!r}?" if near else ""
