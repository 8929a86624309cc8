"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 numbers of 4 bits with a shared power of two, as gpt-oss stores its experts.

``NAME_blocks`` is uint8 ``[E, rows, blocks, 16]``, two numbers in a byte, the earlier in the low half; ``NAME_scales`` is uint8
``[E, rows, blocks]``, exponents with 127 added. `Unpacked` shows each pair as one tensor ``NAME`` of bfloat16, ``[E, 32 blocks, rows]``,
which is how the same model is stored in floating point.
"""
# Shapes: E experts, R rows, G blocks of a row

from collections.abc import Collection

import torch
from torch import Tensor

from anabranch.lm.tensors import TensorSource
from anabranch.nn.fp4 import half_powers

__all__ = ["Unpacked", "unpack"]

# Of the numbers 0 to 15: a sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCKS, SCALES = "_blocks", "_scales"


def unpack(blocks_ERG16: Tensor, scales_ERG: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The numbers, ``[E, R, 32 G]``; exact in bfloat16 and float32."""
    value = torch.tensor(VALUES, dtype=dtype)
    pair = torch.stack((value[(blocks_ERG16 & 15).long()], value[(blocks_ERG16 >> 4).long()]), dim=-1)
    return torch.ldexp(pair.flatten(-2), scales_ERG.int().unsqueeze(-1) - 127).to(dtype).flatten(-2)


class Unpacked:
    """A `TensorSource` whose MXFP4 tensors are there as they are when unpacked, one at a time; all others as they are stored."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        blocks = [name for name in source.names if name.endswith(BLOCKS)]
        self._packed = {name.removesuffix(BLOCKS) for name in blocks}
        self._packed = {name for name in self._packed if f"{name}{SCALES}" in source.names}
        hidden = {f"{name}{end}" for name in self._packed for end in (BLOCKS, SCALES)}
        self._names = [*(name for name in source.names if name not in hidden), *sorted(self._packed)]

    @property
    def names(self) -> Collection[str]:
        """All names."""
        return self._names

    @property
    def packed(self) -> Collection[str]:
        """Names of those that are stored in MXFP4."""
        return self._packed

    def integers(self, name: str, index: int) -> tuple[Tensor, Tensor]:
        """(code_RK uint8, scale_RG), see `anabranch.nn.fp4`, of one matrix of a stack: the rows that are stored, in their order."""
        blocks_RGH, exponent_RG = (self._source.read_one(f"{name}{end}", index) for end in (BLOCKS, SCALES))
        return torch.stack((blocks_RGH & 15, blocks_RGH >> 4), dim=-1).flatten(1), half_powers(exponent_RG)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        if name not in self._packed:
            return self._source.shape(name)
        experts, rows, groups, half = self._source.shape(f"{name}{BLOCKS}")
        return experts, 2 * groups * half, rows

    def dtype(self, name: str) -> torch.dtype | str:
        """See `TensorSource`."""
        return torch.bfloat16 if name in self._packed else self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        if name not in self._packed:
            return self._source.read(name)
        blocks, scales = (self._source.read(f"{name}{end}") for end in (BLOCKS, SCALES))
        return unpack(blocks, scales).transpose(1, 2)

    def read_one(self, name: str, index: int) -> Tensor:
        """See `TensorSource`."""
        if name not in self._packed:
            return self._source.read_one(name, index)
        blocks, scales = (self._source.read_one(f"{name}{end}", index) for end in (BLOCKS, SCALES))
        return unpack(blocks[None], scales[None])[0].transpose(0, 1)
