"""The checked build: with ``ANABRANCH_GUARDED=1`` in the environment, what kernels load and store by address is looked at.

Kernels of the index take addresses and look at no bound (`hnsw.raw`), and products of sparse matrices load rows as vectors (`products`).
In the checked build

- arrays of an index, marks of its searches, queries and filters lie so that their last byte is the last of a page, and the page behind, as
  the one before, may not be touched: who goes past an end is stopped at that instruction by SIGSEGV;
- what a kernel makes for itself and moves by address (pools of candidates), and rows of products, are compared with the arrays' lengths
  before, and raise IndexError;
- numba's own checks, ``NUMBA_BOUNDSCHECK=1``, hold for all that kernels do with arrays.

`make test-all` runs the tests of graphs in that way. Kernels are compiled anew for it: give ``NUMBA_CACHE_DIR`` a folder of its own, or
those that were kept without checks are used. Slow and wasteful: for tests alone.
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


# For kernels, which leave out what a constant forbids.
CHECKED = is_on()


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


def held(array: np.ndarray) -> np.ndarray:
    """The array, whose address a kernel is to get; in the checked build a copy between pages that may not be touched."""
    if not CHECKED:
        return array
    copy = guarded(array.shape, array.dtype)
    copy[...] = array
    return copy
