"""The adapters of one forward pass: which row uses which mixture, and what a mixture adds to a part of a matrix."""
# Shapes: T tokens of a pass, N = P T items of a layer, P streams, M rows of one mixture, O outputs

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import AnabranchError
from anabranch.routing.context import OfPass
from anabranch.serving.engine.adapter_parts import PartRows, ServedPart

__all__ = ["Mixed", "PassAdapters", "ServedAdapter", "of_items"]

# In a context's state: the mixture of each item, and the pass's `PassAdapters`.
_INDEX, _PASS = "served_adapters.index", "served_adapters.pass"
_EXPERTS = ".experts."


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter in memory, of no model in particular.

    Attributes:
        parts: what it has for each part of a linear layer that it adapts, by our names (``blocks.3.attention.q``).
        version: equal where all numbers are.
    """

    parts: Mapping[str, ServedPart]
    version: str

    @property
    def nbytes(self) -> int:
        """Of all numbers."""
        return sum(part.nbytes for part in self.parts.values())

    @cached_property
    def pools(self) -> frozenset[str]:
        """Names of the pools of experts that it adapts."""
        return frozenset(f"{name.split(_EXPERTS)[0]}.experts" for name in self.parts if _EXPERTS in name)


# A request's adapters with their weights.
Mixed = tuple[tuple[ServedAdapter, float], ...]


@dataclass(eq=False)
class PassAdapters:
    """The adapters of one forward pass.

    Attributes:
        mixtures: those that differ.
        number_T: of each token its mixture; -1 for none.
    """

    mixtures: list[Mixed] = field(default_factory=list)
    number_T: list[int] = field(default_factory=list)
    # By the index tensor that a layer was given, which is kept, so that no other takes its place in memory.
    _groups: dict[int, tuple[Tensor, list[tuple[int, Tensor | None]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, mixed: Sequence[Mixed], counts: Sequence[int]) -> "PassAdapters":
        """That of requests with these adapters, and so many tokens each, in order."""
        made, numbers = cls(), dict[Any, int]()
        for one, count in zip(mixed, counts, strict=True):
            number = -1
            if one:
                key = tuple((id(adapter), weight) for adapter, weight in one)
                number = numbers.setdefault(key, len(made.mixtures))
                if number == len(made.mixtures):
                    made.mixtures.append(one)
            made.number_T += [number] * count
        return made

    def state(self, streams: int, device: torch.device) -> dict[str, Any]:
        """For the context of the pass."""
        index_1T = torch.tensor([self.number_T], dtype=torch.int64, device=device)
        return {_INDEX: index_1T.expand(streams, -1), _PASS: OfPass(self)}

    def groups(self, index: Tensor) -> list[tuple[int, Tensor | None]]:
        """Each mixture with its rows, None for all; found once for all layers that see the same items."""
        kept = self._groups.get(id(index))
        if kept is None or kept[0] is not index:
            flat_N = index.reshape(-1)
            found: list[tuple[int, Tensor | None]] = []
            for number in sorted(set(flat_N.tolist())):
                if number >= 0:
                    is_own_N = flat_N == number
                    found.append((number, None if bool(is_own_N.all()) else is_own_N.nonzero().flatten()))
            kept = self._groups[id(index)] = index, found
        return kept[1]

    def adapts_experts(self, number: int, pool: str) -> bool:
        """Whether a mixture has parts of the experts of a pool."""
        return any(pool in adapter.pools for adapter, _ in self.mixtures[number])

    def delta(self, number: int, part: str, rows: PartRows) -> Tensor | None:
        """delta_MO: what a mixture adds to a part of a matrix, of ``rows`` that are its own, in the adapters' type; None for nothing."""
        total: Tensor | None = None
        for adapter, weight in self.mixtures[number]:
            own = adapter.parts.get(part)
            if own is None:
                continue
            own_MO = own.added(rows)
            own_MO = own_MO if weight == 1 else own_MO * weight
            total = own_MO if total is None else total + own_MO
        return total


def of_items(context: Any, num_items: int) -> tuple[PassAdapters, Tensor]:
    """(the adapters of the pass, the mixture of each item) that a layer is called with. Raises AnabranchError where nobody says."""
    state = {} if context is None else context.state
    if _PASS not in state:
        raise AnabranchError("a layer is called without the context of its pass, so nobody knows whose rows these are")
    adapters, index = state[_PASS].value, state[_INDEX]
    if index.numel() != num_items:
        raise AnabranchError(
            f"a layer sees {num_items} of the {index.numel()} items of a pass, so nobody knows whose they are"
        )
    return adapters, index
