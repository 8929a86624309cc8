"""`Strays`: counts vectors that came far from what codes were learned from, so that codes are looked at before many are lost.

To look at codes whenever something changed would take too long, so it is done when one in 8 has come. A group of one in 20 that lies far
off is lost by then: its codes say where it is, and nothing of what is in it. Whether one vector is far is seen at once.
"""
# Shapes: N vectors, D dimension

import numpy as np

from anabranch.graph.hnsw.centres import GAINING, spread_places
from anabranch.graph.hnsw.coded import Coded
from anabranch.graph.hnsw.storage import Storage

# Fewer are no group, and looks for each of a few would take longer than all else.
LEAST = 16

# Vectors of a block that are looked at.
LOOKED_AT = 1024

# Elements beside which it is seen what is far.
BESIDE = 256

# What is usual is worked out again once one in so many came.
OLD = 32

# Codes are not learned anew because of some before so many times as many of them came, nor, where that was in vain, before there are so
# many times as many elements.
AGAIN = 2

# It was in vain where more than this share of the mean squared error stayed.
IN_VAIN = 0.8


def _usual(held: Storage) -> np.ndarray | None:
    slot_S = spread_places(held.count, BESIDE)
    if held.coded is None or not held.coded.is_trained:
        return None
    return held.coded.usual(held.decode(slot_S), slot_S)


def far_among(vector_ND: np.ndarray, held: Storage) -> np.ndarray:
    """Which vectors lie far from what codes of an index were learned from, bool [N]."""
    usual = _usual(held)
    if held.coded is None or usual is None:
        return np.zeros(len(vector_ND), bool)
    return held.coded.far_of(vector_ND, usual)


class Strays:
    """Of one index. Not safe for threads.

    Attributes:
        number: that came since codes were looked at.
        is_unknown: nobody knows, since it was read from a file.
    """

    def __init__(self) -> None:
        self.number, self.is_unknown = 0.0, False
        # Of them, before codes are looked at again; and of all elements.
        self._least, self._least_all = float(LEAST), 0
        # What is usual by these codes, and how many elements there were when that was worked out.
        self._usual: np.ndarray | None = None
        self._seen: Coded | None = None
        self._seen_at = 0

    def count(self, vector_ND: np.ndarray, held: Storage) -> None:
        """Count those of vectors that come."""
        coded = held.coded
        if coded is None or not len(vector_ND):
            return
        # Worked out for each that comes alone it would take half as long as to bring that in.
        if coded is not self._seen or not self._seen_at <= held.count <= self._seen_at + self._seen_at // OLD:
            self._usual, self._seen, self._seen_at = _usual(held), coded, held.count
        if self._usual is None:
            return
        is_far_S = coded.far_of(vector_ND[spread_places(len(vector_ND), LOOKED_AT)], self._usual)
        self.number += float(is_far_S.mean()) * len(vector_ND)

    def are_many(self, count: int) -> bool:
        """Whether codes should be looked at because of them, now that there are ``count`` elements."""
        return self.is_unknown or (self.number >= max(self._least, count / GAINING) and count >= self._least_all)

    def looked(self) -> None:
        """Codes were looked at."""
        self.number, self.is_unknown = 0.0, False

    def learned(self, count: int, number: float, before: float, after: float) -> None:
        """Codes of ``count`` elements were learned anew because of so many; mean squared errors ``before`` and ``after``."""
        self._least = max(LEAST, AGAIN * number)
        # Of vectors that are farther off the fewer they are, some always lie outside of what was learned from.
        if after > IN_VAIN * before:
            self._least_all = AGAIN * count

    def forget(self) -> None:
        """So many others came that it does not matter what was learned because of these."""
        self._least = float(LEAST)
