"""How queries of one call are answered: by a walk, by the codes of what a filter lets through, or by measuring all of that."""
# Shapes: N vectors, Q queries, K neighbours, S slots that a filter lets through

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anabranch.graph.codes import CENTRES
from anabranch.graph.disk import search
from anabranch.graph.disk.blocks import Form
from anabranch.graph.disk.stored import Stored
from anabranch.graph.guarded import held
from anabranch.graph.hnsw.arrays import aligned
from anabranch.graph.hnsw.filters import Prepared

# A filter that lets a smaller share through is answered by comparing the codes of all of it.
SELECTIVE = 0.1

# Most that a pool grows for a filter.
POOL = 1 << 16


@dataclass(frozen=True)
class Asked:
    """Queries, padded to the width of rows, what may be found, and where it goes: ids and distances hold -1 and infinity at first."""

    held: Stored
    form: Form
    cache_CW: np.ndarray
    query_QD: np.ndarray
    wanted: Prepared | None
    id_QK: np.ndarray
    distance_QK: np.ndarray
    ef: int = 1
    beam: int = 1

    def __post_init__(self) -> None:
        # One copy, before there are several threads.
        _ = self._allowed_S

    @cached_property
    def _slot_S(self) -> np.ndarray | None:
        """What a filter lets through, where that is few; None for a walk."""
        if self.wanted is None or self.wanted.number > max(2 * self.ef, SELECTIVE * self.form.elements):
            return None
        return np.flatnonzero(self.wanted.allowed_S).astype(np.int32)

    @cached_property
    def _allowed_S(self) -> np.ndarray:
        """What may be found, as kernels take it by its address; empty for all."""
        return np.empty(0, bool) if self.wanted is None else held(self.wanted.allowed_S)

    @property
    def _allowed(self) -> int:
        return 0 if self.wanted is None else self._allowed_S.ctypes.data

    def _rooms(self, count: int) -> np.ndarray:
        """Room for blocks that are read."""
        return aligned((count, self.form.block >> 3), np.uint64)

    def answer(self, first: int, last: int) -> np.ndarray:
        """Answer queries from one to another; counts as of `search_many`."""
        slot_S = self._slot_S
        if slot_S is None:
            return self._walk(first, last)
        if len(slot_S) <= 2 * self.ef:
            return self.measure(np.unique(slot_S // self.form.per), first, last)
        return self._by_codes(slot_S, first, last)

    def measure(self, blocks: np.ndarray, first: int, last: int) -> np.ndarray:
        """Put what lies in some blocks among the results; counts as of `search_many`."""
        counts = np.zeros(4, np.int64)
        search.measure_blocks(
            self.form,
            self.cache_CW,
            self._rooms(1)[0],
            blocks.astype(np.int64),
            self.query_QD,
            first,
            last,
            self._allowed,
            self.id_QK,
            self.distance_QK,
            counts,
        )
        return counts

    def _walk(self, first: int, last: int) -> np.ndarray:
        index, count, counts = self.held, self.form.elements, np.zeros(4, np.int64)
        marks_B = aligned(((count >> 2) + 1,), np.uint8)
        marks_B[:] = 0
        ef = min(self.ef, count)
        if self.wanted is not None:
            ef = min(count, max(ef, min(POOL, -(-ef * count // self.wanted.number))))
        known = search.Known(
            index.code_NM.ctypes.data,
            index.codes.centre_MWK,
            index.root_R,
            index.slot_E,
            index.link_EL,
            self.cache_CW,
        )
        room = search.Room(marks_B, self._table(), self._rooms(self.beam))
        found = (self.id_QK, self.distance_QK, counts)
        search.search_many(self.form, known, room, self.query_QD, first, last, ef, self.beam, self._allowed, *found)
        return counts

    def _table(self) -> np.ndarray:
        return aligned((self.held.codes.num_parts, CENTRES), np.float32)

    def _by_codes(self, slot_S: np.ndarray, first: int, last: int) -> np.ndarray:
        total, index = np.zeros(4, np.int64), self.held
        near_d, near_i = np.empty(self.ef + search.PADDING, np.float32), np.empty(self.ef + search.PADDING, np.int32)
        table_MK = self._table()
        for number in range(first, last):
            size = search.nearest_codes(
                index.code_NM.ctypes.data,
                index.codes.centre_MWK,
                self.form.kind == 0,
                self.query_QD[number, : self.form.dim],
                slot_S,
                table_MK,
                near_d,
                near_i,
            )
            counts = self.measure(np.unique(near_i[:size] // self.form.per), number, number + 1)
            total += counts
            total[search.CODES] += len(slot_S)
            total[search.BAD] = counts[search.BAD]
            if counts[search.BAD] >= 0:
                break
        return total
