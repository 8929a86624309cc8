"""`Watch`: which elements of an index are to be looked for, and which come next in turn (`suspects`)."""
# Shapes: S slots

from typing import Any

import numpy as np

from anabranch.graph.header import whole
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.hnsw.suspects import NOW, WATCHED, add_marks, find_marked, watch_gaps
from anabranch.graph.workers import Workers

# Marked slots that are found at once.
PIECE = 1 << 12

# Numbers that a file may say.
MOST = 2**62


class Watch:
    """Of one index. Not safe for threads: for a writer that holds the lock. What it costs is by what is marked, not by what there is.

    Attributes:
        owed: suspects that were looked for since some of those that are watched were.
    """

    def __init__(self, held: Storage) -> None:
        self._storage = held
        self.owed = 0
        # Of those that are watched, the first that is to be looked for next.
        self._turn = 0

    @property
    def is_known(self) -> bool:
        """Whether marks say what is to be watched: not of a file of an earlier release, until `learn`."""
        return self._storage.is_watched

    def mark(self, slots: np.ndarray, mark: int) -> None:
        """Mark slots with more, int32 or int64 of any shape; -1 is none."""
        add_marks(self._storage.graph, np.ascontiguousarray(slots, np.int64).ravel(), mark)

    def take(self) -> np.ndarray:
        """Those that are to be looked for now, int64 [S], rising; they are not any more."""
        held = self._storage
        # As most of the time: then no kernel is called, nor compiled.
        if not (held.blocks & NOW).any():
            return np.empty(0, np.int64)
        slot_S = self._find(NOW, 0, held.count, held.count)
        held.suspect[slot_S] &= WATCHED
        held.blocks &= WATCHED
        return slot_S

    def learn(self, workers: Workers) -> None:
        """Watch what lies behind gaps in lists, as of an index that says nothing of it."""
        held = self._storage
        graph = held.linked_by()
        workers.run(lambda begin, end: watch_gaps(graph, begin, end), held.count, 4096)
        held.is_watched = True

    def in_turn(self, count: int) -> np.ndarray:
        """The next so many of those that are watched, int64 [S]."""
        end = self._storage.count
        begin = min(self._turn, end)
        slot_S = self._find(WATCHED, begin, end, count)
        if len(slot_S) < count:
            slot_S = np.append(slot_S, self._find(WATCHED, 0, begin, count - len(slot_S)))
        self._turn = int(slot_S[-1]) + 1 if len(slot_S) else 0
        return slot_S

    def _find(self, mark: int, begin: int, end: int, most: int) -> np.ndarray:
        """The first slots, at most ``most``, of ``begin`` ... ``end`` with a mark."""
        found: list[np.ndarray] = []
        while True:
            slot_S = np.empty(min(most, PIECE), np.int64)
            count = int(find_marked(self._storage.graph, mark, begin, end, slot_S))
            found.append(slot_S[:count])
            most -= count
            if count < len(slot_S) or not most:
                return found[0] if len(found) == 1 else np.concatenate(found)
            begin = int(slot_S[-1]) + 1

    def facts(self) -> dict[str, Any]:
        """What a file says of it beside marks."""
        return {"turn": self._turn, "owed": self.owed, "known": self.is_known}

    def take_facts(self, facts: Any) -> None:
        """Go on as `facts` says. Raises ValueError where they can be none of these."""
        if not isinstance(facts, dict):
            raise ValueError("watched is no object")
        self._turn, self.owed = whole(facts["turn"], "turn", most=MOST), whole(facts["owed"], "owed", most=MOST)
        self._storage.is_watched = facts["known"] is True
