"""Names of a tensor's bytes: equal bytes, equal name, on every machine and device.

BLAKE2b over blocks of 4 MiB, then over the names of the blocks in their order, so several threads hash one tensor. Who sends a tensor
cannot make another of the same name.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_BLOCK = 4 << 20
_THREADS = 4
_BYTES = 16


def tensor_hash(value: Tensor) -> str:
    """32 hexadecimal digits, of the bytes of ``value`` in row-major order."""
    data = bytes_of(value.detach().to("cpu").contiguous().reshape(-1))
    blocks = [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]
    if len(blocks) <= 1:
        names = [_hash(block) for block in blocks]
    else:
        with ThreadPoolExecutor(min(_THREADS, len(blocks))) as pool:
            names = list(pool.map(_hash, blocks))
    return hashlib.blake2b(b"".join(names), digest_size=_BYTES).hexdigest()


def _hash(block: memoryview) -> bytes:
    return hashlib.blake2b(block, digest_size=_BYTES).digest()


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a contiguous tensor of one dimension on the CPU, to be read and written."""
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]
