"""Sums whose bits do not depend on who added what: one fixed binary tree over the blocks of a batch.

    left, right = TreeSum(5), TreeSum(5)          # five blocks, cut anywhere between two ranks
    ...                                           # left.add(0, g0); left.add(1, g1); right.add(2, g2); ...
    for node, value in right.nodes(): left.add_node(node, value)
    left.root()

A node (level, place) is the sum of its two children, or its only child. Whoever has both children adds them, so a rank with a run of blocks
has at most two nodes a level left, and the sum of all is the same to the bit however the runs were cut.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from anabranch.errors import InputError

__all__ = ["Node", "TreeSum"]

Node = tuple[int, int]
T = TypeVar("T")


class TreeSum(Generic[T]):
    """A sum over ``leaves`` blocks, as far as they are here.

    Args:
        leaves: of all, here or elsewhere.
        add: of two values, left and right; default ``+``.
    """

    def __init__(self, leaves: int, add: Callable[[T, T], T] | None = None) -> None:
        if leaves < 1:
            raise InputError(f"leaves is {leaves}; use at least 1")
        self._widths = [leaves]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._add: Callable[[T, T], T] = add or (lambda left, right: left + right)  # type: ignore[operator]
        self._have: dict[Node, T] = {}

    def add(self, leaf: int, value: T) -> None:
        """The value of one block."""
        self.add_node((0, leaf), value)

    def add_node(self, node: Node, value: T) -> None:
        """The sum of a node's blocks. Raises InputError for one that is not there, or is there already."""
        level, place = node
        if not (0 <= level < len(self._widths) and 0 <= place < self._widths[level]):
            raise InputError(f"the tree of {self._widths[0]} blocks has no node {node}")
        while level < len(self._widths) - 1:
            other = place ^ 1
            if other < self._widths[level]:
                if (level, other) not in self._have:
                    break
                sibling = self._have.pop((level, other))
                value = self._add(sibling, value) if other < place else self._add(value, sibling)
            level, place = level + 1, place // 2
        if (level, place) in self._have:
            raise InputError(f"node {node} was added before")
        self._have[level, place] = value

    def nodes(self) -> Iterator[tuple[Node, T]]:
        """What is here, in order, for another to add."""
        return iter(sorted(self._have.items(), key=lambda item: item[0]))

    def root(self) -> T:
        """The sum. Raises InputError where blocks are missing."""
        top = (len(self._widths) - 1, 0)
        if set(self._have) != {top}:
            raise InputError(
                f"the sum of {self._widths[0]} blocks is not whole: there are the nodes {sorted(self._have)}"
            )
        return self._have[top]
