"""Headers of our files, read strictly: what JSON can hold is not yet what a file may say.

`check_header` is for what all files have, `whole` for a number that something is made of, and `described` for the rest of what a kind of
file says of itself: whatever cannot be read of it is an error about the file.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from anabranch.errors import DataError

# Of numpy types: those whose bytes say all.
KINDS = "biufcSU"
LARGEST = 2**63 - 1


def check_header(found: Any, start: int, size: int) -> None:
    """Raise ValueError unless this is the header of a file of ``size`` bytes whose arrays begin at ``start``.

    ``kind`` is text, ``version`` a whole number, ``meta`` an object; of each array ``name`` is text and no other's, ``dtype`` the name of a
    type whose bytes say all, ``shape`` a list of sides, ``offset`` and ``crc`` are whole numbers, and all of it lies within the file.
    """
    _want(found, dict, "the header")
    _want(found.get("kind"), str, "kind")
    whole(found.get("version"), "version")
    _want(found.get("meta"), dict, "meta")
    _want(found.get("arrays"), list, "arrays")
    names = set()
    for entry in found["arrays"]:
        _want(entry, dict, "an array")
        name = _want(entry.get("name"), str, "the name of an array")
        if name in names:
            raise ValueError(f"there are two arrays {name!r:.80}")
        names.add(name)
        dtype = _dtype(entry.get("dtype"), name)
        shape = _want(entry.get("shape"), list, f"the shape of {name!r:.80}")
        sides = [whole(side, f"a side of {name!r:.80}") for side in shape]
        offset = whole(entry.get("offset"), f"the place of {name!r:.80}")
        whole(entry.get("crc"), f"the checksum of {name!r:.80}", most=2**32 - 1)
        # Of an array without elements too: what is made of it has these sides.
        if math.prod(max(side, 1) for side in sides) * dtype.itemsize > LARGEST or len(sides) > MOST_SIDES:
            raise ValueError(f"{name!r:.80} has a shape that no array has")
        if start + offset + math.prod(sides) * dtype.itemsize > size:
            raise ValueError(f"{name!r:.80} would reach beyond the end")


# Of an array of numpy.
MOST_SIDES = 32


def _dtype(value: Any, name: str) -> np.dtype:
    text = _want(value, str, f"the type of {name!r:.80}")
    # Longer ones describe records, in a language of their own.
    if not 0 < len(text) <= 20:
        raise ValueError(f"the type of {name!r:.80} is {text!r:.40}")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"the type of {name!r:.80} is {text!r}: {error}") from None
    if dtype.kind not in KINDS or dtype.itemsize < 1 or dtype.shape:
        raise ValueError(f"{name!r:.80} is of type {dtype}")
    return dtype


def _want(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_shown(value)}, which is no {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    # Numbers of thousands of digits have no text.
    return "a huge number" if isinstance(value, int) and abs(value) > 2**200 else f"{value!r:.40}"


def whole(value: Any, name: str, least: int = 0, most: int = LARGEST) -> int:
    """A whole number of a file: not text, not true, no 3.0. Raises ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}; it is a whole number from {least} to {most}")
    return value


@contextlib.contextmanager
def described(source: object, what: str) -> Iterator[None]:
    """Around what makes ``what`` of the header and the small arrays of a file: an error in there is a DataError about ``source``.

    Checksums were right, so the file was written so. Nothing else belongs in there, or a mistake of ours would be told as theirs.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, DataError) as error:
        if isinstance(error, DataError) and str(source) in str(error):
            raise
        reason = str(error).partition("\n")[0]
        why = f"there is no {reason}" if isinstance(error, KeyError) else reason or type(error).__name__
        raise DataError(f"{source} is damaged: its header does not describe {what} ({why}); make it again") from error
