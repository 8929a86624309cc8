"""`Window`: the rows of one origin that are kept, by who told them, and which of them goes where there are too many.

Without signatures anyone can write rows in anyone's name, with any numbers. So the rows of whoever told most go first: one who floods an
origin pushes out what they told themselves, and of what others told at most as much as leaves each the same number.
"""

import heapq
from collections import Counter

# Numbers in a heap that stand for no row, beside as many as there are rows.
STALE = 16


class Window:
    """Numbers, each told by one neighbour. All methods take O(log rows + neighbours), over many calls.

    With one neighbour the lowest number goes first: the newest rows are kept.
    """

    __slots__ = ("_count", "_lowest", "_teller")

    def __init__(self) -> None:
        self._teller: dict[int, str] = {}
        self._count: Counter[str] = Counter()
        # Heaps of the numbers that each told, and of some that went.
        self._lowest: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._teller)

    def add(self, number: int, teller: str) -> None:
        """A row is kept now. Its number is not there yet."""
        self._teller[number] = teller
        self._count[teller] += 1
        heapq.heappush(self._lowest.setdefault(teller, []), number)

    def remove(self, number: int) -> None:
        """It is kept no more."""
        teller = self._teller.pop(number)
        self._count[teller] -= 1
        left = self._count[teller]
        if not left:
            del self._count[teller], self._lowest[teller]
            return
        heap = self._lowest[teller]
        if len(heap) > 2 * left + STALE:
            # Once a number comes again, it may be there twice.
            self._lowest[teller] = sorted({number for number in heap if self._teller.get(number) == teller})

    def next_to_go(self) -> int:
        """The lowest number of those that the neighbour told of whom most are kept; of several such, the lowest of all. There is one."""
        teller = min(self._count, key=lambda teller: (-self._count[teller], self.lowest_of(teller)))
        return self.lowest_of(teller)

    def lowest(self) -> int:
        """Of all numbers. There is one."""
        return min(map(self.lowest_of, self._lowest))

    def teller_of(self, number: int) -> str:
        """Who told a row that is kept."""
        return self._teller[number]

    def count_of(self, teller: str) -> int:
        """Rows that one told."""
        return self._count[teller]

    def lowest_of(self, teller: str) -> int:
        """The lowest number that one told, who told some."""
        heap = self._lowest[teller]
        while self._teller.get(heap[0]) != teller:
            heapq.heappop(heap)
        return heap[0]
