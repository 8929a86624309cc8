"""Arrays that kernels take by address: where they begin, and how they grow."""

from typing import Any

import numpy as np

from anabranch.graph.guarded import CHECKED, guarded
from anabranch.graph.hnsw.raw import LINE


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes; its content is undefined."""
    if CHECKED:
        return guarded(shape, dtype)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def grown(array: np.ndarray, capacity: int, count: int) -> np.ndarray:
    """A copy with room for ``capacity`` rows, of which the first ``count`` are those of the array."""
    larger = aligned((capacity, *array.shape[1:]), array.dtype)
    larger[:count] = array[:count]
    return larger
