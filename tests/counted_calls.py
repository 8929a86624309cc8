"""How much work something is, on any machine: the functions that are called meanwhile, of Python and of C.

What goes through a long text again for each of its pieces calls four times as many functions for twice as long a text. What a single
function of C does is not seen: where that takes too long, the test does not end.
"""

import sys
from collections.abc import Callable
from typing import Any


def counted_calls(work: Callable[[], Any]) -> tuple[Any, int]:
    """What ``work()`` gives, and how many functions were called."""
    count, before = 0, sys.getprofile()

    def look(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        given = work()
    finally:
        sys.setprofile(before)
    return given, count


def grow_in_proportion(count: Callable[[int], int], size: int) -> bool:
    """Whether twice the size is about twice the work, and not four times."""
    return count(2 * size) < 2.5 * count(size) + 1000
