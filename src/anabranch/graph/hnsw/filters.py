"""`Filter`: which elements a search may return, worked out once and used by any number of searches."""
# Shapes: S slots in use

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.guarded import held
from anabranch.graph.hnsw.checks import as_filter, as_filter_value
from anabranch.graph.hnsw.slots import Slots


@dataclass
class Prepared:
    """What a filter is on an index as it is now.

    Attributes:
        allowed_S: which slots it lets through, bool [S].
        number: how many these are.
        version: of the index as it was.
        address: of the first of them.
    """

    allowed_S: np.ndarray
    number: int
    version: int
    address: int
    _slots: np.ndarray | None = field(default=None, repr=False)

    def slots(self, label_S: np.ndarray) -> np.ndarray:
        """Those slots, rising by label."""
        if self._slots is None:
            slot_M = np.flatnonzero(self.allowed_S)
            self._slots = slot_M[np.argsort(label_S[slot_M])]
        return self._slots


class Filter:
    """Ids that a search may return. Made by `HNSW.prepare_filter`, and given to ``filter`` of `search` in place of what it was made of.

    What it is on an index is worked out at the first search, and again when the index has changed since. It may be used with several
    indexes, and by several threads at once.
    """

    def __init__(self, value: Any) -> None:
        """Of a mask by id or a list of ids; a copy is kept. Raises InputError for other things."""
        self._value = np.array(as_filter_value(value))
        self._on: WeakKeyDictionary[Slots, Prepared] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # What it is on indexes of this process is worked out again.
        return {"_value": self._value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._value, self._on = state["_value"], WeakKeyDictionary()

    def __repr__(self) -> str:
        if self._value.dtype == bool:
            return f"Filter(a mask of {int(self._value.sum()):,} of {len(self._value):,} ids)"
        return f"Filter({len(self._value):,} ids)"

    def on(self, slots: Slots) -> Prepared:
        """What it is on an index, whose lock the caller holds. Raises InputError for a mask that ends before the largest id."""
        known = self._on.get(slots)
        if known is None or known.version != slots.version:
            known = self._on[slots] = prepared(self._value, slots)
        return known

    def on_begun(self, slots: Slots) -> Prepared:
        """As `on`, for a search that it fitted when that began: ids behind the end of a mask, which have come since, are kept out."""
        try:
            return self.on(slots)
        except InputError:
            return prepared(self._value, slots, is_begun=True)

    def known(self, slots: Slots) -> Prepared | None:
        """What it was on an index when that was last asked for, without its lock; whoever uses it looks whether the version is the same."""
        return self._on.get(slots)


class Asked:
    """A filter, or none, of one call that is answered in several turns, between which the index may change: what it is in each of them.

    Args:
        value: a `Filter`, what one is made of, or None.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._filter: Filter | None = None

    def on(self, slots: Slots) -> Prepared | None:
        """What it is on an index, whose lock the caller holds; None for none. Raises InputError as `Filter`, in the first turn alone."""
        if self._value is None:
            return None
        if self._filter is None:
            made = self._value if isinstance(self._value, Filter) else Filter(self._value)
            found, self._filter = made.on(slots), made
            return found
        return self._filter.on_begun(slots)


def prepared(value: Any, slots: Slots, *, is_begun: bool = False) -> Prepared:
    """What a filter is on an index. Raises InputError as `as_filter`."""
    allowed_S = held(as_filter(value, slots.labels(), slots.live(), is_begun=is_begun))
    return Prepared(allowed_S, int(allowed_S.sum()), slots.version, allowed_S.ctypes.data)
