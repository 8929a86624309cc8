"""Blocks of GGUF files in the layout of our own products, to the bit: the numbers, scales and minima that are stored."""
# Shapes: N rows (outputs), K depth (inputs), G = K / 32 blocks of a row

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.lm.gguf import GgufFile, half_split
from anabranch.nn.packed import Kind, Packed
from anabranch.nn.superblocks import BITS_OF, BLOCK, pack_blocks

__all__ = ["BLOCKS", "is_mixed", "kept_form", "packed_rows", "superblocks_of"]

# Weights of a block.
SIZE = 32
BLOCKS: dict[str, Kind] = {
    "Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8", "Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k",
}  # fmt: skip
# Bytes of a block of those with superblocks.
_BYTES = {"q4_k": 144, "q5_k": 176, "q6_k": 210}


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
    if like.kind in BITS_OF:
        return _superblocks(file, names, like.kind)
    found = [_blocks(file.kind(name), *file.raw(name)) for name in names]
    number_NK, scale_NG, least_NG = (torch.cat(part) for part in zip(*found, strict=True))
    return Packed.of_integers(number_NK, scale_NG, least_NG, like.kind).data[0]


def _superblocks(file: GgufFile, names: Sequence[str], kind: Any) -> Tensor:
    found = []
    for name in names:
        data, heads = file.raw(name)
        parts = [part for part in superblocks_of(kind, data) if part is not None]
        found.append(parts if heads is None else [half_split(part, heads) for part in parts])
    number, scales, *leasts, wholes = (torch.cat(part) for part in zip(*found, strict=True))
    return pack_blocks(kind, number, scales, leasts[0] if leasts else None, wholes)


def superblocks_of(kind: str, stored: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(number_NK, scales, leasts, wholes) of `pack_blocks` of the bytes of rows, as ggml-quants.c has them."""
    blocks = torch.from_numpy(np.array(stored, dtype=np.uint8)).unflatten(-1, (-1, _BYTES[kind]))
    if kind == "q6_k":
        low, high, scales, whole = blocks.split([128, 64, 16, 2], dim=-1)
        # Halves of 128 weights: 64 bytes with the low bits of two times 64, 32 bytes with the high ones of four times 32.
        low = low.unflatten(-1, (2, 1, 64)) >> torch.tensor([[0], [4]], dtype=torch.uint8) & 15
        high = high.unflatten(-1, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
        number = low.flatten(-2).unflatten(-1, (4, 32)) | (high << 4)
        return number.flatten(1), scales.contiguous().view(torch.int8), None, whole.contiguous().view(torch.float16)
    whole, scale, rest = blocks.split([4, 12, _BYTES[kind] - 16], dim=-1)
    # Six bits each: the first four whole, with two high bits of the last four above them, whose low bits follow.
    first, second, last = scale.split([4, 4, 4], dim=-1)
    scales = torch.cat((first & 63, (last & 15) | (first >> 2 & 48)), dim=-1)
    leasts = torch.cat((second & 63, (last >> 4) | (second >> 2 & 48)), dim=-1)
    fifth, nibbles = rest[..., :-128], rest[..., -128:]
    number = nibbles.unflatten(-1, (4, 1, 32)) >> torch.tensor([[0], [4]], dtype=torch.uint8) & 15
    number = number.flatten(-3, -2)
    if kind == "q5_k":
        number = number | ((fifth.unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(-1) & 1) << 4)
    return number.flatten(1), scales, leasts, whole.contiguous().view(torch.float16)


def _blocks(kind: str, stored: Any, heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(number_NK, scale_NG, least_NG) of the bytes of one tensor; rows of ``heads`` heads in our order."""
    bytes_NGX = torch.from_numpy(np.array(stored, dtype=np.uint8)).unflatten(
        -1, (-1, {"Q4_0": 18, "Q4_1": 20}.get(kind, 34))
    )
    scale_NG = bytes_NGX[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if kind == "Q8_0":
        # Two's complement plus 128.
        number_NGS = bytes_NGX[..., 2:] ^ 0x80
        least_NG = torch.zeros_like(scale_NG)
    else:
        nibbles = bytes_NGX[..., -SIZE // 2 :]
        number_NGS = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
        least_NG = -8 * scale_NG if kind == "Q4_0" else bytes_NGX[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    parts = number_NGS.flatten(1), scale_NG, least_NG
    return parts if heads is None else tuple(half_split(part, heads) for part in parts)  # type: ignore[return-value]
