"""`PeftTuner`: a layer of the package peft beside, or around, a matrix of ours.

peft stands around a linear layer of torch; what it stands around here (`Stand`) is our matrix as transformers has it: its own rows of a
fused one, in the order that files have.
"""
# Shapes: O outputs, C inputs

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.numbers import Numbers
from anabranch.adapters.peft_kinds import ByPeft
from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, Rows

__all__ = ["PeftTuner", "Read", "Stand", "TunerNumbers"]

Read = Callable[[], tuple[Tensor, Tensor | None]]


class Stand(nn.Linear):
    """A matrix of a model of ours, for who stands around a linear layer of torch. It has no parameters of its own.

    Args:
        read: gives ``(weight_OC, bias_O)`` of the matrix, as they are now, with outputs in our order.
        order_O: of each output here, which of ours it is; None where they are the same.
        in_dim, out_dim: C and O.
    """

    def __init__(self, read: Read, order_O: Tensor | None, in_dim: int, out_dim: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_dim, out_dim
        self.read, self.order_O = read, order_O

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """weight_OC."""
        weight_OC = self.read()[0]
        return weight_OC if self.order_O is None else weight_OC[self.order_O]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """bias_O."""
        bias_O = self.read()[1]
        return bias_O if self.order_O is None or bias_O is None else bias_O[self.order_O]

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """y; of a pass, whose ``rows`` they are, as it is made there, once for the same x."""
        if rows is None:
            weight_OC, bias_O = self.read()
            y = F.linear(x.to(weight_OC.dtype), weight_OC, bias_O)
        else:
            y = rows.y if x is rows.x else rows.of(x.to(rows.x.dtype))
        return y if self.order_O is None else y.index_select(-1, self.order_O.to(y.device))


@dataclass(frozen=True, eq=False)
class TunerNumbers(Numbers):
    """What peft has for one linear layer.

    Attributes:
        tuner: its layer, around a `Stand`.
        kind: of adapter.
        count: numbers that it has, of what layers share those that it is the first to have.
        order_O: of each of our outputs, which of peft's it is; None where they are the same.
    """

    tuner: Any
    kind: ByPeft
    count: int
    order_O: Tensor | None = None

    what = "an adapter that peft runs"
    holds = "numbers"

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """Whether a matrix can take it in."""
        return self.kind.merges

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(C, O)."""
        base = self.tuner.base_layer
        return base.in_features, base.out_features

    def tensors(self) -> dict[str, Tensor]:
        """None by themselves: what a file has is peft's to say, of all layers together."""
        return {}

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """The same, whose outputs are put into another order behind peft."""
        before_O = torch.arange(self.sizes[1] or 0) if self.order_O is None else self.order_O
        after_O = order(before_O.unsqueeze(1)).squeeze(1)
        is_same = torch.equal(after_O, torch.arange(len(after_O)))
        return replace(self, order_O=None if is_same else after_O)

    def config(self, *, dropout: float = 0.0, learns: bool = False) -> Linear.Config:
        """A `PeftTuner`."""
        return PeftTuner.Config(method=self.kind.name, numbers=self.count)

    @torch.no_grad()
    def merged(self, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What peft makes of a copy of the matrix, in float32 at least. Raises ConfigError where it cannot."""
        if not self.merges:
            return super().merged(weight_OC, bias_O)
        wide = torch.promote_types(weight_OC.dtype, torch.float32)
        theirs_O = None if self.order_O is None else self.order_O.argsort().to(weight_OC.device)
        numbers = [None if each is None or theirs_O is None else each[theirs_O] for each in (weight_OC, bias_O)]
        copy = _linear(
            weight_OC if numbers[0] is None else numbers[0], bias_O if numbers[1] is None else numbers[1], wide
        )
        stand = self.tuner.base_layer
        self.tuner.base_layer = copy
        try:
            self.tuner.merge()
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(f"peft cannot merge {self.kind.name}: {' '.join(str(error).split())}") from None
        finally:
            # The matrix was a copy, so there is nothing to undo.
            self.tuner.merged_adapters.clear()
            self.tuner.base_layer = stand
        found: list[Tensor | None] = [copy.weight.detach(), None if copy.bias is None else copy.bias.detach()]
        if self.order_O is not None:
            order_O = self.order_O.to(weight_OC.device)
            found = [None if each is None else each[order_O] for each in found]
        weight, bias = found
        assert weight is not None
        return weight.to(weight_OC.dtype), None if bias is None or bias_O is None else bias.to(bias_O.dtype)


def _linear(weight_OC: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(weight_OC.shape[1], weight_OC.shape[0], bias=bias_O is not None, device="meta")
    made.weight = nn.Parameter(weight_OC.detach().to(dtype, copy=True), requires_grad=False)
    if bias_O is not None:
        made.bias = nn.Parameter(bias_O.detach().to(dtype, copy=True), requires_grad=False)
    return made


class PeftTuner(Linear, kind="peft_tuner"):
    """What the package peft makes of a matrix's x and y. It is built empty, and computes with what it is given (`put`)."""

    @configclass
    class Config(Linear.Config):
        """Attributes: ``method``, as people write it; ``numbers``, how many it has."""

        is_added = True

        method: str = ""
        numbers: int = 0

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """Its numbers; what peft computes with them is not counted."""
            return Count(self.numbers, self.numbers, 0)

    config: Config

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self._numbers: TunerNumbers | None = None

    @classmethod
    def only_adds(cls) -> bool:
        """Whatever it does to a row, y of that can be had by adding."""
        return True

    def put(self, numbers: Any, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over a layer of peft's."""
        self._numbers = numbers
        self.tuner = numbers.tuner.to(device)
        if not trainable:
            self.tuner.requires_grad_(False)

    def numbers(self) -> Numbers:
        """As they are now."""
        assert self._numbers is not None, "it was built, and nothing put into it"
        return self._numbers

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """What peft's layer makes of x."""
        # peft hands what it is told besides on to what it stands around.
        return self._ordered(self._tuned(rows.x, rows=rows)).to(rows.y.dtype)

    @torch.compiler.disable
    def _tuned(self, x: Tensor, **told: Any) -> Tensor:
        """What peft's layer makes of x. Much of its code is none that can be compiled; in a compiled model it is called as it is."""
        y: Tensor = self.tuner(x, **told)
        return y

    def add_to(self, y: Tensor, x: Tensor, context: Any = None) -> None:
        """As `around`, in place."""
        y.add_(self(x, context).to(y.dtype))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What has to be added to what the matrix makes of x, which is made once more for it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._ordered(self._tuned(x).to(wide.dtype) - self.tuner.base_layer(x).to(wide.dtype))

    def _ordered(self, y: Tensor) -> Tensor:
        order_O = None if self._numbers is None else self._numbers.order_O
        return y if order_O is None else y.index_select(-1, order_O.to(y.device))

    def extra_repr(self) -> str:
        """The method, for ``print(model)``."""
        return f"method={self.config.method}"
