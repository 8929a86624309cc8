"""Which slot of an index holds which id, as one array of open addressing.

A table of a power of two of int32 holds slots, at the place that their id is hashed to or the next one that is free; ids themselves lie in
the storage. At most two thirds are taken, so an id costs 6 to 14 bytes and a look-up some two steps. Hashes begin with a number that is
drawn for each table, so that nobody who chooses ids can let them all fall on one place.
"""
# Shapes: N ids, S slots in use, T places of the table

import secrets

import numpy as np

from anabranch.errors import InputError
from anabranch.graph import guarded
from anabranch.graph.hnsw.raw import kernel
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.random import mix

# Places that hold no slot: where a search ends, and where it goes on.
FREE, GONE = -1, -2
LEAST = 16


class Slots:
    """Finds slots by id, and tells which are live. Callers hold the lock of the index: alone where they change something."""

    def __init__(self, held: Storage) -> None:
        self._storage = held
        self._seed = np.uint64(secrets.randbits(64))
        # None until it is needed.
        self._table_T: np.ndarray | None = None
        # Places that are not free.
        self._taken = 0
        self._live: tuple[int, np.ndarray] | None = None

    @property
    def is_made(self) -> bool:
        """Whether there is a table, which `put` and `drop` change."""
        return self._table_T is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return 0 if self._table_T is None else self._table_T.nbytes

    def forget(self) -> None:
        """Make the table anew when it is needed: other slots are live, or have other ids."""
        self._table_T = None

    def find(self, id_N: np.ndarray) -> np.ndarray:
        """Slots of ids, int64 [N], -1 for those that are not live."""
        slot_N = np.empty(len(id_N), np.int64)
        if len(id_N):
            find_slots(self._table(), self._seed, self._storage.label, _plain(id_N), slot_N)
        return slot_N

    def known(self, id_N: np.ndarray) -> np.ndarray:
        """Which of some ids are live, bool [N]."""
        return self.find(id_N) >= 0

    def of(self, id_N: np.ndarray) -> np.ndarray:
        """Slots of ids, int64 [N]. Raises InputError for one that is not live."""
        slot_N = self.find(id_N)
        bad = np.flatnonzero(slot_N < 0)
        if bad.size:
            raise InputError(f"ids[{bad[0]}] is {id_N[bad[0]]}, which is not in the index")
        return slot_N

    def has_room(self, count: int) -> bool:
        """Whether `put` takes so many in without making the table anew."""
        return self._table_T is None or 3 * (self._taken + count) <= 2 * len(self._table_T)

    def put(self, id_N: np.ndarray, slot_N: np.ndarray) -> None:
        """Take ids in that are not there, whose slots have them as their label."""
        table_T = self._table_T
        # One that is made later has them.
        if table_T is None:
            return
        if not self.has_room(len(id_N)):
            # Grows, or gets rid of what is gone.
            self._table_T = None
            self._table()
            return
        self._taken += put_slots(table_T, self._seed, _plain(id_N), _plain(slot_N))

    def drop(self, id_N: np.ndarray) -> None:
        """Let ids go that are there."""
        if self._table_T is not None:
            drop_slots(self._table_T, self._seed, self._storage.label, _plain(id_N))

    @property
    def version(self) -> int:
        """Changes whenever slots come, go, or have other ids."""
        return self._storage.version

    def labels(self) -> np.ndarray:
        """Ids of slots, int64 [S]; of those that are not live, anything."""
        return self._storage.label[: self._storage.count]

    def live(self) -> np.ndarray:
        """Which slots are live, bool [S]: one array until something changes, not to be written."""
        held = self._storage
        if self._live is None or self._live[0] != held.version:
            self._live = held.version, guarded.held(held.deleted[: held.count] == 0)
        return self._live[1]

    def _table(self) -> np.ndarray:
        if self._table_T is None:
            slot_N = np.flatnonzero(self.live())
            # Room for some more.
            table_T = np.full(1 << (max(7 * len(slot_N) // 4, LEAST) - 1).bit_length(), FREE, np.int32)
            self._taken = put_slots(table_T, self._seed, self._storage.label[slot_N], slot_N)
            # Not before it is whole: other readers may look.
            self._table_T = table_T
        return self._table_T


def _plain(array_N: np.ndarray) -> np.ndarray:
    """As kernels were compiled for it: int64, in one piece, and not read-only."""
    return np.require(array_N, np.int64, ["C", "W"])


@kernel
def find_slots(table_T, seed, label_S, id_N, slot_N):
    """Write the slot of each id, or -1."""
    last = len(table_T) - 1
    for number in range(len(id_N)):
        place = np.int64(mix(np.uint64(id_N[number]) ^ seed) & np.uint64(last))
        slot = np.int64(table_T[place])
        while slot != FREE and (slot == GONE or label_S[slot] != id_N[number]):
            place = (place + 1) & last
            slot = np.int64(table_T[place])
        slot_N[number] = slot


@kernel
def put_slots(table_T, seed, id_N, slot_N):
    """Put slots of ids that are not there; how many places were free before."""
    last, taken = len(table_T) - 1, 0
    for number in range(len(id_N)):
        place = np.int64(mix(np.uint64(id_N[number]) ^ seed) & np.uint64(last))
        while table_T[place] >= 0:
            place = (place + 1) & last
        taken += table_T[place] == FREE
        table_T[place] = slot_N[number]
    return taken


@kernel
def drop_slots(table_T, seed, label_S, id_N):
    """Let go of ids that are there."""
    last = len(table_T) - 1
    for number in range(len(id_N)):
        place = np.int64(mix(np.uint64(id_N[number]) ^ seed) & np.uint64(last))
        slot = np.int64(table_T[place])
        while slot != FREE and (slot == GONE or label_S[slot] != id_N[number]):
            place = (place + 1) & last
            slot = np.int64(table_T[place])
        if slot != FREE:
            table_T[place] = GONE
