"""The compiled attention over a paged key-value cache, behind tensors."""
# Shapes: P streams, T rows of a step, H query heads, G key heads, D head width, M entries in front, S slots, N sequences, U block numbers

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.operands import takes

__all__ = ["attend", "can"]

# Of a head: a row of queries must fit a lane of the tiles.
MOST_WIDTH = 512

ATTENTION = Kernel(
    "anabranch_paged_attention",
    """types, query: item[P, H, T, D] rows, new_key: item[P, G, T, D] rows, new_value: item[P, G, T, D] rows,
    y: item[P, H, T, D] rows out, key: item[P, S, G, D] out, value: item[P, S, G, D] out, front_key: item[P, G, M, D]?,
    front_value: item[P, G, M, D]?, strides(query, new_key, new_value, y), sequence: int64[N, 4] array, table: int32[U] array,
    P, T, N, H, G, D, M: int64, S, U, block_tokens: int64, scale: float, threads""",
    types={("float32",): 0, ("bfloat16",): 1},
    where=(f"0 < D <= {MOST_WIDTH}", "G > 0", "H % G == 0"),
    result="status",
)


def can(key_PSGD: Tensor) -> bool:
    """Whether the kernel takes a pool of such keys and values: float32 or bfloat16, in one piece, on a CPU with a compiler."""
    return (
        takes(key_PSGD)
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

    Raises:
        InputError: a sequence or a block that is none of the step's or the pool's.
        CapacityError: no memory to work in.
    """
    dtype = key_PSGD.dtype
    query, new_key, new_value = (_rows(part, dtype) for part in (query_PHTD, new_key_PGTD, new_value_PGTD))
    streams, heads, rows, width = query.shape
    y_PHTD = torch.empty(streams, rows, heads, width, dtype=dtype).transpose(1, 2)
    front = (None, None) if prefix is None else tuple(part_PGMD.to(dtype).contiguous() for part_PGMD in prefix)
    num_front = 0 if front[0] is None else front[0].shape[2]
    ATTENTION(
        query,
        new_key,
        new_value,
        y_PHTD,
        key_PSGD,
        value_PSGD,
        *front,
        sequence_N4,
        table_U,
        num_front,
        block_tokens,
        width**-0.5,
    )
    return y_PHTD.to(query_PHTD.dtype)


def _rows(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, its last dimension in one piece."""
    part = part.to(dtype)
    return part if part.stride(-1) == 1 else part.contiguous()
