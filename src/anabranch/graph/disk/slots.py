"""Slots of a disk index by id, as filters ask for them too."""
# Shapes: N vectors, S slots

import numpy as np

from anabranch.graph.disk.stored import Stored


class Slots:
    """Slots by id, as filters ask for them."""

    version = 0

    def __init__(self, held: Stored) -> None:
        self._held = held

    def ids(self) -> np.ndarray:
        """Rising, int64 [N]."""
        held = self._held
        return np.arange(held.form.elements) if held.id_N is None else np.array(held.id_N)

    def find(self, id_N: np.ndarray) -> np.ndarray:
        """Slots of ids, int64 [N], -1 for those that are not there."""
        held = self._held
        place_N = id_N if held.id_N is None else np.searchsorted(held.id_N, id_N)
        is_there = place_N < held.form.elements
        slot_N = np.full(len(id_N), -1, np.int64)
        if held.id_N is not None:
            is_there[is_there] = held.id_N[place_N[is_there]] == id_N[is_there]
        slot_N[is_there] = held.slot_N[place_N[is_there]]
        return slot_N

    def labels(self) -> np.ndarray:
        """Ids by slot, int64 [N]."""
        label_S = np.empty(self._held.form.elements, np.int64)
        label_S[self._held.slot_N] = self.ids()
        return label_S

    def live(self) -> np.ndarray:
        """All of them."""
        return np.ones(self._held.form.elements, bool)
