"""How elements come into the graph and out of it: batches, and the order that makes them independent of threads."""
# Shapes: B batch, P pairs of a link's two ends, T targets, S slots, N slots in use

from collections.abc import Callable

import numpy as np

from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.build import (
    BESIDE,
    NO_LISTS,
    ONE_BY_ONE,
    PREPARED,
    come_prepared,
    link_back,
    link_lost,
    link_new,
)
from anabranch.graph.hnsw.close import LEAST_TRIED, TRIED, find_close
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.mending import UNREACHED, bridge, find_ways, points_at, reach, repair_links
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.hnsw.suspects import FAR, LOOKED, NOW, find_lost, mark_leads
from anabranch.graph.hnsw.watch import Watch
from anabranch.graph.interrupts import Interrupts
from anabranch.graph.workers import Workers

# As many elements are inserted one by one.
SINGLY = 1024

# Then batches of N / SHARE.
SHARE = 64
BATCH = 4096  # at most

# Elements that are inserted one by one before searches get room.
EQUALS = 16

# The slot of an element, level and slot of each list that is to lead to it, those lists, and how many they are.
Prepared = tuple[np.ndarray, np.ndarray, np.ndarray, int]

# Of those that were suspects once two are looked for with each suspect, and so many more with several.
WATCHED_MORE = 64

# Suspects that one look brings about are looked for in the next, so often.
ROUNDS = 4

# Lists that are written before searches get room.
STEP = 128


