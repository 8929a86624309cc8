"""Elements that come into an index, move and go: slots, labels, links and the table of ids in step, also where something comes between."""
# Shapes: N vectors, D dimension, S slots

from contextlib import nullcontext, suppress

import numpy as np

from anabranch.errors import CapacityError, InputError
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.centres import better_centre, spread_places
from anabranch.graph.hnsw.coarse import count_worse
from anabranch.graph.hnsw.coded import LOOKED_AT, SAMPLE
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock, Workers
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import Storage, draw_levels
from anabranch.graph.hnsw.strays import Strays
from anabranch.graph.hnsw.suspects import NOW
from anabranch.graph.interrupts import Interrupts

# Deleted elements are taken out of all lists, so that their places can be used again, once they are one in so many.
WORTH = 4096

# Elements are linked anew in so many parts.
PARTS = 8

# Levels drawn and changes are counted up to here: whatever is counted, a file says what one that is read may say.
MOST = 2**62

# One copy of another in so many elements makes a look at all lists worth it.
COPIES = 8

# So is one that came in so many.
NEW = 16

# Above so many elements all lists are looked at beside searches: some milliseconds.
LOOKED_BESIDE = 1 << 14

# What rows and codes are rounded about is looked at again once one in so many elements came, was moved, or went: a look costs as much as
# some hundred changes.
LOOKS = 8


