"""`WaitingQueue`: who is next. Lower priority numbers first; then those that were sent back; then the keys in turn, by tokens.
Within a key an item's own priority goes before its arrival.

Among the keys (whose requests they are) of one priority it is deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): a key in its
turn gets a quantum of tokens and sends requests, oldest first, while their cost is covered; what is left over stays for its next turn.
In any time in which two keys both wait, what they were given differs by at most a quantum and twice the largest cost, but for what is
taken out of turn. With one key it is first come, first served.

That is the order of those that wait, and holds up nobody as long as those that run end soon: a key whose requests have taken all places
of a step keeps them while they last. Who then goes before whom, and which of those that run makes room, is decided by the places that
each key has and by the work that was done for it (`anabranch.serving.core.seats`): a key that has none goes first and is given one
within a bounded number of steps; keys that have many more than another that waits are passed over. A key that is given one out of its
turn is charged for it, and lacks that in its next turns, but never more than the request itself costs.

A request that ends early has used less than it cost, and its key gets the rest back (`WaitingQueue.refund`). Whoever waited already when
the cost was charged was given way to by it, and gives way in turn; whoever came later was not, and does not. So from when on two keys both
wait, one is given more than the bound above by no more than it gave back of what it was given since then.
"""

from collections import Counter, deque
from collections.abc import Container, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue needs to know of an item.

    Attributes:
        rank: (priority, arrival, serial number): the order among items of one key, and of all that were sent back.
        own_priority: goes before the rank among items of one key that were not sent back.
        key: whose it is.
        cost: tokens that it is charged with when it is taken.
    """

    @property
    def rank(self) -> tuple[int, float, int]: ...  # noqa: D102
    @property
    def own_priority(self) -> int: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102


T = TypeVar("T", bound=Waiting)
# Own priority and rank, item.
_Entry = tuple[tuple[int, int, float, int], T]


class WaitingQueue(Generic[T]):
    """Items in the order in which they are to be taken.

    Args:
        quantum: tokens that a key gets in its turn.
    """

    def __init__(self, quantum: int = 512) -> None:
        self._quantum = quantum
        self._levels: dict[int, _Level[T]] = {}
        # Priorities with items, as a heap.
        self._order: list[int] = []
        # By serial number.
        self._where: dict[int, _Flow[T]] = {}
        # How often a key has begun to wait; and by serial number, how often it had when an item was charged for.
        self._joined = 0
        self._charged: dict[int, int] = {}
        # What `peek` has shown in its key's turn.
        self._shown: tuple[T, _Turn[T]] | None = None

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[T]:
        for level in self._levels.values():
            for flow in (level.front, *level.flows.values()):
                yield from (item for order, item in flow.heap if self._where.get(order[-1]) is flow)

    def add(self, item: T) -> None:
        """A new item, to the end of its key's of its own priority."""
        level = self._level(item.rank[0])
        flow = level.flows.get(item.key)
        if flow is None:
            flow = level.flows[item.key] = _Flow(item.key)
            level.active.append(flow)
        if not flow.count:
            self._joined += 1
            flow.joined = self._joined
            flow.credits.clear()
        self._put(item, flow, item.own_priority)

    def add_front(self, item: T) -> None:
        """An item that was taken before and was sent back: before all others of its priority, and not charged again."""
        self._put(item, self._level(item.rank[0]).front)

    def keys(self) -> set[str]:
        """Those with items of the priority that is next."""
        level = self._first_level()
        if level is None:
            return set()
        return {flow.key for flow in level.flows.values() if flow.count} | {item.key for _, item in self._front(level)}

    def first_of(self, key: str) -> T:
        """The next item of one of `keys`, whoever's turn it is."""
        level, self._shown = self._first_level(), None
        assert level is not None, "keys() has it"
        sent_back = [entry for entry in self._front(level) if entry[1].key == key]
        if sent_back:
            return min(sent_back)[1]
        flow = level.flows[key]
        self._trim(flow)
        return flow.heap[0][1]

    def peek(self, passed: Container[str] = ()) -> T | None:
        """The next item, None if there is none. Keys in ``passed`` are passed over, and what their turn has left stays theirs.

        To look changes nothing: turns go by as items are taken.
        """
        level, self._shown = self._first_level(), None
        if level is None:
            return None
        if level.front.count:
            sent_back = [entry for entry in self._front(level) if entry[1].key not in passed]
            if sent_back:
                return min(sent_back)[1]
        turn = self._turn(level, passed)
        if turn is None:
            return None
        self._shown = turn.flow.heap[0][1], turn
        return turn.flow.heap[0][1]

    def pop(self) -> T:
        """Take the item that `peek` shows. Raises IndexError if there is none."""
        item = self.peek()
        if item is None:
            raise IndexError("nothing waits")
        self.take(item)
        return item

    def take(self, item: T) -> None:
        """Take the item that `peek` or `first_of` shows."""
        flow = self._where.pop(item.rank[2])
        flow.count -= 1
        if flow.heap[0][1] is item:
            heappop(flow.heap)
        else:
            self._rebuild(flow)
        level, shown, self._shown = self._levels[item.rank[0]], self._shown, None
        if flow is not level.front:
            if shown is not None and shown[0] is item:
                shown[1].begin(level)
            self._charge(level, flow, item)

    def remove(self, item: T) -> None:
        """Take an item out, wherever it is. Raises KeyError if it is not there."""
        flow = self._where.pop(item.rank[2])
        flow.count -= 1
        # Mostly removed ones: let go of them.
        if len(flow.heap) > 2 * flow.count + 32:
            self._rebuild(flow)

    def refund(self, item: T, tokens: int) -> None:
        """An item has ended: give its key back the ``tokens`` that it paid and did not use, if that has waited ever since.

        One that was never taken has been charged with nothing.
        """
        charged = self._charged.pop(item.rank[2], None)
        level = self._levels.get(item.rank[0])
        flow = None if level is None else level.flows.get(item.key)
        if charged is not None and flow is not None and flow.count and flow.joined <= charged:
            flow.credits[charged] += tokens

    def _charge(self, level: "_Level[T]", flow: "_Flow[T]", item: T) -> None:
        """Of what a key has in its turn, and for the rest of what it was given back; what that lacks it owes."""
        left = item.cost - flow.deficit
        for charged in self._usable(level, flow):
            used = min(max(0, left), flow.credits[charged])
            flow.credits[charged] -= used
            left -= used
        flow.deficit = max(-left, -item.cost)
        # What is used up is let go of.
        flow.credits = +flow.credits
        self._charged[item.rank[2]] = self._joined

    def _has(self, level: "_Level[T]", flow: "_Flow[T]") -> int:
        return flow.deficit + sum(flow.credits[charged] for charged in self._usable(level, flow))

    def _usable(self, level: "_Level[T]", flow: "_Flow[T]") -> list[int]:
        """What a key was given back of charges that all who wait now have waited for."""
        if not flow.credits:
            return []
        newest = max((other.joined for other in level.active if other.count and other is not flow), default=0)
        return [charged for charged in flow.credits if charged >= newest]

    def _level(self, priority: int) -> "_Level[T]":
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level()
            heappush(self._order, priority)
        return level

    def _put(self, item: T, flow: "_Flow[T]", own_priority: int = 0) -> None:
        heappush(flow.heap, ((own_priority, *item.rank), item))
        flow.count += 1
        self._where[item.rank[2]] = flow

    def _first_level(self) -> "_Level[T] | None":
        """That of the lowest number that has items."""
        while self._order:
            level = self._levels[self._order[0]]
            if level.front.count or any(flow.count for flow in level.flows.values()):
                return level
            del self._levels[heappop(self._order)]
        return None

    def _front(self, level: "_Level[T]") -> "list[_Entry[T]]":
        """Those that were sent back, in no order."""
        front = level.front
        return [entry for entry in front.heap if self._where.get(entry[0][-1]) is front] if front.count else []

    def _turn(self, level: "_Level[T]", passed: Container[str]) -> "_Turn[T] | None":
        """The key whose turn it is, but for those that are passed over, and whose deficit then covers its first item."""
        # Who waits for nothing keeps nothing.
        for flow in [flow for flow in level.active if not self._trim(flow)]:
            level.active.remove(flow)
            del level.flows[flow.key]
        able = [flow for flow in level.active if flow.key not in passed]
        turn, unserved = _Turn(level), 0
        lacks = {flow: flow.heap[0][1].cost - self._has(level, flow) for flow in able}
        while able:
            flow = turn.order[0]
            if flow not in lacks:
                turn.order.rotate(-1)
                continue
            if lacks[flow] <= turn.quanta[flow] * self._quantum:
                turn.flow, turn.quantum = flow, self._quantum
                return turn
            # Its quantum is used up.
            if flow in turn.under_way:
                turn.under_way.discard(flow)
                turn.order.rotate(-1)
                continue
            # A whole round without anyone covered: as many rounds as it takes, at once.
            if unserved >= len(able):
                rounds = min(-(-lacks[each] // self._quantum) - turn.quanta[each] for each in able)
                for each in able:
                    turn.quanta[each] += rounds - 1
                unserved = 0
            turn.quanta[flow] += 1
            turn.under_way.add(flow)
            unserved += 1
        return None

    def _trim(self, flow: "_Flow[T]") -> bool:
        """Whether it has items; then the first of its heap is one."""
        heap = flow.heap
        while heap and self._where.get(heap[0][0][-1]) is not flow:
            heappop(heap)
        return bool(heap)

    def _rebuild(self, flow: "_Flow[T]") -> None:
        flow.heap = [entry for entry in flow.heap if self._where.get(entry[0][-1]) is flow]
        heapify(flow.heap)


class _Flow(Generic[T]):
    """Items of one key, or those sent back."""

    __slots__ = ("count", "credits", "deficit", "has_turn", "heap", "joined", "key")

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.heap: list[_Entry[T]] = []
        # Items that were not removed.
        self.count = 0
        self.deficit = 0
        self.has_turn = False
        # When it began to wait; and tokens given back, by when they were charged: numbers of `WaitingQueue._joined`.
        self.joined = 0
        self.credits: Counter[int] = Counter()


class _Level(Generic[T]):
    """All of one priority."""

    __slots__ = ("active", "flows", "front")

    def __init__(self) -> None:
        self.front: _Flow[T] = _Flow()
        self.flows: dict[str, _Flow[T]] = {}
        self.active: deque[_Flow[T]] = deque()


class _Turn(Generic[T]):
    """What a key's turn takes: how the others' go by until then.

    Attributes:
        flow: the key, whose first item is covered then.
        order: of keys.
        quanta: that each gets.
        under_way: keys that have had theirs in this round.
    """

    __slots__ = ("flow", "order", "quanta", "quantum", "under_way")

    def __init__(self, level: _Level[T]) -> None:
        self.order = deque(level.active)
        self.quanta: Counter[_Flow[T]] = Counter()
        self.under_way = {flow for flow in level.active if flow.has_turn}
        self.flow, self.quantum = level.front, 0

    def begin(self, level: _Level[T]) -> None:
        """It is taken. Keys that have come since are last."""
        here = set(self.order)
        self.order.extend([flow for flow in level.active if flow not in here])
        level.active = self.order
        for flow in level.active:
            flow.deficit += self.quanta[flow] * self.quantum
            flow.has_turn = flow in self.under_way
