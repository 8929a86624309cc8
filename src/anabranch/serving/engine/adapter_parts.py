"""What an adapter in memory has for one part of a matrix, by kind: what it adds to what the matrix makes of the rows that use it.

    LoRA           s B A x
    DoRA           (g - 1) W x + g s B A x,  g = m / |W + s B A| by row, which is made once, when the adapter is read
    IA3            (l - 1) (W x + b),  or of inputs W (l x) - W x

So each kind is in a sum with weights, and with the others. g and l are in float32, as peft keeps them, A and B as the engine does.
"""
# Shapes: M rows, C inputs, O outputs, R rank

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters import Pair
from anabranch.adapters.dora import Decomposed, lengths
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.scaling import Scale
from anabranch.errors import AnabranchError, ConfigError

__all__ = ["SERVED", "Factors", "LowRankPart", "PartRows", "ServedPart", "Turned", "part_bytes", "part_of"]

# Kinds of `anabranch.adapters.numbers.Numbers` that rows can choose.
SERVED: tuple[type[Numbers], ...] = (Pair, Decomposed, Scale)


def _not_served(*given: Any) -> Tensor:
    raise AnabranchError("an adapter asks for what its place does not give; its reader should have refused it")


@dataclass(frozen=True)
class PartRows:
    """Some rows at one part of a matrix.

    Attributes:
        x_MC: what goes in.
        made: gives y_MO, what the part makes of it, without any adapter.
        of: what it makes of another x_MC.
        group: of these rows, for layers, and ``x_1MC``: x_MC as these get it, one tensor for all parts of a matrix, by which routers that
            the parts share know that they have decided. None where the rows use no layers.

    Where there is no ``made`` or ``of``, what needs them is not served.
    """

    x_MC: Tensor
    made: Callable[[], Tensor] = _not_served
    of: Callable[[Tensor], Tensor] = _not_served
    group: Any = None
    x_1MC: Tensor | None = None


class ServedPart(Protocol):
    """Interface of a kind."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""

    def added(self, rows: PartRows) -> Tensor:
        """``[M, O]``, in the type of its numbers."""


class LowRankPart(NamedTuple):
    """LoRA, as the compiled step reads it: A ``[R, C]``, B transposed ``[R, O]``, both float32 or bfloat16, and s."""

    a_RC: Tensor
    b_RO: Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        """Of A and B."""
        return self.a_RC.nbytes + self.b_RO.nbytes

    def added(self, rows: PartRows) -> Tensor:
        """See `ServedPart`."""
        return torch.matmul(F.linear(rows.x_MC.to(self.a_RC.dtype), self.a_RC), self.b_RO) * self.scale


@dataclass(frozen=True, eq=False)
class Turned:
    """DoRA: g, and the bias of the part, which is not turned."""

    low: LowRankPart
    gain_O: Tensor
    bias_O: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of A, B and g."""
        return self.low.nbytes + self.gain_O.nbytes

    def added(self, rows: PartRows) -> Tensor:
        """See `ServedPart`."""
        y_MO = rows.made()
        plain_MO = (y_MO if self.bias_O is None else y_MO - self.bias_O.to(y_MO.dtype)).to(self.gain_O.dtype)
        return (self.gain_O - 1) * plain_MO + self.gain_O * self.low.added(rows)


@dataclass(frozen=True, eq=False)
class Factors:
    """IA3: l of what comes out of the part, or of what goes into it."""

    factor_F: Tensor
    is_input: bool

    @property
    def nbytes(self) -> int:
        """Of l."""
        return self.factor_F.nbytes

    def added(self, rows: PartRows) -> Tensor:
        """See `ServedPart`."""
        kind = self.factor_F.dtype
        if not self.is_input:
            return (self.factor_F - 1) * rows.made().to(kind)
        x_MC = (rows.x_MC.to(kind) * self.factor_F).to(rows.x_MC.dtype)
        return rows.of(x_MC).to(kind) - rows.made().to(kind)


def part_of(
    numbers: Any, device: torch.device, dtype: torch.dtype, matrix: Callable[[], tuple[Tensor, Tensor | None]]
) -> ServedPart:
    """The numbers of one part as they are served.

    Args:
        numbers: of a kind of `SERVED`.
        device: where they shall be.
        dtype: of A and B.
        matrix: gives (W, b) of the part; called where they are needed.

    Raises ConfigError for numbers of DoRA that make no length of a row, as with a row of zeros.
    """

    def kept(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return tensor.detach().to(device, dtype).contiguous()

    if isinstance(numbers, Scale):
        return Factors(kept(numbers.factor_F), numbers.is_input)
    pair = numbers.pair if isinstance(numbers, Decomposed) else numbers
    low = LowRankPart(kept(pair.a_RC, dtype), kept(pair.b_OR.T, dtype), pair.scale)
    if not isinstance(numbers, Decomposed):
        return low
    weight_OC, bias_O = matrix()
    gain_O = kept(numbers.magnitude_O) / lengths(pair.on(weight_OC.detach().float()))
    if not gain_O.isfinite().all():
        raise ConfigError("a row of the matrix with the adapter has no length, so DoRA cannot give it another")
    return Turned(low, gain_O, None if bias_O is None else bias_O.detach())


def part_bytes(numbers: Any, dtype: torch.dtype) -> int:
    """What `part_of` takes in memory."""
    if isinstance(numbers, Scale):
        return numbers.factor_F.numel() * torch.float32.itemsize
    pair = numbers.pair if isinstance(numbers, Decomposed) else numbers
    gain = numbers.magnitude_O.numel() * torch.float32.itemsize if isinstance(numbers, Decomposed) else 0
    return int((pair.a_RC.numel() + pair.b_OR.numel()) * dtype.itemsize + gain)
