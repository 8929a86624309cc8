"""`PartedLinear`: a linear layer whose rows are stored in several kinds of integers, see `anabranch.nn.parts`."""
# Shapes: N rows (outputs), K depth (inputs)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.nn.packed import WIDE, Packed
from anabranch.nn.parts import can_be_parts, linear_of, weights_of
from anabranch.nn.quantize import FewBitLinear

__all__ = ["PartedLinear"]


class PartedLinear(FewBitLinear):
    """y = x W^T + b, where the rows of W are those of ``parts``, one after the other.

    Args:
        parts: two or more matrices of integers with as many columns, of a multiple of 16 rows each.
        bias_N: of all rows.

    Raises:
        ConfigError: parts that are not so.
    """

    def __init__(self, parts: Sequence[Packed], bias_N: Tensor | None = None) -> None:
        super().__init__()
        if not can_be_parts(parts) or parts[0].num_experts != 1:
            sizes = ", ".join(f"[{part.rows}, {part.depth}] in {part.kind}" for part in parts)
            raise ConfigError(
                f"the parts of a matrix are {sizes}; they must be integers with as many columns and a multiple of {WIDE} rows"
            )
        self._likes = [part.with_data(part.data.to("meta")) for part in parts]
        self.put(parts)
        self.register_buffer("bias", None if bias_N is None else bias_N.detach().clone())

    def put(self, parts: Sequence[Packed]) -> None:
        """Use the memory of these, which are of the same sizes, from now on."""
        for number, part in enumerate(parts):
            self.register_buffer(f"data{number}", part.data)

    @property
    def parts(self) -> tuple[Packed, ...]:
        """The weights of each part."""
        return tuple(like.with_data(getattr(self, f"data{number}")) for number, like in enumerate(self._likes))

    @property
    def in_features(self) -> int:
        """K."""
        return self._likes[0].depth

    @property
    def out_features(self) -> int:
        """N."""
        return sum(like.rows for like in self._likes)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """See `FewBitLinear`."""
        return weights_of(self.parts, dtype)[0]

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """``[..., K]`` to ``[..., N]`` in the dtype of ``x``."""
        y_CN = linear_of(self.parts, x.reshape(-1, x.shape[-1]), self.bias)
        return y_CN.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        kinds = ", ".join(f"{like.rows} {like.kind}" for like in self._likes)
        return f"in_features={self.in_features}, out_features={self.out_features}, rows={kinds}"
