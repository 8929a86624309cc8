"""The library that reads grammars, where it is installed."""

from functools import cache
from types import ModuleType

from anabranch.extras import require

__all__ = ["llguidance"]


@cache
def llguidance() -> ModuleType:
    """The module. Raises MissingExtraError without it."""
    require("llguidance", by="an output that follows a grammar", of="serve")
    import llguidance

    return llguidance
