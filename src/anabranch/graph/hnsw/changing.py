"""Elements that come into an index, move and go: slots, labels, links and the table of ids in step, also where something comes between."""
# Shapes: N vectors, D dimension, S slots

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.coded import SAMPLE
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock, Workers
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import Storage, draw_levels
from anabranch.graph.interrupts import Interrupts

# Deleted elements are taken out of all lists, so that their places can be used again, once they are one in so many.
WORTH = 4096


class Changes:
    """What a writer does to an index whose lock it holds.

    Attributes:
        drawn: levels so far.
        next_id: after the largest so far.
    """

    def __init__(
        self, held: Storage, slots: Slots, linker: Linker, lock: ReadWriteLock, seed: int, *, is_flat: bool
    ) -> None:
        self._storage, self._slots, self._linker, self._lock = held, slots, linker, lock
        self._seed, self._is_flat = np.uint64(seed % 2**64), is_flat
        self.drawn = self.next_id = 0

    def following(self, count: int) -> np.ndarray:
        """Ids after the largest so far. Raises InputError where there are none left."""
        left = int(np.iinfo(np.int64).max) - self.next_id + 1
        if count > left:
            raise InputError(
                f"the largest id so far is {self.next_id - 1}, which leaves {left:,} for {count:,} vectors; give ids"
            )
        return np.arange(count, dtype=np.int64) + np.int64(self.next_id) if count else np.empty(0, np.int64)

    def insert(
        self, vector_ND: np.ndarray, id_N: np.ndarray, workers: Workers, interrupts: Interrupts, *, reuse: bool
    ) -> None:
        """Bring in elements whose ids are not there; ``reuse`` places of deleted ones."""
        held, count, done = self._storage, len(vector_ND), 0
        again = self._vacate(count, workers) if reuse else 0
        # A table that a reader makes from now on has all of them.
        had_table = self._slots.is_made
        slot_S = self._append(vector_ND[again:], id_N[again:])
        try:
            slot_S = np.append(held.refill(again, vector_ND[:again], id_N[:again]), slot_S)
            done = self._linker.link(slot_S, workers, interrupts)
        finally:
            # An interrupt, or no memory: what was linked stays, the rest was never here.
            if done < count:
                done = self._linker.num_done if len(slot_S) == count else 0
                self._take_back(slot_S[done:], count - again, workers)
            self.drawn += max(done - again, 0)
            if done:
                self.next_id = max(self.next_id, int(id_N[:done].max()) + 1)
            if done < count:
                # Readers, who were let in meanwhile, may have counted the rest.
                self._slots.forget()
            elif had_table:
                self._slots.put(id_N, slot_S)

    def _vacate(self, count: int, workers: Workers) -> int:
        """How many of so many new elements have vacant places; where there are too few, those of deleted elements become so."""
        held = self._storage
        dead = int(held.graph[layout.NUM_DELETED]) - len(held.vacant_S)
        if len(held.vacant_S) < count and dead * WORTH >= max(held.count, 1):
            held.own()
            dead_S = np.flatnonzero(~self._slots.live() & (held.level[: held.count] >= 0))
            self._linker.take_out(dead_S, workers)
            held.vacate(dead_S)
            if held.graph[layout.ENTRY] >= 0:
                self._linker.repair()
        return min(count, len(held.vacant_S))

    def _append(self, vector_ND: np.ndarray, id_N: np.ndarray) -> np.ndarray:
        if not len(id_N):
            return np.empty(0, np.int64)
        level_N = np.zeros(len(id_N), np.int32)
        if not self._is_flat:
            level_N = draw_levels(self._seed, self.drawn, len(id_N), self._storage.M)
        return self._storage.append(vector_ND, id_N, level_N)

    def _take_back(self, slot_S: np.ndarray, appended: int, workers: Workers) -> None:
        """Let slots be as if they had never been given to the linker, of which the last ``appended`` of all were new."""
        held = self._storage
        self._linker.undo(slot_S, workers)
        begin = held.count - appended
        again_S = np.sort(slot_S[slot_S < begin])
        held.mark(again_S, deleted=True)
        held.vacate(again_S)
        held.drop_last(int((slot_S >= begin).sum()))

    def move(self, slot_S: np.ndarray, vector_SD: np.ndarray, workers: Workers) -> None:
        """Give slots other vectors."""
        if not len(slot_S):
            return
        self._storage.own()
        # Before anything is taken out: there may be no memory for it.
        encoded = self._storage.encode(vector_SD)
        try:
            self._linker.take_out(slot_S, workers)
            self._storage.put_encoded(slot_S, encoded)
            self._linker.link(slot_S, workers)
        except BaseException:
            # Whatever came between, they come in again.
            self._linker.link_again(slot_S, workers)
            raise

    def delete(self, id_N: np.ndarray) -> None:
        """Mark elements as deleted. Raises InputError for unknown ids, and then marks none."""
        slot_S = self._slots.of(id_N)
        self._storage.own()
        self._slots.drop(id_N)
        self._storage.mark(slot_S, deleted=True)

    def restore(self, id_N: np.ndarray) -> None:
        """Undo `delete`. Raises InputError for ids that are not deleted, and then restores none."""
        dead_S = np.flatnonzero(~self._slots.live())
        dead_S = dead_S[np.argsort(self._slots.labels()[dead_S], kind="stable")]
        label_S = self._slots.labels()[dead_S]
        # The last that was deleted with an id.
        place_N = np.searchsorted(label_S, id_N, side="right") - 1
        is_there = (place_N >= 0) & ~self._slots.known(id_N)
        is_there[is_there] = label_S[place_N[is_there]] == id_N[is_there]
        if not is_there.all():
            row = int(np.flatnonzero(~is_there)[0])
            raise InputError(f"ids[{row}] is {id_N[row]}, which is not a deleted element of the index")
        self._storage.mark(dead_S[place_N], deleted=False)
        self._slots.put(id_N, dead_S[place_N])

    def compact(self, workers: Workers, *, repair: bool) -> int:
        """Take deleted elements out of graph and memory; how many."""
        held, is_live_S = self._storage, self._slots.live()
        dead, live = np.flatnonzero(~is_live_S), np.flatnonzero(is_live_S)
        if not dead.size:
            return 0
        held.own()
        if live.size:
            self._linker.take_out(dead[held.level[dead] >= 0], workers)
            held.keep(live)
        else:
            held.reset()
            self._linker.linked = 0
        self._slots.forget()
        if repair:
            self.repair()
        return len(dead)

    def repair(self) -> int:
        """Link what level 0 does not lead to; how many."""
        if not self._storage.count:
            return 0
        self._storage.own()
        return self._linker.repair()

    def learn_if_due(self, workers: Workers) -> None:
        """Learn codes where there are now enough vectors for that, or far more than they were learned from."""
        coded = self._storage.coded
        if coded is not None and coded.is_due(int(self._slots.live().sum())):
            self.learn(workers)

    def learn(self, workers: Workers, sample_SD: np.ndarray | None = None) -> None:
        """Learn codes of vectors, or of those that are there. Raises InputError for none."""
        held, live_S = self._storage, np.flatnonzero(self._slots.live())
        if sample_SD is None:
            if len(live_S) > SAMPLE:
                live_S = np.sort(np.random.default_rng(self._seed).choice(live_S, SAMPLE, replace=False))
            sample_SD = held.decode(live_S)
        if not len(sample_SD):
            raise InputError("there are no vectors to learn codes from; give some, or add them first")
        # It reads rows alone, and makes others beside the codes that searches use.
        with self._lock.open_to_readers():
            coded = held.learn_codes(sample_SD, int(self._seed), workers.count)
        held.coded = coded
