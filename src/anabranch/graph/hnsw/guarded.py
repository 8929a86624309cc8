"""Arrays between pages that may not be touched: a kernel that reads or writes past an end stops the process at that instruction.

Kernels of the index take addresses and look at no bound (see `raw`), so this is how their bounds are tested: with ``ANABRANCH_GUARDED=1``
in the environment every array of an index lies so that its last byte is the last of its page (`make test-all` runs the tests of the index
in that way; numba's own checks, ``NUMBA_BOUNDSCHECK=1``, hold for kernels that take arrays). Slow and wasteful: for tests alone.
"""

import ctypes
import mmap
import os
from typing import Any

import numpy as np

VARIABLE = "ANABRANCH_GUARDED"
_NONE = 0


def is_on() -> bool:
    """Whether it was asked for."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def guarded(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that ends where its page ends, with a page before it and one behind that may not be touched; its content is undefined.

    It starts at a multiple of 64 bytes where its size is one. Raises OSError where pages cannot be protected.
    """
    size, page = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, mmap.PAGESIZE
    inner = -(-size // page) * page
    held = mmap.mmap(-1, inner + 2 * page)
    whole = np.frombuffer(held, np.uint8)
    start = whole.ctypes.data
    for place in (start, start + page + inner):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(place), ctypes.c_size_t(page), _NONE):
            raise OSError(ctypes.get_errno(), "pages cannot be protected")
    end = page + inner
    return whole[end - size : end].view(dtype).reshape(shape)
