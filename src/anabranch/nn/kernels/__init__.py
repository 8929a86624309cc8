"""The compiled CPU kernels, never required: built on first use, or found where they were built (see `anabranch.native`).

Where there is no compiler, or with ANABRANCH_NO_KERNELS=1, `load` returns None, says so once in the log, and everything runs
in plain PyTorch.
"""

from functools import cache

from anabranch import native
from anabranch.nn.kernels.binding import Library

__all__ = ["load"]


@cache
def load() -> Library | None:
    """The library, or None where it cannot be had; the log says why. Its functions are called through `binding.Kernel` alone."""
    found = native.load()
    return None if found is None else Library(found)
