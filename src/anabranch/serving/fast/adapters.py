"""Adapters in a compiled step: what the kernel is told of one, and of which tokens use which."""
# Shapes: T tokens of a step, U tokens that use one adapter, C inputs, O outputs, R rank

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.description import Loops, Passes
from anabranch.nn.kernels.operands import address, array_address
from anabranch.serving.fast.heads import plain_of
from anabranch.serving.fast.layout import CAdapter, CGroup, CPart, CStep
from anabranch.serving.fast.routed import form_of

__all__ = ["AdapterTable", "AdapterTables", "AdapterUses", "Parts"]

# Of each part of a linear layer by its name: A [R, C], B transposed [R, O], both in one piece and float32 or bfloat16, and what multiplies
# them. Sums are of float32 either way.
Parts = Mapping[str, tuple[Tensor, Tensor, float]]
# Of `Site` in step.h.
QKV, OUT, GATE, UP, DOWN, SITES = range(6)


@dataclass(frozen=True)
class _Place:
    """Where a part is: the number of its matrix among those of all layers, its first output, and its sizes."""

    site: int
    start: int
    inputs: int
    outputs: int


class AdapterTable:
    """One adapter, as the kernel reads it. It points at the adapter's numbers, which must outlive it.

    Args:
        parts: the adapter's.
        places: of the parts that the step can add to.
        num_sites: matrices of all layers.
        version: equal for adapters of equal numbers; what a token's several add up to is summed in its order.

    Attributes:
        lows: the most ranks that it has at matrices with one input, of all layers.
    """

    def __init__(self, parts: Parts, places: Mapping[str, _Place], num_sites: int, version: str = "") -> None:
        found = sorted(((places[name], *parts[name]) for name in parts), key=lambda one: (one[0].site, one[0].start))
        made = []
        for place, a_RC, b_RO, scale in found:
            kind = "bfloat16" if a_RC.dtype == torch.bfloat16 else "float32"
            start = address(a_RC, kind, None, place.inputs), address(b_RO, kind, len(a_RC), place.outputs)
            made.append(CPart(*start, len(a_RC), place.start, place.outputs, scale, int(kind == "bfloat16")))
        counts = np.bincount([place.site for place, *_ in found], minlength=num_sites)
        ranks = np.zeros(num_sites, np.int64)
        for place, a_RC, *_ in found:
            # Gate and up are two matrices of one input.
            ranks[place.site - (place.site % SITES == UP)] += len(a_RC)
        self.version, self.lows = version, int(ranks.max(initial=0))
        self._first = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        self._parts = (CPart * len(made))(*made)
        self._keep = [tensor for name in parts for tensor in parts[name][:2]]
        self._struct = CAdapter(self._parts, array_address(self._first, "int32", None))

    @property
    def address(self) -> int:
        """Where it lies."""
        return ctypes.addressof(self._struct)


class AdapterTables:
    """Makes `AdapterTable`s of a model.

    Args:
        model: one that the compiled step runs.
        first_block: of each layer, the number of its first `CBlock`.
        num_blocks: that there are.
    """

    def __init__(self, model: Decoder, first_block: Sequence[int], num_blocks: int) -> None:
        self._num_sites = num_blocks * SITES
        self._places: dict[str, _Place] = {}
        for number, first in enumerate(first_block):
            self._add_layer(number, first, model.blocks[number], model.config.dim)

    def _add_layer(self, number: int, first: int, block: Any, dim: int) -> None:
        attention, start = plain_of(block.attention), 0
        name = "attention" if attention is block.attention else "attention.attention"
        query, store = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        for part, size in (("q", query), ("k", store), ("v", store)):
            self._places[f"blocks.{number}.{name}.{part}"] = _Place(first * SITES + QKV, start, dim, size)
            start += size
        self._places[f"blocks.{number}.{name}.o"] = _Place(first * SITES + OUT, 0, query, dim)
        form = form_of(block.feed_forward)
        # Others hold their matrices elsewhere, or use them otherwise.
        if isinstance(form, Passes | Loops) or getattr(block.feed_forward, "w13", None) is not form.w13:
            return
        hidden = form.w2.in_features
        for part, site in (("gate", GATE), ("up", UP)):
            self._places[f"blocks.{number}.feed_forward.{part}"] = _Place(first * SITES + site, 0, dim, hidden)
        self._places[f"blocks.{number}.feed_forward.down"] = _Place(first * SITES + DOWN, 0, hidden, dim)

    def takes(self, parts: Parts) -> bool:
        """Whether the step can add all of an adapter's parts."""
        return parts.keys() <= self._places.keys()

    def table(self, parts: Parts, version: str = "") -> AdapterTable:
        """What the kernel is told of an adapter, see `AdapterTable`. Raises ConfigError for one that `takes` says no to."""
        if not self.takes(parts):
            lacking = next(name for name in parts if name not in self._places)
            raise ConfigError(f"the compiled step cannot add to {lacking}")
        return AdapterTable(parts, self._places, self._num_sites, version)


class AdapterUses:
    """Which tokens of a step use which adapters: a group for each adapter, whose numbers are read once for all of its tokens.

    Args:
        used: of each sequence of the step, in order, its adapters with their weights.
        counts: tokens of each.

    Attributes:
        lows: floats of the first products of all groups.
    """

    def __init__(self, used: Sequence[Sequence[tuple[AdapterTable, float]]], counts: Sequence[int]) -> None:
        token_T = np.arange(sum(counts), dtype=np.int32)
        found: dict[AdapterTable, list[tuple[int, int, float]]] = {}
        start = 0
        for one, count in zip(used, counts, strict=True):
            for table, weight in _once(one):
                found.setdefault(table, []).append((start, count, weight))
            start += count
        # Whoever is in the step, a token's adapters are summed in one order.
        tables = sorted(found, key=lambda table: table.version)
        self._keep: list[Any] = [token_T, tables]
        groups = []
        for table in tables:
            token_U = np.concatenate([token_T[start : start + count] for start, count, _ in found[table]])
            weight_U = np.repeat([weight for *_, weight in found[table]], [count for _, count, _ in found[table]])
            weight_U = weight_U.astype(np.float32)
            self._keep += [token_U, weight_U]
            places = array_address(token_U, "int32", None), array_address(weight_U, "float32", len(token_U))
            groups.append(CGroup(table.address, *places, len(token_U), table.lows))
        self.lows = sum(group.count * group.lows for group in groups)
        self._groups = (CGroup * len(groups))(*groups)

    def put(self, step: CStep) -> None:
        """Tell a step, which must not outlive it."""
        step.group, step.groups, step.lows = ctypes.addressof(self._groups), len(self._groups), self.lows


def _once(used: Sequence[tuple[AdapterTable, float]]) -> Iterable[tuple[AdapterTable, float]]:
    """Each adapter once; one that is named several times with the sum of its weights."""
    if len(used) < 2:
        return used
    total: dict[AdapterTable, float] = {}
    for table, weight in used:
        total[table] = total.get(table, 0.0) + weight
    return total.items()
