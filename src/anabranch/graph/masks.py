"""Masked arrays of numpy: what lies under a mask is no value, and must not be taken for one."""

from typing import Any

import numpy as np

# Numpy loads it when it is first used: a process forked by another thread meanwhile would wait for that for ever.
from numpy import ma

from anabranch.errors import InputError


def unmasked(value: Any, what: str) -> Any:
    """The same value; a masked array in which nothing is masked as a plain one, also where it is part of a list.

    Args:
        value: anything.
        what: what it is called in the message.

    Raises InputError for entries that are masked, with the place of the first.
    """
    if isinstance(value, ma.MaskedArray):
        place = np.argwhere(ma.getmaskarray(value))
        if not len(place):
            return value.data
        first = f"; the first is [{', '.join(map(str, place[0].tolist()))}]" if value.ndim else ""
        raise InputError(
            f"{what} has {len(place):,} masked entries, which have no value{first}; fill them (numpy.ma.filled) or leave them out"
        )
    if isinstance(value, list | tuple) and any(issubclass(kind, ma.MaskedArray) for kind in set(map(type, value))):
        parts = [unmasked(part, f"{what}, entry {number},") for number, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value
