"""The compiled attention over a paged key-value cache, behind tensors."""
# Shapes: P streams, T rows of a step, H query heads, G key heads, D head width, M entries in front, S slots, N sequences, U block numbers

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.nn.kernels import load

__all__ = ["attend", "can"]

MOST_WIDTH = 512  # of a head: a row of queries must fit a lane of the tiles


def can(key_PSGD: Tensor) -> bool:
    """Whether the kernel takes a pool of such keys and values: float32 or bfloat16, in one piece, on a CPU with a compiler."""
    return (
        key_PSGD.device.type == "cpu"
        and key_PSGD.dtype in (torch.float32, torch.bfloat16)
        and key_PSGD.is_contiguous()
        and key_PSGD.shape[-1] <= MOST_WIDTH
        and load() is not None
    )


def attend(
    query_PHTD: Tensor,
    new_key_PGTD: Tensor,
    new_value_PGTD: Tensor,
    key_PSGD: Tensor,
    value_PSGD: Tensor,
    sequence_N4: NDArray[np.int64],
    table_U: NDArray[np.int32],
    *,
    block_tokens: int,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Write the step's keys and values to their slots, then let each row attend to its sequence up to itself.

    Args:
        query_PHTD, new_key_PGTD, new_value_PGTD: of the step's rows, in the pool's type or one that is cast to it.
        key_PSGD, value_PSGD: one layer of the pool, see `can`; written to.
        sequence_N4: (first row, rows, positions stored before, where its blocks begin in ``table_U``) of each sequence.
        table_U: numbers of the blocks of all sequences.
        block_tokens: slots of a block.
        prefix: (key_PGMD, value_PGMD) in front of every sequence.

    Returns:
        y_PHTD in the query's type, laid out [P, T, H, D].
    """
    library = load()
    assert library is not None, "callers ask can first"
    dtype = key_PSGD.dtype
    query, new_key, new_value = (_rows(part, dtype) for part in (query_PHTD, new_key_PGTD, new_value_PGTD))
    streams, heads, rows, width = query.shape
    y_PHTD = torch.empty(streams, rows, heads, width, dtype=dtype).transpose(1, 2)
    front = () if prefix is None else tuple(part_PGMD.to(dtype).contiguous() for part_PGMD in prefix)
    tensors = (query, new_key, new_value, y_PHTD, key_PSGD, value_PSGD, *front)
    pointers = [part.data_ptr() for part in tensors] + [0] * (8 - len(tensors))
    strides = [stride for part in tensors[:4] for stride in part.stride()[:3]]
    num_front = front[0].shape[2] if front else 0
    sizes = (
        streams, rows, len(sequence_N4), heads, new_key.shape[1], width, num_front, key_PSGD.shape[1], block_tokens,
    )  # fmt: skip
    library.anabranch_paged_attention(
        int(dtype == torch.bfloat16),
        (ctypes.c_void_p * 8)(*pointers),
        (ctypes.c_int64 * 12)(*strides),
        ctypes.c_void_p(sequence_N4.ctypes.data),
        ctypes.c_void_p(table_U.ctypes.data),
        (ctypes.c_int64 * 9)(*sizes),
        ctypes.c_float(width**-0.5),
        torch.get_num_threads(),
    )
    return y_PHTD.to(query_PHTD.dtype)


def _rows(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, its last dimension in one piece."""
    part = part.to(dtype)
    return part if part.stride(-1) == 1 else part.contiguous()
