"""Marks between which a prompt shows a model what others wrote: <<< and >>> on lines of their own."""

import re

_RUN = re.compile(r"<{3,}|>{3,}")


def unmarked(text: str) -> str:
    """A text that holds neither mark, so that it cannot end where it is shown: three or more angles in a row stand apart."""
    return _RUN.sub(lambda found: " ".join(found[0]), text)
