"""`parse_bytes`: sizes as people write them."""

import re
from fractions import Fraction

from anabranch.bounds import shown
from anabranch.errors import ConfigError

__all__ = ["parse_bytes"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# Fewer bytes without a unit are taken for a unit that was forgotten.
LEAST_BARE = 1 << 20
# What a signed 64-bit number holds, as offsets into files are.
MOST = 2**63 - 1
# Longer numbers are no sizes, and take long to read.
SIZE = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([KMGT]i?|)B?\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str | int, name: str = "size") -> int:
    """Bytes of ``"2GiB"``, ``"512 MB"``, ``"8192B"`` or a plain number: as a text at least a mebibyte, since ``"8"`` has lost its unit.

    A fraction of a byte is left out. Raises ConfigError that names the field ``name``, also for less than a byte and for 8 EiB or more.
    """
    # An integer of thousands of digits has no text.
    match = SIZE.fullmatch(str(text)) if not isinstance(text, int) or abs(text) <= MOST else None
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    size = 0 if match is None else int(Fraction(match[1]) * units[match[2].lower()])
    if not 1 <= size <= MOST or (_is_bare(text) and size < LEAST_BARE):
        raise ConfigError(f"{name} is {shown(text)}; give a number of bytes with a unit, such as 2GiB or 512MB")
    return size


def _is_bare(text: str | int) -> bool:
    """Whether a size that somebody wrote has no unit; an integer is none that was written."""
    return isinstance(text, str) and text.strip()[-1].isdigit()
