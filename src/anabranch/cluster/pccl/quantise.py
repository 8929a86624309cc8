"""Numbers of a chunk as whole numbers of 8 or 16 bits, and back.

``min_max``: q = round((x - min) / (max - min) * (2^b - 1)), the ends of the range are exact.
``zero_point``: q = round(x / scale) + zero, over a range that holds 0, and 0 is exact.

Two float64 go ahead of a chunk and say how to read it. What both sides make of a chunk is a function of these bytes alone, so every peer
that reads them has the same bits. A chunk with a number that is not finite is NaN as a whole.
"""
# Shapes: X numbers of a chunk

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import InputError

__all__ = ["KINDS", "Quantiser"]

KINDS = ("min_max", "zero_point")
HEAD_BYTES = 16
_BITS = {8: torch.uint8, 16: torch.uint16}


@dataclass(frozen=True)
class Quantiser:
    """How chunks are written.

    Attributes:
        kind: ``min_max`` or ``zero_point``.
        bits: of a number on its way, 8 or 16.

    Raises InputError for others.
    """

    kind: str = "min_max"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"the quantisation is {shown(self.kind)}; use {' or '.join(KINDS)}, or None")
        if self.bits not in _BITS:
            raise InputError(f"bits is {shown(self.bits)}; use 8 or 16")

    @property
    def steps(self) -> int:
        """Between the ends of a range."""
        return int(2**self.bits - 1)

    def size_of(self, count: int) -> int:
        """Bytes of a chunk of so many numbers."""
        return HEAD_BYTES + count * self.bits // 8 if count else 0

    def write(self, value_X: Tensor) -> bytearray:
        """The bytes of a chunk of floating-point numbers."""
        if not value_X.numel():
            return bytearray()
        wide_X = value_X.to(torch.float64 if value_X.dtype == torch.float64 else torch.float32)
        low, high = (float(end) for end in torch.aminmax(wide_X))
        if not (math.isfinite(low) and math.isfinite(high)):
            first, second = math.nan, math.nan
            whole_X = torch.zeros_like(wide_X)
        elif self.kind == "min_max":
            first, second = low, self._step(low, high, value_X.dtype)
            # Where the range itself has no place in the type its halves do; elsewhere the difference is what is exact.
            is_wide = high - low > torch.finfo(wide_X.dtype).max
            shifted_X = (
                wide_X / (second or 1.0) - low / (second or 1.0) if is_wide else (wide_X - low) / (second or 1.0)
            )
            whole_X = shifted_X if second else torch.zeros_like(wide_X)
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            second = self._step(low, high, value_X.dtype)
            first = float(round(-low / second)) if second else 0.0
            whole_X = wide_X / second + first if second else torch.zeros_like(wide_X)
        out = bytearray(self.size_of(value_X.numel()))
        np.frombuffer(out, np.float64, 2)[:] = first, second
        held_X = torch.frombuffer(out, dtype=_BITS[self.bits], offset=HEAD_BYTES)
        held_X.copy_(whole_X.round_().clamp_(0, self.steps))
        return out

    def read(self, data: bytearray | memoryview, dtype: torch.dtype) -> Tensor:
        """``[X]`` numbers of ``dtype`` of what `write` wrote."""
        if not len(data):
            return torch.empty(0, dtype=dtype)
        first, second = np.frombuffer(data, np.float64, 2).tolist()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        whole_X = torch.frombuffer(data, dtype=_BITS[self.bits], offset=HEAD_BYTES).to(wide)
        # Ends are rounded, and may come to lie a little outside of the range, and of the type.
        most = torch.finfo(dtype).max
        if self.kind == "min_max":
            if second * self.steps <= torch.finfo(wide).max:
                return whole_X.mul_(second).add_(first).clamp_(-most, most).to(dtype)
            first = -first / second if second else 0.0
        return whole_X.sub_(first).mul_(second).clamp_(-most, most).to(dtype)

    def _step(self, low: float, high: float, dtype: torch.dtype) -> float:
        # The range of float64 may not fit one; halves do.
        step = high / self.steps - low / self.steps
        # What is next to nothing of float32 would be nothing, and be divided by.
        return step if step >= (1e-300 if dtype == torch.float64 else 1e-37) else 0.0
