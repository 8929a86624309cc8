"""Blocks of GGUF files in the layout of our own products, to the bit: the numbers, scales and minima that are stored."""
# Shapes: N rows (outputs), K depth (inputs), G = K / 32 blocks of a row

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.lm.gguf import GgufFile, half_split
from anabranch.nn.packed import Kind, Packed

__all__ = ["BLOCKS", "kept_form", "packed_rows"]

# Weights of a block.
SIZE = 32
BLOCKS: dict[str, Kind] = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}


def kept_form(file: GgufFile, names: Sequence[str], bits: str) -> tuple[Kind, int] | None:
    """(kind, group) of a matrix that stays as the tensors ``names`` are stored, where ``bits`` are asked for; None if it does not.

    That takes one type of blocks in all of them, with int8 one of eight bits.
    """
    kinds = {file.kind(name) for name in names}
    kind = kinds.pop()
    if kinds or kind not in BLOCKS or (bits == "int8" and BLOCKS[kind] != "int8"):
        return None
    return BLOCKS[kind], SIZE


def packed_rows(file: GgufFile, names: Sequence[str], like: Packed) -> Tensor:
    """Panels ``[P, bytes]`` of one matrix, whose rows are those of the tensors ``names``, in order."""
    found = [_blocks(file.kind(name), *file.raw(name)) for name in names]
    number_NK, scale_NG, least_NG = (torch.cat(part) for part in zip(*found, strict=True))
    return Packed.of_integers(number_NK, scale_NG, least_NG, like.kind).data[0]


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
