"""Blocks of 256 weights whose scales are small integers under a scale of their own (llama.cpp's K types), in panels of 16 rows.

    q4_k, q5_k    w = (d s) u - (e m) of every 32 weights: u of 4 or 5 bits, s and m of 6, d and e fp16 of the whole block
    q6_k          w = (d s) (u - 32) of every 16 weights: u of 6 bits, s a signed byte, d fp16 of the whole block

What is stored is kept to the bit; the layout is that of `kernels/packed.h`.
"""
# Shapes: N rows, K columns, S = K / 256 blocks of a row, P panels of 16 rows

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BITS_OF", "BLOCK", "SuperKind", "arranged", "block_bytes", "lanes_of", "unpack_blocks"]

SuperKind = Literal["q4_k", "q5_k", "q6_k"]
BITS_OF: dict[str, int] = {"q4_k": 4, "q5_k": 5, "q6_k": 6}

# Weights of a block, and of a part of it whose bits lie together.
BLOCK, PART = 256, 32
_ROWS = 16


def block_bytes(kind: str) -> int:
    """Of one block of 16 rows: numbers, then scales."""
    return _ROWS * BLOCK * BITS_OF[kind] // 8 + (_ROWS * 18 if kind == "q6_k" else _ROWS * 20)


def arranged(pieces: Sequence[Tensor]) -> Tensor:
    """Panels ``[P, bytes]`` of rows whose blocks hold ``pieces`` one after the other.

    They are of the integers of `anabranch.nn.packed` too, whose blocks are groups.

    Args:
        pieces: ``[N, S, steps]``: numbers of one, two or four bytes are what a row has in a step.
    """
    made = [_panels(piece).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2) for piece in pieces]
    return torch.cat(made, dim=-1).flatten(1)


def unpack_blocks(kind: str, data_EPX: Tensor, rows: int, *, wide: int = _ROWS) -> Tensor:
    """The float32 weights ``[E, N, K]`` of panels ``[E, P, bytes]`` of ``wide`` rows each, see `lanes_of`."""
    bits, blocks = BITS_OF[kind], data_EPX.unflatten(-1, (-1, block_bytes(kind) // _ROWS * wide))
    numbers = wide * BLOCK * bits // 8
    body, side = blocks.split([numbers, blocks.shape[-1] - numbers], dim=-1)
    # Experts, panels, blocks, parts, steps (of high bits after those of low ones), rows, places.
    steps = body.unflatten(-1, (BLOCK // PART, bits, wide, 4))
    low = torch.stack((steps[..., :4, :, :] & 15, steps[..., :4, :, :] >> 4), dim=-2)
    if kind == "q5_k":
        high = torch.stack([steps[..., 4, :, :] >> shift & 1 for shift in range(8)], dim=-2)
        low = low | (high.unflatten(-2, (4, 2)).movedim(-3, -4) << 4)
    elif kind == "q6_k":
        high = torch.stack([steps[..., 4:, :, :] >> shift & 3 for shift in range(0, 8, 2)], dim=-2)
        low = low | (high.unflatten(-2, (2, 2)).movedim(-3, -4).flatten(-5, -4) << 4)
    # To rows first: [E, P, rows, S, K of a block].
    number = low.movedim(-3, 2).flatten(-4).float()
    if kind == "q6_k":
        scale, whole = side.split([wide * 16, wide * 2], dim=-1)
        step = _of_rows(scale.contiguous().view(torch.int8), wide)
        step = step * _of_rows(whole.contiguous().view(torch.float16), wide)
        value = ((number - 32).unflatten(-1, (16, 16)) * step.unsqueeze(-1)).flatten(-2)
    else:
        scale, least, whole = side.split([wide * 8, wide * 8, wide * 4], dim=-1)
        both = _of_rows(whole.contiguous().view(torch.float16), wide)
        step, shift = _of_rows(scale, wide) * both[..., :1], _of_rows(least, wide) * both[..., 1:]
        value = (number.unflatten(-1, (8, PART)) * step.unsqueeze(-1) - shift.unsqueeze(-1)).flatten(-2)
    return value.flatten(-2).flatten(1, 2)[:, :rows].contiguous()


def lanes_of(kind: str, data_PX: Tensor, panel_T: Tensor, lane_T: Tensor) -> Tensor:
    """Single rows of panels ``[P, bytes]``, as panels ``[T, bytes / 16]`` of one row each."""
    blocks = data_PX.unflatten(-1, (-1, block_bytes(kind)))
    numbers = _ROWS * BLOCK * BITS_OF[kind] // 8
    # A step of four numbers of each row, scales of each row, then scales over these, of two bytes or two times two.
    ends = [numbers, *([numbers + _ROWS * 16] if kind == "q6_k" else [numbers + _ROWS * 8, numbers + _ROWS * 16])]
    sizes = [4, 1, 2] if kind == "q6_k" else [4, 1, 1, 2]
    parts = [
        part.unflatten(-1, (-1, _ROWS, size))[panel_T, :, :, lane_T].flatten(-2)
        for part, size in zip(blocks.tensor_split(ends, dim=-1), sizes, strict=True)
    ]
    return torch.cat(parts, dim=-1).flatten(1)


def _of_rows(side: Tensor, wide: int) -> Tensor:
    """Scales ``[E, P, S, n 16]`` as float32 ``[E, P, 16, S, n]``."""
    return side.unflatten(-1, (-1, wide)).movedim(-1, 2).float()


def _panels(x_NX: Tensor) -> Tensor:
    """``[N, ...]`` as ``[P, 16, ...]``, with rows of zeros behind the last."""
    missing = -x_NX.shape[0] % _ROWS
    if missing:
        x_NX = torch.cat((x_NX, x_NX.new_zeros(missing, *x_NX.shape[1:])))
    return x_NX.unflatten(0, (-1, _ROWS))
