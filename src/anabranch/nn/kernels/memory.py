"""Memory that is used again: for large gradients, once the tensor that lay in it is gone, and what the C library is told to keep.

A training step that sets gradients to None frees them and asks for as much again, and fresh memory is slow: the system
clears each page first, which for 64 experts of width 512 takes longer than the backward pass of 16 tokens. So a large
gradient lies in a mapping of 2 MB pages that returns here when its tensor dies. What does not fit the next request is
released, so that no more is held than one training step uses; `release` lets go of all of it.
"""

import ctypes
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel

__all__ = ["empty_gradient", "keep_freed_memory", "release"]

# Bytes; below, rounding to huge pages would waste more than it saves.
LARGE = 4 << 20
HUGE_PAGE = 2 << 20

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)

# Bytes; 32 MB is the most it takes.
KEEP = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 1 << 30, M_TOP_PAD: 16 << 20}

RELEASE = Kernel("anabranch_release", "")

_free: dict[int, list[mmap.mmap]] = {}
# Taken again by who holds it: an allocation inside may collect garbage, and with it another gradient that returns its memory.
_lock = threading.RLock()


def empty_gradient(weight: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like ``weight``."""
    size = weight.numel() * weight.element_size()
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    with _lock:
        mapping = _free[size].pop() if _free.get(size) else None
        if mapping is None:
            _free.clear()
    if mapping is None:
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_PAGE
    # The tensor's storage keeps it alive.
    lease = (ctypes.c_char * size).from_buffer(mapping, start)
    weakref.finalize(lease, _give_back, size, mapping).atexit = False
    return torch.frombuffer(lease, dtype=weight.dtype).view(weight.shape)


def keep_freed_memory() -> bool:
    """Let this process keep up to a gigabyte that it frees. Returns whether its C library can be told so, as glibc can.

    As it comes, glibc gives back what a training step frees at its end, and the next step waits while the system clears every page anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # Each, whatever became of the others.
    told = [mallopt(option, size) for option, size in KEEP.items()]
    return all(told)


def release() -> None:
    """Return to the system what is kept for the next step: unused gradient memory and the kernels' workspace."""
    with _lock:
        _free.clear()
    if load() is not None:
        RELEASE()


def _give_back(size: int, mapping: mmap.mmap) -> None:
    with _lock:
        _free.setdefault(size, []).append(mapping)
