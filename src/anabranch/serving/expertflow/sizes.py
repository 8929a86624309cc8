"""Sizes of memory as people write them."""

import re

from anabranch.errors import ConfigError

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "tb": 10**12,
}


def parse_bytes(value: int | str) -> int:
    """``"2GiB"``, ``"500 MB"`` or a number as bytes. Raises ConfigError for anything else."""
    if isinstance(value, int):
        if value <= 0:
            raise ConfigError(f"a size of memory is {value}; it must be more than 0 bytes")
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
    if not found or found[2].lower() not in UNITS or float(found[1]) <= 0:
        raise ConfigError(f"a size of memory is {value!r}; write it like 2GiB, 500MB or 1000000")
    return int(float(found[1]) * UNITS[found[2].lower()])
