"""What memory ranks of a pipeline need for their layers: of parameters, and of activations between forwards and backwards.

A rank holds at any time so many inputs of its chunks and so many of all that these keep, whatever layers they are of. So the times at which
it holds different numbers of them are found once for a table, and any partition is looked up in sums over layers.
"""
# Shapes: L layers, C chunks, K ranks, V visits of a rank, T different things to hold at once

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anabranch.cluster.partitions import Partition, partition_at
from anabranch.cluster.schedules import BACKWARD, FORWARD, WEIGHT, Schedule
from anabranch.cluster.simulation import is_recomputed

__all__ = ["Rooms", "copied"]


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """Bytes of ranks, by the layers that they have.

    Attributes:
        table: what runs when.
        checkpoint: for which micro-batches the forward is done again.
        state_L: bytes of each layer's parameters, with what belongs to them.
        tied_L: of each layer, an earlier one whose parameters it uses too, of which its rank has a copy if it has not that layer; or None.
        saved_L: what it keeps of a micro-batch for the backward.
        output_L: what goes on to the next one.
    """

    table: Schedule
    checkpoint: str
    state_L: tuple[float, ...]
    saved_L: tuple[float, ...]
    output_L: tuple[float, ...]
    tied_L: tuple[int | None, ...] = ()

    def state_bytes(self, cut: Partition, rank: int) -> float:
        """Of the parameters of a rank, copies of tied ones included."""
        mine = cut.parts[rank :: self.table.num_stages]
        own = float(sum(self._states[part.stop] - self._states[part.start] for part in mine))
        return own + sum(self.state_L[layer] for layer in copied(mine, self._ties))

    def activation_bytes(self, cut: Partition, rank: int) -> float:
        """The most that a rank holds between forward and backward, over its slots in their order; 0 where layers do not say."""
        if not any(self.saved_L):
            return 0.0
        mine = cut.parts[rank :: self.table.num_stages]
        entries = [self._entries[part.start] for part in mine]
        wholes = [self._saved[part.stop] - self._saved[part.start] for part in mine]
        return float((self._held_K[rank] @ np.array([*entries, *wholes])).max(initial=0.0))

    def taken(self, cut: Partition, rank: int) -> float:
        """Both together."""
        return self.state_bytes(cut, rank) + self.activation_bytes(cut, rank)

    def taken_NK(self, ends_NC: np.ndarray) -> np.ndarray:
        """Both together of all ranks, of many partitions at once: [N, K], by where parts begin and the last one ends [N, C + 1]."""
        ranks, visits = self.table.num_stages, self.table.num_visits
        states, wholes = np.diff(self._states[ends_NC], axis=1), np.diff(self._saved[ends_NC], axis=1)
        entries = self._entries[ends_NC[:, :-1]]
        taken = states.reshape(-1, visits, ranks).sum(1)
        numbers = np.arange(len(ends_NC))
        for source in {source for _, source in self._ties}:
            has_copy = np.zeros(taken.shape, bool)
            for user in (user for user, one in self._ties if one == source):
                has_copy[numbers, (ends_NC[:, 1:] <= user).sum(1) % ranks] = True
            has_copy[numbers, (ends_NC[:, 1:] <= source).sum(1) % ranks] = False
            taken += has_copy * self.state_L[source]
        if any(self.saved_L):
            for rank in range(ranks):
                each = np.concatenate((entries[:, rank::ranks], wholes[:, rank::ranks]), axis=1)
                taken[:, rank] += (each @ self._held_K[rank].T).max(1, initial=0.0)
        return taken

    def taken_from(self, rank: int, first: int) -> np.ndarray:
        """Bytes of a rank with one chunk that begins at layer ``first``, for each layer that it may end behind."""
        states = self._states[first + 1 :] - self._states[first]
        for source in {source for user, source in self._ties if source < first <= user}:
            # From the first of its users on.
            begin = min(user for user, one in self._ties if one == source and user >= first)
            states[begin - first :] += self.state_L[source]
        if not any(self.saved_L):
            return states
        wholes = self._saved[first + 1 :] - self._saved[first]
        held = self._held_K[rank]
        return states + (held[:, :1] * self._entries[first] + held[:, 1:] * wholes).max(0, initial=0.0)

    def least_full(self, ends: Sequence[int]) -> Partition:
        """The partition whose fullest rank takes least, where each has one chunk. Parts begin at 0 and at some of ``ends``."""
        length, ranks = len(self.state_L), self.table.num_stages
        may_end = np.zeros(length, bool)
        may_end[[*(end - 1 for end in ends), length - 1]] = True
        # rest[k, i]: the fullest of ranks k to the last, with the layers from i on.
        rest = np.full((ranks + 1, length + 1), np.inf)
        rest[ranks, length] = 0.0
        last = np.zeros((ranks, length), int)
        for rank in range(ranks - 1, -1, -1):
            # Each rank before and behind has a layer at least.
            for first in range(rank, length - (ranks - rank) + 1):
                fullest = np.maximum(self.taken_from(rank, first), rest[rank + 1, first + 1 :])
                fullest[~may_end[first:]] = np.inf
                last[rank, first] = first + 1 + int(fullest.argmin())
                rest[rank, first] = fullest.min()
        bounds = [int(last[0, 0])]
        while len(bounds) < ranks:
            bounds.append(int(last[len(bounds), bounds[-1]]))
        return partition_at(bounds[:-1], self.state_L)

    @cached_property
    def _ties(self) -> list[tuple[int, int]]:
        """(a layer, the one whose parameters it uses too)."""
        return [(user, source) for user, source in enumerate(self.tied_L) if source is not None]

    @cached_property
    def _states(self) -> np.ndarray:
        return np.concatenate(([0.0], np.cumsum(self.state_L)))

    @cached_property
    def _saved(self) -> np.ndarray:
        return np.concatenate(([0.0], np.cumsum(self.saved_L)))

    @cached_property
    def _entries(self) -> np.ndarray:
        """Of the layers before a chunk; the first one's input is data."""
        return np.array([0.0, *self.output_L[:-1]])

    @cached_property
    def _held_K(self) -> list[np.ndarray]:
        """Of each rank ``[T, 2 V]``: how many inputs, and how many of all that is kept, of each of its chunks it holds at once."""
        visits, count = self.table.num_visits, self.table.num_micro_batches
        last = WEIGHT if self.table.has_weight_slots else BACKWARD
        held_K = [[0] * (2 * visits) for _ in range(self.table.num_stages)]
        found_K: list[set[tuple[int, ...]]] = [set() for _ in held_K]
        for slot in self.table.slots:
            held = held_K[slot.stage]
            whole = visits + slot.visit
            kept = slot.visit if is_recomputed(self.checkpoint, slot.micro_batch, count) else whole
            if slot.kind == FORWARD:
                held[kept] += 1
                found_K[slot.stage].add(tuple(held))
            elif slot.kind == BACKWARD and kept != whole:
                # What was recomputed stands beside the inputs of the others.
                again = list(held)
                again[kept] -= 1
                again[whole] += 1
                found_K[slot.stage].add(tuple(again))
            if slot.kind == last:
                held[kept] -= 1
        return [np.array(_not_less(found), float).reshape(-1, 2 * visits) for found in found_K]


def copied(parts: Sequence[range], ties: Iterable[tuple[int, int]]) -> set[int]:
    """The layers of whose parameters there are copies where these parts are, for other layers: they are elsewhere.

    Args:
        parts: the layers of a rank.
        ties: (a layer, the one whose parameters it uses too).
    """
    return {source for user, source in ties if _is_in(user, parts) and not _is_in(source, parts)}


def _is_in(layer: int, parts: Sequence[range]) -> bool:
    return any(layer in part for part in parts)


def _not_less(found: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of which none of the others is more in all ways."""
    kept: list[tuple[int, ...]] = []
    for one in sorted(found, reverse=True):
        if not any(all(a >= b for a, b in zip(other, one, strict=True)) for other in kept):
            kept.append(one)
    return kept
