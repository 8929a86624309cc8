"""The compiled CPU kernels, never required: built on first use, or found where they were built (see `anabranch.native`).

Where there is no compiler, or with ANABRANCH_NO_KERNELS=1, `load` returns None, says so once in the log, and everything runs
in plain PyTorch.
"""

import ctypes
from functools import cache

from anabranch import native

__all__ = ["load"]


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had; the log says why."""
    library = native.load()
    if library is None:
        return None
    for name in ("anabranch_expert_forward", "anabranch_expert_backward"):
        getattr(library, name).restype = ctypes.c_int
    for name in (
        "anabranch_read_direct",
        "anabranch_decode_bytes",
        "anabranch_transfers_wait",
        "anabranch_transfers_take",
    ):
        getattr(library, name).restype = ctypes.c_int64
    library.anabranch_transfers_new.restype = ctypes.c_void_p
    return library
