"""Which item each row of a forward pass is: what the context says of it, and numbers that sequences keep.

What is recorded (`record_routing`) is found again (`replay_routing`) because both number items by `ItemNumbers`.
"""
# Shapes: N items, S sequences

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Self

import numpy as np

from anabranch.routing.context import RoutingContext

__all__ = [
    "BEGINS",
    "ITEMS",
    "WHEN_DONE",
    "ItemNumbers",
    "SequenceNumbers",
    "StreamSequence",
    "items_state",
    "items_to_record",
    "real_items",
    "sequence_names",
]

# In `RoutingContext.state`: functions to call once the pass has succeeded, of whoever records; none is called of a pass that fails.
WHEN_DONE = "when_done"
# Likewise: True in a context of some positions whose pass begins sequences, though the first positions need not be among them.
BEGINS = "begins"

# In ``context.state`` where a layer is called with some items of a pass: int64 [R], which of the pass they are.
ITEMS = "items_of_pass"


class StreamSequence(NamedTuple):
    """The name of a sequence in one of the streams of a pass, where a context is of single items and its rows are no streams."""

    sequence: Hashable
    stream: int

    @classmethod
    def of(cls, name: Hashable, stream: int) -> Self:
        """Of ``name``, which may say its stream already."""
        return name if isinstance(name, cls) else cls(name, stream)


class SequenceNumbers:
    """Numbers the sequences of forward passes, from 0."""

    def __init__(self) -> None:
        self._named: dict[Hashable, int] = {}
        # The first sequence of the last pass without names, and one past all.
        self._first = self._end = 0

    def of(self, names: Sequence[Hashable]) -> np.ndarray:
        """Of sequences that have names, ``[S]``; a name keeps its number."""
        for name in names:
            if name not in self._named:
                self._named[name] = self._end
                self._end += 1
        return np.array([self._named[name] for name in names], np.int64)

    def begin(self, goes_on: bool) -> int:
        """The first sequence of a pass without names: that of the pass before if it ``goes_on``, else a new one."""
        self._first = self._first if goes_on else self._end
        return self._first

    def count(self, last: int) -> None:
        """There is a sequence ``last``, so new ones come behind it."""
        self._end = max(self._end, last + 1)


class ItemNumbers:
    """Numbers the items of forward passes, alike for all routers of a model, whichever of them a pass visits, and how often."""

    def __init__(self) -> None:
        self._numbers = SequenceNumbers()

    def of(self, num_items: int, context: RoutingContext) -> tuple[np.ndarray, np.ndarray]:
        """(item_N, position_N) of N items of the pass of ``context``: as it says, else counted from the start."""
        # Without sequences every item is one of its own.
        length = context.sequence_length or 1
        count_N = np.arange(num_items)
        position_N = items_state(context, "position", num_items)
        item_N = items_state(context, "item", num_items)
        if item_N is None:
            names = sequence_names(context, num_items)
            if names is not None:
                # By their rows in the batch, whichever of them the first router sees.
                all_names = context.all_sequences or ()
                self._numbers.of([(name, stream) for stream in range(context.num_streams) for name in all_names])
                item_N = self._numbers.of(names).repeat(length)
            else:
                # A pass that begins behind position 0 goes on with the sequences of the pass before (cached decoding).
                goes_on = position_N is not None and num_items > 0 and not (position_N[real_items(context)] == 0).any()
                goes_on = goes_on and not context.state.get(BEGINS, False)
                item_N = context.once(self, lambda: self._numbers.begin(goes_on)) + _rows(context, num_items, length)
                self._numbers.count(int(item_N.max(initial=-1)))
        return item_N, count_N % length if position_N is None else position_N


def _rows(context: RoutingContext, num_items: int, length: int) -> np.ndarray:
    """The row in the batch of each item; a context of some rows only (``rows`` of a language model's) says which they are."""
    rows = getattr(context, "rows", None)
    if rows is not None and len(rows) * length == num_items:
        return np.repeat(np.array(rows, np.int64), length)
    return np.arange(num_items) // length


def items_state(context: RoutingContext, what: str, num_items: int) -> np.ndarray | None:
    """What a context says about each item, if it speaks of these N (a layer may route only some of the tokens)."""
    value = context.state.get(f"{what}_N")
    value = getattr(context, f"{what}_BL", None) if value is None else value
    return None if value is None or value.numel() != num_items else value.detach().cpu().numpy().reshape(-1)


def sequence_names(context: RoutingContext, num_items: int) -> list[Hashable] | None:
    """A name of each row, where the context says it of these N (a layer may route only some of the tokens)."""
    sequences, streams, length = context.sequences, context.num_streams, context.sequence_length or 1
    if not sequences or num_items != streams * len(sequences) * length:
        return None
    # A sequence that goes on must say at which position.
    if items_state(context, "position", num_items) is None:
        return None
    return [StreamSequence.of(sequence, stream) for stream in range(streams) for sequence in sequences]


def items_to_record(context: RoutingContext, num_items: int) -> np.ndarray | slice:
    """The items to record: those that are real, and no repetition."""
    real_N, repeated_N = real_items(context), items_state(context, "repeated", num_items)
    if repeated_N is None:
        return real_N
    return ~repeated_N if isinstance(real_N, slice) else real_N & ~repeated_N


def real_items(context: RoutingContext) -> np.ndarray | slice:
    """The items that are no padding: a mask ``[N]``, or a slice of all."""
    return slice(None) if context.item_mask_N is None else context.item_mask_N.detach().cpu().numpy()
