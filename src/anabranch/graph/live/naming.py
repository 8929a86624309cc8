"""Names in the changes of one group: which ids they stand for, and whether elements have any."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.live.changes import Change
from anabranch.graph.live.group import Waiting
from anabranch.graph.names import GrowingNames


def names_for(names: GrowingNames | None, called: Sequence[Any], is_empty: bool) -> GrowingNames:
    """The names among which those of a change are looked up.

    Elements that come into an empty index without names say by the first of them whether there are any, and of which kind.

    Raises InputError where elements have none, or others than these could be.
    """
    if names is None and not is_empty:
        raise InputError("elements of this index have no names; give ids")
    found = GrowingNames.beginning(called) if names is None or names.is_open else names
    found.check(called)
    return found


class Naming:
    """What the changes of a group, one after another, do to the names of an index. Nothing of it is done here.

    Args:
        names: of elements; None where they have none.
        is_empty: whether the index holds no element.

    Attributes:
        names: the same once the changes are made, but that their names must be added still.
    """

    def __init__(self, names: GrowingNames | None, is_empty: bool) -> None:
        self.names, self._is_empty = names, is_empty
        # Names that changes of the group bring.
        self._coming: dict[Any, int] = {}

    def resolved(self, one: Waiting) -> Change:
        """The change with ids in the place of names. Raises InputError for names or ids that elements may not have."""
        if one.called is None:
            if one.change.vectors is not None:
                self._check_ids(one.change.ids)
            return one.change
        names = names_for(self.names, one.called, self._is_empty)
        found = [self._coming.get(name) if (id := names.find(name)) is None else id for name in one.called]
        if one.change.vectors is None:
            return Change(np.array([id for id in found if id is not None], np.int64), None)
        first = len(names) + len(self._coming)
        new = [name for name, id in zip(one.called, found, strict=True) if id is None]
        following = iter(range(first, first + len(new)))
        ids = np.array([next(following) if id is None else id for id in found], np.int64)
        return replace(one.change, ids=ids, names=tuple(new), first_named=first)

    def _check_ids(self, id_N: np.ndarray) -> None:
        if self.names is None:
            return
        bad = np.flatnonzero(id_N >= len(self.names) + len(self._coming))
        if bad.size:
            raise InputError(
                f"ids[{bad[0]}] is {id_N[bad[0]]}; elements of this index have names, so bring new ones in by name"
            )

    def take(self, change: Change) -> None:
        """Let a change be one of those that are made."""
        if change.vectors is None:
            return
        self._is_empty = False
        if change.names:
            if self.names is None or self.names.is_open:
                self.names = GrowingNames.beginning(change.names)
            self._coming.update((name, change.first_named + place) for place, name in enumerate(change.names))