class Changes:
    """What a writer does to an index whose lock it holds.

    Attributes:
        drawn: levels so far.
        next_id: after the largest so far.
        changed: elements that came, were moved, or went, since what rows and codes are rounded about was looked at.
    """

    def __init__(
        self, held: Storage, slots: Slots, linker: Linker, lock: ReadWriteLock, seed: int, *, is_flat: bool
    ) -> None:
        self._storage, self._slots, self._linker, self._lock = held, slots, linker, lock
        self._seed, self._is_flat = np.uint64(seed % 2**64), is_flat
        self.drawn = self.next_id = self.changed = 0
        # Whether codes are to be looked at.
        self._look = False
        self._strays = Strays()
        # Elements that keep errors of a centre that they were rounded about before, and nobody was told of yet.
        self._num_worse = 0

    def following(self, count: int) -> np.ndarray:
        """Ids after the largest so far. Raises InputError where there are none left."""
        left = int(np.iinfo(np.int64).max) - self.next_id + 1
        if count > left:
            raise InputError(
                f"the largest id so far is {self.next_id - 1}, which leaves {left:,} for {count:,} vectors; give ids"
            )
        return np.arange(count, dtype=np.int64) + np.int64(self.next_id) if count else np.empty(0, np.int64)

    def insert_beside(self, vector_1D: np.ndarray, id_1: np.ndarray | None, *, reuse: bool) -> np.ndarray | None:
        """Bring in one element beside searches, which are kept out for the moment in which the graph begins to lead to it; its id.

        Args:
            vector_1D: the vector.
            id_1: its id, int64 [1]; None for the one after the largest so far.
            reuse: of places of deleted elements, where there are any.

        Returns:
            int64 [1]; None, and nothing has happened, where there is more to do than that: the id is there, arrays are full, or something
            of the whole index is due. Then it is for `insert`, whose results are the same.
        """
        held, graph = self._storage, self._storage.graph
        is_known = id_1 is not None and bool(self._slots.known(id_1)[0])
        if (
            is_known
            or graph[layout.ENTRY] < 0
            or held.coded is not None
            or self._is_due(1)
            or (reuse and self._is_vacated(1))
        ):
            return None
        level_1 = self._draw(1)
        if level_1[0] > graph[layout.TOP] or not (held.has_room(level_1) and self._slots.has_room(1)):
            return None
        id_1 = self.following(1) if id_1 is None else id_1
        prepared = self._linker.prepare(held.write_behind(vector_1D, id_1, level_1))
        # All of it: a process that is forked finds everything as before, or this half done (`lock`).
        with self._lock.exclusive():
            held.admit(level_1)
            self._linker.take(prepared)
            self._slots.put(id_1, prepared[0])
            self._count(1, 1)
            self.next_id = max(self.next_id, int(id_1[0]) + 1)
        return id_1

    def _count(self, drawn: int, changed: int) -> None:
        """Count levels that were drawn, and changes."""
        # Round, and no farther: nobody counts so far.
        self.drawn = (self.drawn + drawn) % (MOST + 1)
        self.changed = min(self.changed + changed, MOST)

    def _is_due(self, more: int) -> bool:
        """Whether what rows and codes are rounded about, if they are, wants another look with so many more."""
        held, changed = self._storage, self.changed + more
        if held.encoding.is_settled and held.encoding.centre_D is None and held.coded is None:
            return False
        return 0 < changed and held.count - int(held.graph[layout.NUM_DELETED]) <= LOOKS * changed

    def _is_vacated(self, count: int) -> bool:
        """Whether some of so many new elements have places of deleted ones, once those are made vacant where that is worth it."""
        return len(self._storage.vacant_S) > 0 or self._is_worth(count)

    def _is_worth(self, count: int) -> bool:
        held = self._storage
        dead = int(held.graph[layout.NUM_DELETED]) - len(held.vacant_S)
        return len(held.vacant_S) < count and dead * WORTH >= max(held.count, 1)

    def insert(
        self, vector_ND: np.ndarray, id_N: np.ndarray, workers: Workers, interrupts: Interrupts, *, reuse: bool
    ) -> None:
        """Bring in elements whose ids are not there; ``reuse`` places of deleted ones."""
        held, count, done = self._storage, len(vector_ND), 0
        again = self._vacate(count, workers) if reuse else 0
        # What rows are rounded about may be far from them by now.
        self._strays.count(vector_ND, held)
        is_due = self._is_due(count - again)
        if is_due:
            self._settle(vector_ND, workers)
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
            # Those that a look has seen do not count.
            self._count(max(done - again, 0), 0 if is_due else max(done - again, 0))
            if done:
                self.next_id = max(self.next_id, int(id_N[:done].max()) + 1)
            if done < count:
                # Readers, who were let in meanwhile, may have counted the rest.
                self._slots.forget()
                self._repair_after(workers)
            elif had_table:
                self._slots.put(id_N, slot_S)

    def _vacate(self, count: int, workers: Workers) -> int:
        """How many of so many new elements have vacant places; where there are too few, those of deleted elements become so."""
        held = self._storage
        if self._is_worth(count):
            held.own()
            dead_S = np.flatnonzero(~self._slots.live() & (held.level[: held.count] >= 0))
            self._linker.take_out(dead_S, workers)
            held.vacate(dead_S)
            self._count(0, len(dead_S))
        return min(count, len(held.vacant_S))

    def _append(self, vector_ND: np.ndarray, id_N: np.ndarray) -> np.ndarray:
        if not len(id_N):
            return np.empty(0, np.int64)
        return self._storage.append(vector_ND, id_N, self._draw(len(id_N)))

    def _draw(self, count: int) -> np.ndarray:
        """Levels of the next so many elements, int32 [N]."""
        if self._is_flat:
            return np.zeros(count, np.int32)
        return draw_levels(self._seed, self.drawn, count, self._storage.M)

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
        self._count(0, len(slot_S))
        self._strays.count(vector_SD, self._storage)
        if self._is_due(0):
            self._settle(vector_SD, workers, slot_S)
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
            self._repair_after(workers)
            raise

    def take_worse(self) -> int:
        """How many elements keep errors of a centre of before, since this was asked."""
        number, self._num_worse = self._num_worse, 0
        return number

    def delete(self, id_N: np.ndarray) -> None:
        """Mark elements as deleted. Raises InputError for unknown ids, and then marks none."""
        slot_S = self._slots.of(id_N)
        self._storage.own()
        self._slots.drop(id_N)
        self._storage.mark(slot_S, deleted=True)

    def restore(self, id_N: np.ndarray, workers: Workers) -> None:
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
        slot_N = dead_S[place_N]
        self._storage.own()
        self._storage.mark(slot_N, deleted=False)
        self._slots.put(id_N, slot_N)
        # What came meanwhile was not linked to them, and they were not looked for.
        self._linker.watch.mark(slot_N, NOW)
        self._linker.look(workers)

    def compact(self, workers: Workers, *, repair: bool) -> int:
        """Take deleted elements out of graph and memory; how many."""
        held, is_live_S = self._storage, self._slots.live()
        dead, live = np.flatnonzero(~is_live_S), np.flatnonzero(is_live_S)
        if not dead.size:
            if repair and self.is_crowded:
                held.own()
                self.repair_if_due(workers)
            return 0
        held.own()
        if live.size:
            self._linker.take_out(dead[held.level[dead] >= 0], workers)
            held.keep(live)
            # Before readers are let in.
            self._slots.forget()
            with suppress(CapacityError):
                self._settle(held.decode(live[:0]), workers)
        else:
            held.reset()
            self._linker.linked = 0
        self._slots.forget()
        if repair:
            self.repair(workers)
        return len(dead)

    def _settle(self, vector_ND: np.ndarray, workers: Workers, moved_S: np.ndarray | None = None) -> bool:
        """Round all rows about another centre, or others, where that is far better for those that stay and these that come; whether it was.

        Codes are looked at, too, when all is done (`learn_if_due`). Slots of ``moved_S`` have others of the vectors soon: what they hold
        now does not count, and they are not linked anew.
        """
        held, self.changed, self._look = self._storage, 0, True
        encoding, before = held.encoding, held.encoding.centres
        if before is None or not held.count:
            return False
        is_live_S = held.deleted[: held.count] == 0
        if moved_S is not None:
            is_live_S[moved_S] = False
        live_S = np.flatnonzero(is_live_S)
        place_S = spread_places(len(live_S) + len(vector_ND))
        old_S, new_S = place_S[place_S < len(live_S)], place_S[place_S >= len(live_S)] - len(live_S)
        with self._lock.open_to_readers():
            sample_SD = np.concatenate([held.decode(live_S[old_S]), vector_ND[new_S]])
            centres = better_centre(before, sample_SD, encoding.worth)
        if centres is None:
            return False
        held.own()
        # It reads rows alone, and makes others beside those that searches use.
        with self._lock.open_to_readers():
            recoded = held.recoded(centres)
            if not held.rerank:
                was, now = ((rows[live_S], aux[live_S]) for rows, aux in ((held.rows, held.aux), recoded[1:]))
                self._num_worse += count_worse(was, now, encoding.dtype)
        held.take_recoded(*recoded)
        # They were linked by distances that said little. A part at a time, so that searches find the others.
        for part_S in np.array_split(live_S, PARTS):
            if len(part_S):
                self._link_anew(part_S, workers)
        return True

    def _link_anew(self, slot_S: np.ndarray, workers: Workers) -> None:
        """Take slots out of the graph, and bring them in again."""
        try:
            self._linker.take_out(slot_S, workers)
            self._linker.link(slot_S, workers)
        except BaseException:
            # Whatever came between, they come in again.
            self._linker.link_again(slot_S, workers)
            raise

    def repair(self, workers: Workers, *, everything: bool = False) -> int:
        """Link what walks do not come to, of suspects or of all, and then what level 0 does not lead to; how many."""
        held = self._storage
        if not held.count:
            return 0
        held.own()
        if everything:
            self._linker.watch.mark(np.arange(held.count), NOW)
        return self._linker.look(workers) + self._linker.repair()

    @property
    def is_crowded(self) -> bool:
        """Whether there are suspects, or it is to be looked whether all can be reached: since that was done some moved or went, an eighth
        of the elements came as copies of others, or a sixteenth came at all."""
        return self._linker.is_suspect or self._may_be_cut

    @property
    def _may_be_cut(self) -> bool:
        held, linker = self._storage, self._linker
        return linker.is_cut or linker.num_copies * COPIES > held.count or linker.num_new * NEW > held.count

    def repair_if_due(self, workers: Workers) -> None:
        """Look for suspects; and `repair` where that `is_crowded`: what copies find near are copies, and they may have put out the only
        link to another group."""
        held, linker = self._storage, self._linker
        if not self.is_crowded:
            return
        linker.look(workers)
        if not self._may_be_cut:
            return
        linker.num_copies, linker.num_new, linker.is_cut = 0, 0, False
        # A look at few takes no longer than to let searches in and out.
        with self._lock.open_to_readers() if held.count > LOOKED_BESIDE else nullcontext():
            is_whole = bool((linker.reached() | (held.level[: held.count] < 0)).all())
        if not is_whole:
            linker.repair()

    def _repair_after(self, workers: Workers) -> None:
        """`repair_if_due` where something came between; where memory does not suffice the next change does it."""
        with suppress(MemoryError, CapacityError):
            self.repair_if_due(workers)

    def learn_if_due(self, workers: Workers) -> None:
        """Learn codes where there are now enough vectors for that, far more than they were learned from, or others."""
        held, coded, look = self._storage, self._storage.coded, self._look
        self._look = False
        if coded is None:
            return
        live_S = np.flatnonzero(self._slots.live())
        if coded.is_due(len(live_S)):
            self.learn(workers)
            return
        has_strays, number = self._strays.are_many(len(live_S)), self._strays.number
        if not ((look or has_strays) and coded.is_trained and len(live_S)):
            return
        if look:
            self._strays.forget()
        self._strays.looked()
        with self._lock.open_to_readers():
            some_SD = held.decode(live_S[spread_places(len(live_S), LOOKED_AT)])
            is_worn = coded.is_worn(some_SD, strays=has_strays)
            before = coded.square_of(some_SD)
        if is_worn:
            self.learn(workers)
            assert held.coded is not None
            if has_strays:
                self._strays.learned(len(live_S), number, before, held.coded.square_of(some_SD))

    def look_again(self, workers: Workers) -> None:
        """Look at codes whatever has come since, and learn them anew where they say little."""
        self._look = self._strays.is_unknown = True
        self.learn_if_due(workers)

    def is_read(self) -> None:
        """It was read from a file: what it says is looked at when something changes."""
        self._strays.is_unknown = True

    def learn_after_loss(self, workers: Workers) -> None:
        """Learn codes anew where they say little of what stayed. Where memory does not suffice, they are as they were."""
        if self._look or self._strays.are_many(self._storage.count):
            with suppress(CapacityError):
                self.learn_if_due(workers)

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
        self._strays.looked()
