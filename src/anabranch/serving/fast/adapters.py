"""Adapters in a compiled step: what the kernel is told of one, and of which tokens use which."""
# Shapes: T tokens of a step, U uses of adapters by tokens, C inputs, O outputs, R rank

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.description import Loops, Passes
from anabranch.nn.kernels.operands import address, array_address
from anabranch.serving.fast.layout import CAdapter, CPart, CStep
from anabranch.serving.fast.routed import form_of

__all__ = ["AdapterTable", "AdapterTables", "AdapterUses", "Parts"]

# Of each part of a linear layer by its name: A [R, C], B transposed [R, O], both float32 and in one piece, and what multiplies them.
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
    """

    def __init__(self, parts: Parts, places: Mapping[str, _Place], num_sites: int) -> None:
        found = sorted(((places[name], *parts[name]) for name in parts), key=lambda one: (one[0].site, one[0].start))
        made = [
            CPart(
                address(a_RC, "float32", None, place.inputs), address(b_RO, "float32", len(a_RC), place.outputs),
                len(a_RC), place.start, place.outputs, scale, 0,
            )
            for place, a_RC, b_RO, scale in found
        ]  # fmt: skip
        counts = np.bincount([place.site for place, *_ in found], minlength=num_sites)
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
        attention, start = block.attention, 0
        query, store = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        for part, size in (("q", query), ("k", store), ("v", store)):
            self._places[f"blocks.{number}.attention.{part}"] = _Place(first * SITES + QKV, start, dim, size)
            start += size
        self._places[f"blocks.{number}.attention.o"] = _Place(first * SITES + OUT, 0, query, dim)
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

    def table(self, parts: Parts) -> AdapterTable:
        """What the kernel is told of an adapter. Raises ConfigError for one that `takes` says no to."""
        if not self.takes(parts):
            lacking = next(name for name in parts if name not in self._places)
            raise ConfigError(f"the compiled step cannot add to {lacking}")
        return AdapterTable(parts, self._places, self._num_sites)


class AdapterUses:
    """Which tokens of a step use which adapters.

    Args:
        used: of each sequence of the step, in order, its adapters with their weights.
        counts: tokens of each.
    """

    def __init__(self, used: Sequence[Sequence[tuple[AdapterTable, float]]], counts: Sequence[int]) -> None:
        per_token = np.repeat([len(one) for one in used], counts)
        self._first_T1 = np.concatenate(([0], np.cumsum(per_token))).astype(np.int32)
        of_tokens = [pair for one, count in zip(used, counts, strict=True) for _ in range(count) for pair in one]
        self._address_U = np.array([table.address for table, _ in of_tokens], np.int64)
        self._weight_U = np.array([weight for _, weight in of_tokens], np.float32)
        self._keep = [table for one in used for table, _ in one]

    def put(self, step: CStep) -> None:
        """Tell a step, which must not outlive it."""
        step.use_first = array_address(self._first_T1, "int32", step.tokens + 1)
        step.adapters = array_address(self._address_U, "int64", None)
        step.use_weight = array_address(self._weight_U, "float32", None)