class Linker:
    """Changes the links of a storage, for a writer that holds the lock. Searches are let in between steps, and beside what reads.

    Attributes:
        linked: how many elements are in the graph.
        num_copies: how many came since the last `repair` that lead to equals of theirs.
        num_new: how many came since.
        is_cut: whether some were taken out since.
        is_suspect: whether some that came since suspects were looked for are such.
        watch: what is to be looked for.
        num_done: how many of those that `link` was last given are.
    """

    def __init__(self, held: Storage, lock: ReadWriteLock) -> None:
        self._storage, self._lock = held, lock
        self.linked = self.num_done = self.num_copies = self.num_new = 0
        self.is_cut = self.is_suspect = False
        self.watch = Watch(held)

    def link(self, slot_S: np.ndarray, workers: Workers, interrupts: Interrupts | None = None) -> int:
        """Insert slots that no list points at, and whose own lists are empty, into the graph, in their order; how many.

        ``interrupts`` are looked at between batches, and raise KeyboardInterrupt there.
        """
        graph, done = self._storage.graph, 0
        self.num_done = 0
        # Nothing is looked for that no list may lead to yet.
        self._storage.suspect[slot_S] = 0
        singly = len(slot_S) if len(slot_S) == 1 else max(min(SINGLY - self.linked, len(slot_S)), 0)
        if singly:
            self._link_singly(slot_S, singly)
            self.num_done = done = singly
        while done < len(slot_S):
            if interrupts is not None:
                interrupts.check()
            batch_B = slot_S[done : done + min(self.linked // SHARE, BATCH)]
            above = np.flatnonzero(self._storage.level[batch_B] > graph[layout.TOP])
            # It becomes the entry point before others come that it may link to on its level.
            if above.size:
                batch_B = batch_B[: above[0] + 1]
            self._link_batch(batch_B, workers)
            if above.size:
                graph[layout.ENTRY], graph[layout.TOP] = batch_B[-1], self._storage.level[batch_B[-1]]
            self.num_done = done = done + len(batch_B)
            self.linked += len(batch_B)
            self.num_new += len(batch_B)
        self.is_suspect = self.is_suspect or self.watch.owed > 0 or bool((self._storage.suspect[slot_S] & NOW).any())
        return done

    def _link_singly(self, slot_S: np.ndarray, count: int) -> None:
        """Insert the first so many, one after the other."""
        if len(slot_S) > 1 or self._storage.graph[layout.ENTRY] < 0:
            self._one_by_one(slot_S, 0, count)
            self.linked += count
            self.num_new += count
            return
        # Nearly all of the work, and nothing leads there yet.
        with self._lock.open_to_readers():
            prepared = self.prepare(slot_S)
        self.take(prepared)

    def _one_by_one(self, slot_S: np.ndarray, begin: int, end: int) -> None:
        """Insert some slots, one after the other, with nobody beside."""
        row = self._storage.linked_by()
        with Marks(self._storage) as marks:
            self.num_copies += link_new(row, marks, slot_S, begin, end, ONE_BY_ONE, *NO_LISTS)[0]
        self._storage.take_entry(row)

    def prepare(self, slot_1: np.ndarray) -> Prepared:
        """Write the links of one element, and work out the lists that are to lead to it; searches may go on, and see nothing of it."""
        held, graph = self._storage, self._storage.linked_by()
        most = 2 * held.M + held.M * int(graph[layout.TOP])
        target_TP, list_TC = np.empty((most, 2), np.int64), np.empty((most, 2 * held.M), np.int32)
        with Marks(held) as marks:
            copies, count = link_new(graph, marks, slot_1, 0, 1, PREPARED, target_TP, list_TC)
        self.num_copies += copies
        return slot_1, target_TP, list_TC, int(count)

    def take(self, prepared: Prepared) -> None:
        """Let the graph lead to an element by what `prepare` worked out, since which nothing has changed."""
        slot_1, target_TP, list_TC, count = prepared
        come_prepared(self._storage.graph, slot_1, 0, target_TP, list_TC, count)
        self.linked += 1
        self.num_new += 1
        self.is_suspect = self.is_suspect or bool(self._storage.suspect[slot_1[0]] & NOW)

    def _link_batch(self, batch_B: np.ndarray, workers: Workers) -> None:
        """Insert a batch side by side; then, one by one, of equal vectors all but the first, and what is close to others of the batch: each
        finds those before."""
        is_beside_B = self._storage.are_first(batch_B)
        is_beside_B[is_beside_B] = ~self._link_beside(batch_B[is_beside_B], workers)
        again_B = batch_B[~is_beside_B]
        for begin in range(0, len(again_B), EQUALS):
            self._one_by_one(again_B, begin, min(begin + EQUALS, len(again_B)))
            self._lock.make_room()
            # Before the parts of a group that do not find each other grow.
            self.look(workers, is_last=False)

    def _link_beside(self, batch_B: np.ndarray, workers: Workers) -> np.ndarray:
        """Insert elements side by side, but those that are close to others of them, see `close`; which these are, bool [B]."""
        held, graph = self._storage, self._storage.linked_by()
        is_close_B = np.zeros(len(batch_B), np.uint8)
        # It writes the lists of the new elements alone, which nothing leads to yet.
        with self._lock.open_to_readers():
            first = TRIED if len(batch_B) >= LEAST_TRIED else 1
            # A kernel that was given the view would be compiled once more.
            tried_B = np.ascontiguousarray(batch_B[::first])
            copies = self._forward(tried_B, workers)
            find_close(graph, batch_B, 0, len(batch_B), first, is_close_B)
            if 2 * int(is_close_B.sum()) >= max(len(tried_B), 2):
                is_close_B[:] = 1
                copies = 0
            elif first > 1:
                copies += self._forward(batch_B[np.arange(len(batch_B)) % first > 0], workers)
                workers.run(lambda begin, end: find_close(graph, batch_B, begin, end, 1, is_close_B), len(batch_B), 64)
        self.num_copies += copies
        is_close_B = is_close_B.astype(bool) | (held.suspect[batch_B] & FAR > 0)
        if is_close_B.any():
            close_B, batch_B = batch_B[is_close_B], batch_B[~is_close_B]
            held.links[close_B], held.suspect[close_B] = -1, 0
            held.upper[held.lists_of(close_B)] = -1
        if len(batch_B):
            for level in range(int(min(held.level[batch_B].max(), graph[layout.TOP])) + 1):
                self._link_back(batch_B[held.level[batch_B] >= level], level, workers)
        return is_close_B

    def _forward(self, slot_B: np.ndarray, workers: Workers) -> int:
        """Write the links of new elements, each from the graph as it is; how many of them lead to an equal."""
        graph = self._storage.linked_by()
        copies: list[int] = []

        def forward(begin: int, end: int) -> None:
            with Marks(self._storage) as marks:
                copies.append(link_new(graph, marks, slot_B, begin, end, BESIDE, *NO_LISTS)[0])

        workers.run(forward, len(slot_B), 4)
        return sum(copies)

    def _link_back(self, base_S: np.ndarray, level: int, workers: Workers) -> None:
        """Add new elements to the lists of those that they link to."""
        held, graph = self._storage, self._storage.linked_by()
        links = held.links[base_S] if level == 0 else held.upper[held.first[base_S] + level - 1]
        target_P, source_P = links[links >= 0].astype(np.int64), np.repeat(base_S, (links >= 0).sum(1))
        # By target, then as they came.
        pair_P = np.sort((target_P << 32) | np.arange(len(target_P)))
        source_P, target_P = source_P[pair_P & 0xFFFFFFFF], pair_P >> 32
        start_T = np.flatnonzero(np.append(True, target_P[1:] != target_P[:-1])[: len(target_P)])
        target_T, start_T = target_P[start_T], np.append(start_T, len(target_P))
        self._in_steps(
            lambda begin, end: link_back(graph, level, target_T, start_T, source_P, begin, end),
            len(target_T),
            16,
            workers,
        )

    def _in_steps(self, work: Callable[[int, int], None], total: int, least: int, workers: Workers) -> None:
        """``work`` on all lists that change, with room for searches after every few: each is written once, so any order is the same."""
        for first in range(0, total, STEP):
            count = min(STEP, total - first)
            workers.run(lambda begin, end, first=first: work(first + begin, first + end), count, least)  # type: ignore[misc]
            self._lock.make_room()

    def take_out(self, slot_S: np.ndarray, workers: Workers) -> None:
        """Let no list point at slots any more: lists that did are selected anew. Their own become empty."""
        held, graph = self._storage, self._storage.graph
        gone_N = np.zeros(held.count, np.uint8)
        gone_N[slot_S] = 1
        row = held.linked_by()
        for level in range(int(graph[layout.TOP]) + 1):
            mark_leads(row, level, slot_S[held.level[slot_S] >= level])
            self._mend(gone_N, level, workers)
        held.links[slot_S] = -1
        held.upper[held.lists_of(slot_S)] = -1
        self.linked -= len(slot_S)
        self.is_cut = True
        if gone_N[graph[layout.ENTRY]]:
            stays = np.flatnonzero((gone_N == 0) & (held.level[: held.count] >= 0))
            entry = stays[held.level[stays].argmax()] if stays.size else -1
            graph[layout.ENTRY], graph[layout.TOP] = entry, held.level[entry] if stays.size else -1

    def undo(self, slot_S: np.ndarray, workers: Workers) -> None:
        """Let no list point at slots that `link` was given and did not come to an end with."""
        self.linked += len(slot_S)
        self.take_out(slot_S, workers)

    def link_again(self, slot_S: np.ndarray, workers: Workers) -> None:
        """Bring slots into the graph that were being taken out of it, or linked, when something came between."""
        self.linked = self._storage.count - len(self._storage.vacant_S)
        self.take_out(slot_S, workers)
        self.link(slot_S, workers)

    def _mend(self, gone_N: np.ndarray, level: int, workers: Workers) -> None:
        """Select the lists of a level that point at what goes anew."""
        held, graph, is_hit_N = self._storage, self._storage.linked_by(), np.zeros(self._storage.count, np.uint8)
        with self._lock.open_to_readers():
            workers.run(lambda begin, end: points_at(graph, level, gone_N, begin, end, is_hit_N), held.count, 4096)
        target_T = np.flatnonzero(is_hit_N)

        def mend(begin: int, end: int) -> None:
            with Marks(held) as marks:
                bridge(graph, level, marks, gone_N, target_T, begin, end)

        self._in_steps(mend, len(target_T), 8, workers)

    def look(self, workers: Workers, *, is_last: bool = True) -> int:
        """Look for suspects, and link those that walks do not come to; how many. See `suspects`.

        Where more of them come at once, all but the last look leave those that are watched to that.
        """
        held, watch, found, self.is_suspect = self._storage, self.watch, 0, False
        for turn in range(ROUNDS):
            slot_S = watch.take()
            if turn == 0:
                watch.owed += len(slot_S)
            if turn == 0 and is_last and watch.owed:
                if not watch.is_known:
                    with self._lock.open_to_readers():
                        watch.learn(workers)
                slot_S = np.union1d(slot_S, watch.in_turn(2 * watch.owed + WATCHED_MORE * (watch.owed > 1)))
                watch.owed = 0
            slot_S = slot_S[(held.deleted[slot_S] == 0) & (held.level[slot_S] >= 0)]
            if not len(slot_S) or held.graph[layout.ENTRY] < 0:
                break
            lost_S = self._lost(slot_S, workers)
            # Where one is lost, those about it may be.
            graph = held.linked_by()
            watch.mark(held.links[lost_S], NOW)
            for begin in range(0, len(lost_S), EQUALS):
                with Marks(held) as marks:
                    found += link_lost(graph, marks, lost_S, begin, min(begin + EQUALS, len(lost_S)), LOOKED)
                self._lock.make_room()
        return found

    def _lost(self, slot_S: np.ndarray, workers: Workers) -> np.ndarray:
        """Those of some slots that a walk for them does not come to."""
        held, graph, is_lost_S = self._storage, self._storage.linked_by(), np.zeros(len(slot_S), np.uint8)

        def find(begin: int, end: int) -> None:
            with Marks(held) as marks:
                find_lost(graph, marks, slot_S, begin, end, LOOKED, is_lost_S)

        with self._lock.open_to_readers():
            workers.run(find, len(slot_S), 8)
        return slot_S[is_lost_S > 0]

    def repair(self) -> int:
        """Link what level 0 does not lead to, by `repair_links`; how many. Then it leads to all. Searches are let in after every few."""
        held = self._storage
        self.num_copies, self.num_new, self.is_cut = 0, 0, False
        if held.graph[layout.ENTRY] < 0:
            # Nothing leads anywhere, since memory ended while all were taken out.
            self.linked = 0
            with Workers(1) as workers:
                return self.link(np.flatnonzero(held.level[: held.count] >= 0), workers)
        graph, entry = held.linked_by(), int(held.graph[layout.ENTRY])
        parent_N, queue_N = np.full(held.count, UNREACHED, np.int32), np.empty(held.count + 1, np.int32)
        parent_N[entry] = entry
        with self._lock.open_to_readers():
            find_ways(graph, entry, parent_N, queue_N)
        linked, slot = 0, 0
        while slot < held.count:
            with Marks(held) as marks:
                more, slot = repair_links(graph, marks, parent_N, queue_N, slot, EQUALS)
            linked += more
            self._lock.make_room()
        return linked

    def reached(self) -> np.ndarray:
        """Which slots level 0 leads to, bool [N]."""
        count, entry = self._storage.count, int(self._storage.graph[layout.ENTRY])
        is_reached_N = np.zeros(count, np.uint8)
        if entry >= 0:
            reach(self._storage.graph, entry, is_reached_N, np.empty(count + 1, np.int32))
        return is_reached_N.astype(bool)


class Marks:
    """Marks of a storage for as long as it is entered."""

    def __init__(self, held: Storage) -> None:
        self._held = held

    def __enter__(self) -> np.ndarray:
        self._marks = self._held.take_marks()
        return self._marks

    def __exit__(self, *_: object) -> None:
        self._held.give_marks(self._marks)
