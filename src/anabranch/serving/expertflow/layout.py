"""`Layout`: which experts a model has, which layers use them, how large they are, and how a budget of bytes becomes slots.

An *expert* is a place in a pool. Most layers own their pool; layers of ReXMoE share one. Experts of one *kind* have tensors of one shape
and type, so that they fit each other's slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from anabranch.errors import ConfigError


class Expert(NamedTuple):
    """One expert: number of its pool, and of its place in it."""

    pool: int
    number: int


@dataclass(frozen=True)
class Layout:
    """The experts of a model.

    Attributes:
        pool_of_layer: of each routed layer, in the order they run.
        top_k: most experts a token has in each routed layer.
        num_experts: of each pool.
        kind_of_pool: of each pool; experts of one kind fit each other's slots.
        bytes_of_kind: of one expert in fast memory.
    """

    pool_of_layer: tuple[int, ...]
    top_k: tuple[int, ...]
    num_experts: tuple[int, ...]
    kind_of_pool: tuple[int, ...]
    bytes_of_kind: tuple[int, ...]

    @classmethod
    def plain(cls, num_experts: Sequence[int], top_k: int | Sequence[int], expert_bytes: int = 1) -> "Layout":
        """Layers with pools of their own, all experts of one kind."""
        pools = tuple(range(len(num_experts)))
        places = (top_k,) * len(pools) if isinstance(top_k, int) else tuple(top_k)
        return cls(pools, places, tuple(num_experts), (0,) * len(pools), (expert_bytes,))

    @property
    def num_layers(self) -> int:
        """L, routed layers."""
        return len(self.pool_of_layer)

    @property
    def num_kinds(self) -> int:
        """Kinds of experts."""
        return len(self.bytes_of_kind)

    @property
    def max_experts(self) -> int:
        """The largest number of destinations of a layer."""
        return max(self.num_experts)

    def kind(self, expert: Expert) -> int:
        """Kind of an expert."""
        return self.kind_of_pool[expert.pool]

    def bytes(self, expert: Expert) -> int:
        """Size of an expert."""
        return self.bytes_of_kind[self.kind_of_pool[expert.pool]]

    def of_layer(self, layer: int) -> list[Expert]:
        """All destinations of a layer."""
        return list(self.experts_of_pool[self.pool_of_layer[layer]])

    @cached_property
    def experts_of_pool(self) -> list[list[Expert]]:
        """The experts of each pool, made once."""
        return [[Expert(pool, index) for index in range(count)] for pool, count in enumerate(self.num_experts)]

    @cached_property
    def layers_of_pool(self) -> dict[int, list[int]]:
        """The layers that use each pool."""
        found: dict[int, list[int]] = {}
        for layer, pool in enumerate(self.pool_of_layer):
            found.setdefault(pool, []).append(layer)
        return found

    @cached_property
    def total_bytes(self) -> int:
        """All experts."""
        return sum(self._kind_bytes())

    def _kind_bytes(self) -> list[int]:
        total = [0] * self.num_kinds
        for pool, count in enumerate(self.num_experts):
            total[self.kind_of_pool[pool]] += count * self.bytes_of_kind[self.kind_of_pool[pool]]
        return total

    def least_slots(self, per_layer: bool = False) -> list[int]:
        """Of each kind: the experts that one token has in its widest layer; with ``per_layer``, in all layers together."""
        least = [0] * self.num_kinds
        for layer, pool in enumerate(self.pool_of_layer):
            kind, places = self.kind_of_pool[pool], min(self.top_k[layer], self.num_experts[pool])
            least[kind] = least[kind] + places if per_layer else max(least[kind], places)
        return least

    def least_bytes(self, per_layer: bool = False) -> int:
        """The smallest budget that works, see `least_slots`."""
        least = self.least_slots(per_layer)
        return sum(count * size for count, size in zip(least, self.bytes_of_kind, strict=True))

    def slots(self, budget_bytes: int, *, per_layer: bool = False) -> list[int]:
        """Slots of each kind that a budget gives: the least of each, then shared out by how much each kind weighs.

        Raises ConfigError with the least number of bytes that suffices.
        """
        least, needed = self.least_slots(per_layer), self.least_bytes(per_layer)
        if budget_bytes < needed:
            what = "experts of one token in every layer" if per_layer else "experts of one token in one layer"
            raise ConfigError(
                f"expert_budget is {budget_bytes:,} bytes, but {what} take {needed:,}; give at least {needed:,}"
            )
        owned = [0] * self.num_kinds
        for pool, count in enumerate(self.num_experts):
            owned[self.kind_of_pool[pool]] += count
        weights, slots, rest = self._kind_bytes(), list(least), budget_bytes - needed
        total = sum(weights)
        for kind, size in enumerate(self.bytes_of_kind):
            slots[kind] += min(rest * weights[kind] // (total * size), owned[kind] - slots[kind])
        rest = budget_bytes - sum(count * size for count, size in zip(slots, self.bytes_of_kind, strict=True))
        # What rounding left over.
        for kind in sorted(range(self.num_kinds), key=lambda kind: -self.bytes_of_kind[kind]):
            more = min(rest // self.bytes_of_kind[kind], owned[kind] - slots[kind])
            slots[kind] += more
            rest -= more * self.bytes_of_kind[kind]
        return slots
