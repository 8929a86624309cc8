"""Blocks of GGUF files in the layout of our own products, to the bit: the numbers, scales and minima that are stored."""
# Shapes: N rows (outputs), K depth (inputs), G = K / 32 blocks of a row

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.lm.gguf import GgufFile, half_split
from anabranch.nn.fp4 import half_powers
from anabranch.nn.packed import Kind, Packed
from anabranch.nn.superblocks import BITS_OF, BLOCK, arranged

__all__ = ["BLOCKS", "is_mixed", "kept_form", "packed_rows", "pieces_of"]

# Weights of a block.
SIZE = 32
BLOCKS: dict[str, Kind] = {
    "Q4_0": "int4",
    "Q4_1": "int4",
    "Q8_0": "int8",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "MXFP4": "fp4",
}
# Bytes of a block.
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "MXFP4": 17}


def kept_form(file: GgufFile, names: Sequence[str], bits: str) -> tuple[Kind, int] | None:
    """(kind, group) of a matrix that stays as the tensors ``names`` are stored, where ``bits`` are asked for; None if it does not.

    That takes blocks of one form in all of them, with int8 one of eight bits.
    """
    forms = {BLOCKS.get(file.kind(name)) for name in names}
    form = forms.pop()
    if forms or form is None or (bits == "int8" and form != "int8"):
        return None
    return form, BLOCK if form in BITS_OF else SIZE


def is_mixed(file: GgufFile, names: Sequence[str]) -> bool:
    """Whether the tensors of a matrix are stored in blocks of several forms, some of more bits than others."""
    forms = {BLOCKS.get(file.kind(name)) for name in names}
    return len(forms) > 1 and None not in forms


def packed_rows(file: GgufFile, names: Sequence[str], like: Packed) -> Tensor:
    """Panels ``[P, bytes]`` of one matrix, whose rows are those of the tensors ``names``, in order."""
    found = []
    for name in names:
        data, heads = file.raw(name)
        rows_NX = torch.from_numpy(data)
        found.append(pieces_of(file.kind(name), rows_NX if heads is None else half_split(rows_NX, heads)))
    return arranged([torch.cat(parts) for parts in zip(*found, strict=True)])


def pieces_of(kind: str, rows_NX: Tensor) -> list[Tensor]:
    """What `arranged` makes panels of: the bytes of rows as ggml-quants.c has them, in the order of `kernels/packed.h`, to the bit."""
    blocks = rows_NX.unflatten(-1, (-1, _BYTES[kind]))
    if kind == "Q6_K":
        return _six_bits(*blocks.split([128, 64, 16, 2], dim=-1))
    if kind in ("Q4_K", "Q5_K"):
        return _with_minima(*blocks.split([4, 12, _BYTES[kind] - 16], dim=-1))
    if kind == "MXFP4":
        scale = half_powers(blocks[..., :1])
        return [_halves(blocks), scale, torch.zeros_like(scale)]
    scale = _as(torch.float16, blocks[..., :2])
    if kind == "Q8_0":
        # Two's complement plus 128.
        return [_as(torch.int32, blocks[..., 2:] ^ 0x80), scale, torch.zeros_like(scale)]
    return [_halves(blocks), scale, -8 * scale if kind == "Q4_0" else _as(torch.float16, blocks[..., 2:4])]


def _halves(blocks: Tensor) -> Tensor:
    """The numbers of blocks that end in 16 bytes of them: of 32 the first half is in the low bits."""
    return torch.cat(_nibbles(_as(torch.int32, blocks[..., -SIZE // 2 :]).unflatten(-1, (2, 2))), dim=-1)


def _as(dtype: torch.dtype, stored: Tensor) -> Tensor:
    """Bytes as numbers of several: four at once are quicker than one by one."""
    return stored.contiguous().view(dtype)


def _nibbles(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of int32 ``[..., 2]`` the numbers in the low and in the high bits of each byte, as bytes that hold a step: column k below k + 4."""
    first, second = pairs.unbind(-1)
    low, high = _each_byte(0x0F), ~_each_byte(0x0F)
    return (first & low) | (second << 4 & high), (first >> 4 & low) | (second & high)


def _each_byte(value: int) -> int:
    """An int32 whose bytes are all of this value, below 128."""
    return value * 0x01010101


def _with_minima(whole: Tensor, scale: Tensor, rest: Tensor) -> list[Tensor]:
    # Six bits each: the first four whole, with two high bits of the last four above them, whose low bits follow.
    first, second, last = scale.split([4, 4, 4], dim=-1)
    scales = torch.cat((first & 63, (last & 15) | (first >> 2 & 48)), dim=-1)
    leasts = torch.cat((second & 63, (last >> 4) | (second >> 2 & 48)), dim=-1)
    fifth, bits = rest[..., :-128], _as(torch.int32, rest[..., -128:])
    # Two parts of 32 in each 32 bytes, of four steps.
    body = torch.stack(_nibbles(bits.unflatten(-1, (4, 4, 2))), dim=-2).flatten(-3, -2)
    if fifth.shape[-1]:
        # Bit p is of part p; of column 4 i + j it goes to bit i of byte j.
        columns = _as(torch.int32, fifth).unbind(-1)
        high = torch.stack([_gathered(columns, part, 1) for part in range(8)], dim=-1)
        body = torch.cat((body, high.unsqueeze(-1)), dim=-1)
    return [body.flatten(-2), scales, leasts, _as(torch.float16, whole)]


def _six_bits(low: Tensor, high: Tensor, scales: Tensor, whole: Tensor) -> list[Tensor]:
    # Halves of 128 weights: 64 bytes with the low bits of two times 64, 32 bytes with the high ones of four times 32.
    body = torch.cat(_nibbles(_as(torch.int32, low).unflatten(-1, (2, 2, 4, 2))), dim=-2)
    columns = _as(torch.int32, high).unflatten(-1, (2, 2, 4)).unbind(-1)
    tops = torch.stack([_gathered(columns, 2 * part, 2) for part in range(4)], dim=-2)
    return [torch.cat((body, tops), dim=-1).flatten(-3), scales, _as(torch.float16, whole)]


def _gathered(columns: Sequence[Tensor], shift: int, bits: int) -> Tensor:
    """So many bits of each byte of some numbers, those of the first lowest in a byte."""
    made, mask = torch.zeros_like(columns[0]), _each_byte((1 << bits) - 1)
    for place, column in enumerate(columns):
        made |= (column >> shift & mask) << (place * bits)
    return made
