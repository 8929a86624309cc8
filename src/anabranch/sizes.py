"""`parse_bytes`: sizes as people write them."""

import re

from anabranch.errors import ConfigError

__all__ = ["parse_bytes"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# Fewer bytes without a unit are taken for a unit that was forgotten.
LEAST_BARE = 1 << 20
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?\s*", re.IGNORECASE)


def parse_bytes(text: str | int, name: str = "size") -> int:
    """Bytes of ``"2GiB"``, ``"512 MB"``, ``"8192B"`` or a plain number: as a text at least a mebibyte, since ``"8"`` has lost its unit.

    Raises ConfigError that names the field ``name``.
    """
    match = SIZE.fullmatch(str(text))
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match is None or float(match[1]) <= 0 or (_is_bare(text) and float(match[1]) < LEAST_BARE):
        raise ConfigError(f"{name} is {text!r}; give a number of bytes with a unit, such as 2GiB or 512MB")
    return int(float(match[1]) * units[match[2].lower()])


def _is_bare(text: str | int) -> bool:
    """Whether a size that somebody wrote has no unit; an integer is none that was written."""
    return isinstance(text, str) and text.strip()[-1].isdigit()
