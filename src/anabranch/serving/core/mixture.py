"""Mixtures: which adapters a request uses, and with which weights.

A request says a name, several names with weights, or nothing, which is the base. What it says becomes pairs of a name and a weight; the
order in which they were said is of no account.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import InputError

__all__ = ["MOST_MIXED", "MOST_WEIGHT", "Mixture", "check_mixture", "check_name", "equal", "pairs_of"]

Mixture = tuple[tuple[str, float], ...]
# Adapters in one mixture, and the greatest weight of one: what is beyond is a mistake, or made to hurt.
MOST_MIXED, MOST_WEIGHT = 16, 1000.0
# No sign that stands between names ("+", ":", "=") or between the parts of a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: Any) -> str:
    """The name of an adapter. Raises InputError for what cannot be one."""
    if name is None:
        raise InputError("the adapter has no name; give it one")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"the name of an adapter is {shown(name)}; it must have 1 to 64 letters, digits, '.', '_' or '-', and begin with one of the "
            "first two"
        )
    return name


def equal(names: Sequence[str]) -> Mixture:
    """Several adapters with equal weights, which add up to 1."""
    return tuple((name, 1.0 / len(names)) for name in names)


def pairs_of(given: Any) -> Any:
    """Pairs of a name and a weight where ``given`` is a name, a mapping or pairs of these; anything else as it is, for `check_mixture`."""
    if given is None:
        return ()
    if isinstance(given, str):
        return ((given, 1.0),)
    if isinstance(given, Mapping):
        given = list(given.items())
    if isinstance(given, list | tuple):
        return tuple(tuple(pair) if isinstance(pair, list | tuple) else pair for pair in given)
    return given


def check_mixture(mixture: Any) -> None:
    """Raises InputError unless these are pairs of a name and a finite weight, no name twice, not too many."""
    if not isinstance(mixture, tuple):
        raise InputError(f"adapters is {shown(mixture)}; it must be a name, or names with weights")
    for pair in mixture:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"adapters has {shown(pair)}; it must have pairs of a name and a weight")
        name, weight = pair
        check_name(name)
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise InputError(f"the weight of adapter {name!r} is {shown(weight)}; it must be a number")
        # A NaN is not less.
        if not abs(weight) <= MOST_WEIGHT:
            raise InputError(
                f"the weight of adapter {name!r} is {shown(weight)}; it must be from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
    names = [name for name, _ in mixture]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"adapter {twice!r} is named twice; say it once, with the weight that it shall have")
    if len(names) > MOST_MIXED:
        raise InputError(f"adapters has {len(names)} names; a mixture has at most {MOST_MIXED}")
