"""Names that were perhaps meant."""

import heapq
from collections.abc import Iterable
from difflib import SequenceMatcher

# Known names that a message lists.
SHOWN = 8

# How much of two names must be the same.
LEAST = 0.5

# Known names that are compared with another as a whole, which takes ten times as long as to compare their letters: those go first that have
# most of these in common.
COMPARED = 32


def near(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names most like ``name``, best first, whatever their case.

    As `difflib.get_close_matches` finds them, but that of many names only `COMPARED` are looked at closely.
    """
    folded: dict[str, str] = {}
    for other in known:
        folded.setdefault(other.casefold(), other)
    matcher = SequenceMatcher(b=name.casefold())
    # By the most that their likeness may be.
    bounds: list[tuple[float, str]] = []
    for other in folded:
        matcher.set_seq1(other)
        if matcher.real_quick_ratio() >= LEAST and (bound := matcher.quick_ratio()) >= LEAST:
            bounds.append((bound, other))
    found: list[tuple[float, str]] = []
    for bound, other in heapq.nlargest(COMPARED, bounds):
        if len(found) == n and bound < found[0][0]:
            break
        matcher.set_seq1(other)
        likeness = matcher.ratio()
        if likeness >= LEAST:
            heapq.heappush(found, (likeness, other))
            if len(found) > n:
                heapq.heappop(found)
    return [folded[other] for _, other in sorted(found, reverse=True)]


def hint(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or what there is."""
    known = list(known)
    found = near(name, known, n=1)
    if found:
        return f"did you mean {found[0]!r}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"known: {', '.join(known[:SHOWN])}{more}"
