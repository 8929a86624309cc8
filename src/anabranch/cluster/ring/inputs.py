"""What programs are given, and what they give."""
# Shapes: B sequences, H query heads, G key heads, L rows, S keys, D head width

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.cluster.ring.kernel import fine_dtype
from anabranch.cluster.ring.link import Handle

__all__ = ["Inputs", "Program", "like_rows"]

# Yields what it waits for, and gives what the pass made.
Program = Generator[Handle, None, tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """What a rank has.

    Attributes:
        query_BHLD, key_BGSD, value_BGSD: its own.
        scale: factor on scores.
        home_dtype: of the results that go home; None for that of `fine_dtype`.
    """

    query_BHLD: Tensor
    key_BGSD: Tensor
    value_BGSD: Tensor
    scale: float
    home_dtype: torch.dtype | None = None

    @property
    def fine(self) -> torch.dtype:
        """Of partial results."""
        return fine_dtype(self.query_BHLD.dtype)


def like_rows(part: Tensor, rows: int) -> Tensor:
    """A tensor without memory, of so many rows of the third dimension."""
    return torch.empty(*part.shape[:2], rows, *part.shape[3:], dtype=part.dtype, device="meta")
