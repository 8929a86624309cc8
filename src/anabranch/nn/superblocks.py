"""Blocks of 256 weights whose scales are small integers under a scale of their own (llama.cpp's K types), in panels of 16 rows.

    q4_k, q5_k    w = (d s) u - (e m) of every 32 weights: u of 4 or 5 bits, s and m of 6, d and e fp16 of the whole block
    q6_k          w = (d s) (u - 32) of every 16 weights: u of 6 bits, s a signed byte, d fp16 of the whole block

What is stored is kept to the bit; the layout is that of `kernels/packed.h`.
"""
# Shapes: N rows, K columns, S = K / 256 blocks of a row, P panels of 16 rows

from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["BITS_OF", "BLOCK", "SuperKind", "block_bytes", "pack_blocks", "unpack_blocks"]

SuperKind = Literal["q4_k", "q5_k", "q6_k"]
BITS_OF: dict[str, int] = {"q4_k": 4, "q5_k": 5, "q6_k": 6}

# Weights of a block, and of a part of it whose bits lie together.
BLOCK, PART = 256, 32
_ROWS = 16


def block_bytes(kind: str) -> int:
    """Of one block of 16 rows: numbers, then scales."""
    return _ROWS * BLOCK * BITS_OF[kind] // 8 + (_ROWS * 18 if kind == "q6_k" else _ROWS * 20)


def pack_blocks(kind: SuperKind, number_NK: Tensor, scales: Tensor, leasts: Tensor | None, wholes: Tensor) -> Tensor:
    """Panels ``[P, bytes]``.

    Args:
        kind: one of the above.
        number_NK: u, uint8.
        scales: s, uint8 ``[N, S, 8]``, of q6_k int8 ``[N, S, 16]``.
        leasts: m likewise; None for q6_k.
        wholes: fp16 ``[N, S, 2]``, d and e, of q6_k ``[N, S, 1]``.

    Raises ConfigError for rows that are not whole blocks.
    """
    if number_NK.shape[1] % BLOCK:
        raise ConfigError(f"a row of {number_NK.shape[1]} weights is not a multiple of {BLOCK}; it cannot be {kind}")
    # Panels, rows, blocks, parts; then four steps, the halves of a byte, its place of four.
    number = _panels(number_NK).unflatten(-1, (-1, BLOCK // PART, 4, 2, 4))
    low = number & 15
    bodies = [_columns(low[..., 0, :] | (low[..., 1, :] << 4))]
    high = number >> 4
    if kind == "q5_k":
        bodies.append(_columns(_joined(high.flatten(-3, -2), 1).unsqueeze(-2)))
    elif kind == "q6_k":
        bodies.append(_columns(_joined(high.unflatten(-3, (2, 2)).flatten(-3, -2), 2)))
    body = torch.cat([part.flatten(-3) for part in bodies], dim=-1).flatten(-2)
    sides = [
        _panels(side).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(-2)
        for side in _sides(scales, leasts, wholes)
    ]
    return torch.cat((body, *sides), dim=-1).flatten(1).contiguous()


def unpack_blocks(kind: str, data_EPX: Tensor, rows: int) -> Tensor:
    """The float32 weights ``[E, N, K]`` of panels ``[E, P, bytes]``."""
    bits, blocks = BITS_OF[kind], data_EPX.unflatten(-1, (-1, block_bytes(kind)))
    body, side = blocks.split([_ROWS * BLOCK * bits // 8, blocks.shape[-1] - _ROWS * BLOCK * bits // 8], dim=-1)
    # Experts, panels, blocks, parts, steps (of high bits after those of low ones), rows, places.
    steps = body.unflatten(-1, (BLOCK // PART, bits, _ROWS, 4))
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
        scale, whole = side.split([_ROWS * 16, _ROWS * 2], dim=-1)
        step = _of_rows(scale.contiguous().view(torch.int8)) * _of_rows(whole.contiguous().view(torch.float16))
        value = ((number - 32).unflatten(-1, (16, 16)) * step.unsqueeze(-1)).flatten(-2)
    else:
        scale, least, whole = side.split([_ROWS * 8, _ROWS * 8, _ROWS * 4], dim=-1)
        both = _of_rows(whole.contiguous().view(torch.float16))
        step, shift = _of_rows(scale) * both[..., :1], _of_rows(least) * both[..., 1:]
        value = (number.unflatten(-1, (8, PART)) * step.unsqueeze(-1) - shift.unsqueeze(-1)).flatten(-2)
    return value.flatten(-2).flatten(1, 2)[:, :rows].contiguous()


def _sides(scales: Tensor, leasts: Tensor | None, wholes: Tensor) -> list[Tensor]:
    return [scales, wholes] if leasts is None else [scales, leasts, wholes]


def _joined(values: Tensor, bits: int) -> Tensor:
    """Values ``[..., n, 4]`` of so many bits, n of them in a byte, the first lowest."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return (values << shifts).sum(-2, dtype=torch.int32).to(torch.uint8)


def _columns(x: Tensor) -> Tensor:
    """``[P, 16, S, parts, steps, 4]`` with the rows before the last."""
    return x.movedim(1, -2)


def _of_rows(side: Tensor) -> Tensor:
    """Scales ``[E, P, S, n 16]`` as float32 ``[E, P, 16, S, n]``."""
    return side.unflatten(-1, (-1, _ROWS)).movedim(-1, 2).float()


def _panels(x_NX: Tensor) -> Tensor:
    """``[N, ...]`` as ``[P, 16, ...]``, with rows of zeros behind the last."""
    missing = -x_NX.shape[0] % _ROWS
    if missing:
        x_NX = torch.cat((x_NX, x_NX.new_zeros(missing, *x_NX.shape[1:])))
    return x_NX.unflatten(0, (-1, _ROWS))
