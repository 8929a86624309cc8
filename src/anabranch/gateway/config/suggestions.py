"""Names that were perhaps meant."""

import difflib
from collections.abc import Iterable

# Known names that a message lists.
SHOWN = 8


def near(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names most like ``name``, best first, whatever their case."""
    folded: dict[str, str] = {}
    for other in known:
        folded.setdefault(other.casefold(), other)
    return [folded[found] for found in difflib.get_close_matches(name.casefold(), folded, n=n, cutoff=0.5)]


def hint(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or what there is."""
    known = list(known)
    found = near(name, known, n=1)
    if found:
        return f"did you mean {found[0]!r}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"known: {', '.join(known[:SHOWN])}{more}"
