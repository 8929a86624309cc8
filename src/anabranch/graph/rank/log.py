"""The click log of a peer: sequences of rows by origin, merged as sets, with the counts that rankings need kept up to date.

    n[Q][item][origin]      clicks of an origin on an item for a term: what scores sum over
    clicks[origin]          the same by origin: what similarity compares

Merging is union: rows may come in any order, in any parts and any number of times. A second row of one key with other content is
refused and its origin marked; only then does it matter which came first. Where both rows are signed that is proof, and the
origin's clicks no longer weigh anything; where they are not, anyone could have written either, so a mark is only told.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from anabranch.graph.rank.defences import Defences
from anabranch.graph.rank.items import Id, Item
from anabranch.graph.rank.rows import END, NUMBER_LIMIT, START, Key, Part, Ranges, Row, Vector, dump
from anabranch.graph.rank.window import Window

TermKey = Callable[[str], Any]

# Bytes of JSON around an origin and its ranges: a colon, brackets, a comma.
AROUND_ORIGIN = 4

# Times that are remembered of rows that went, beside as many as there are rows.
STALE_TIMES = 1024

# Ends of ranges that are kept of an origin, beside four for each of its rows.
MORE_ENDS = 64

# Of a log that is full, what is freed at once.
FREED = 0.01


class ClickLog:
    """Rows by origin and number.

    Attributes:
        own: the node whose log it is.
        count: ``count[Q][item][origin]``, clicks.
        clicks: ``clicks[origin][Q, item]``, the same.
        terms: ``terms[origin][Q]``, clicks for a term.
        items: ``items[origin][item]``, clicks on an item.
        popularity: clicks on an item.
        marked: origins of which two rows of one key with different content were seen, and how often.
        distrusted: those of which this is proven.
        num_rows: rows held.
        num_bytes: bytes of them on the wire.
    """

    def __init__(self, own: str, defences: Defences, term_key: TermKey, is_signed: Callable[[Row], bool]) -> None:
        self.own, self.defences, self.term_key, self._is_signed = own, defences, term_key, is_signed
        self.rows: dict[str, dict[int, Row]] = {}
        self.held: dict[str, Ranges] = {}
        self.count: dict[Any, dict[Id, Counter[str]]] = {}
        self.clicks: dict[str, Counter[tuple[Any, Id]]] = defaultdict(Counter)
        self.terms: dict[str, Counter[Any]] = defaultdict(Counter)
        self.items: dict[str, Counter[Id]] = defaultdict(Counter)
        self.popularity: Counter[Id] = Counter()
        self.claims: dict[Id, dict[Item, Counter[str]]] = {}
        self.marked: Counter[str] = Counter()
        self.distrusted: set[str] = set()
        self.num_rows = self.num_bytes = 0
        # A heap of the times of rows that are kept, and of some that went.
        self._by_time: list[tuple[float, str, int]] = []
        # Of origins that have rows.
        self._windows: dict[str, Window] = {}
        # Rows that each neighbour told.
        self._told: Counter[str] = Counter()
        self._lost: set[str] = set()

    # Taking rows in

    def add(self, row: Row, *, is_ours: bool = False, now: float | None = None, teller: str = "") -> str:
        """Take a row in: "added", "known" if it was there or is too old to count, else why it is refused.

        The reasons: "signature", "forged" (in our own name), "conflict", "future", "full".

        Args:
            row: to take.
            is_ours: it comes from this node itself, or from its own store.
            now: seconds; None without a clock.
            teller: the neighbour who told it; "" for this node.
        """
        if self.defences.signed and not self._is_signed(row):
            return "signature"
        known = self.rows.get(row.origin, {}).get(row.number)
        if known is not None:
            return "known" if known.content() == row.content() else self._conflict(row)
        held = self.held.get(row.origin)
        # Seen, and dropped since.
        if held is not None and row.number in held:
            return "known"
        if row.origin == self.own and not is_ours and not self.defences.signed:
            return "forged"
        ttl = self.defences.ttl
        if ttl is not None and now is not None and row.time is not None:
            # It would outlive all others.
            if row.time > now + ttl:
                return "future"
            if row.time < now - ttl:
                # It comes again where it is not noted, which is better than that it costs others their place.
                is_short = (
                    len(held.ends) < 2 * self._most if held is not None else len(self.held) < self.defences.max_rows
                )
                if is_short:
                    self._hold(row)
                return "known"
        # Last: what makes place for a row is gone, so the row has to come.
        if row.origin != self.own and not self._has_place(row.origin, teller):
            return "full"
        self._hold(row)
        self._count(row, 1)
        own = self.rows.setdefault(row.origin, {})
        own[row.number] = row
        self._windows.setdefault(row.origin, Window()).add(row.number, teller)
        self._told[teller] += 1
        if self.defences.rows_per_origin is not None:
            self._make_room(row.origin, self.defences.rows_per_origin)
        if row.time is not None and ttl is not None and row.number in own:
            self._note_time(row.time, row)
        return "added" if row.number in own else "known"

    def _conflict(self, row: Row) -> str:
        if row.origin == self.own:
            return "forged"
        self.marked[row.origin] += 1
        # Both rows carry its signature.
        if self.defences.signed:
            self.distrusted.add(row.origin)
        return "conflict"

    def _hold(self, row: Row) -> None:
        held = self.held.setdefault(row.origin, Ranges())
        held.add(row.number)
        # Rows that expire, or are pushed out, leave what was held of them.
        if self.defences.signed:
            # No more of it than there may be rows.
            if len(held.ends) > 2 * self._most:
                held.add(0, held.ends[2])
        elif len(held.ends) > 4 * self._most + MORE_ENDS:
            # Anyone may have written the high numbers, and who does must not end what the low ones say: what went may come again.
            self._hold_kept(row.origin, row.number)

    def _note_time(self, time: float, row: Row) -> None:
        heapq.heappush(self._by_time, (time, *row.key))
        if len(self._by_time) > 2 * self.num_rows + STALE_TIMES:
            self._by_time = sorted({entry for entry in self._by_time if self._is_of(*entry)})

    def _is_of(self, time: float, origin: str, number: int) -> bool:
        """Whether the row is there, and has this time."""
        row = self.rows.get(origin, {}).get(number)
        return row is not None and row.time == time

    @property
    def _most(self) -> int:
        """Rows of an origin, at most."""
        return self.defences.rows_per_origin or self.defences.max_rows

    def _make_room(self, origin: str, limit: int) -> None:
        """Keep ``limit`` rows of an origin: rows are counted, not numbers, which anyone may leave out.

        Signed, these are the newest. Unsigned, whoever told most gives way, see `Window`.
        """
        own, window = self.rows[origin], self._windows[origin]
        while len(own) > limit:
            self._drop(origin, window.lowest() if self.defences.signed else window.next_to_go())
        # What is older than the newest ones is not asked for again. Where numbers may be anybody's, that would end an origin's rows.
        if self.defences.signed and len(own) == limit:
            self.held[origin].add(0, window.lowest())

    def _has_place(self, origin: str, teller: str) -> bool:
        """Whether one more row of another may come in. Where the log is full, the neighbour who told most of it makes place for others."""
        limit = self.defences.max_rows
        # One may be our own.
        if origin not in self.held and len(self.held) >= limit and len(self.held) > len(self._windows) + 1:
            # Of these nothing is left but what was once held. Our own say which number is next.
            for name in [name for name in self.held if name not in self._windows and name != self.own]:
                self._forget(name)
        if origin not in self.held and len(self.held) >= limit > self.num_rows:
            return False
        if self.num_rows >= limit:
            most = max((name for name in self._told if name), key=self._told.__getitem__, default="")
            if self._told[teller] + 1 >= self._told[most]:
                return False
            self._free(most, max(1, int(FREED * limit)))
        return True

    def _free(self, teller: str, count: int) -> None:
        """Drop so many rows that one told, oldest first, of the origins of which they told most; others may tell them again."""
        told = {origin: window.count_of(teller) for origin, window in self._windows.items() if origin != self.own}
        for origin in sorted(told, key=lambda origin: (-told[origin], origin)):
            gone = min(count, told[origin])
            if not gone:
                return
            for _ in range(gone):
                self._drop(origin, self._windows[origin].lowest_of(teller))
            self._lost.add(origin)
            self._hold_kept(origin)
            count -= gone

    def _hold_kept(self, origin: str, *more: int) -> None:
        """Forget what was held of an origin but for the rows that are kept, and ``more``."""
        kept = sorted({*self.rows.get(origin, ()), *more})
        if not kept:
            self._forget(origin)
            return
        self.held[origin] = held = Ranges()
        for number in kept:
            held.add(number)

    def _forget(self, origin: str) -> None:
        """An origin without rows."""
        for table in (self.held, self.rows, self.clicks, self.terms, self.items):
            table.pop(origin, None)

    def take_lost(self) -> set[str]:
        """Origins that lost rows to those of others since the last call."""
        lost, self._lost = self._lost, set()
        return lost

    def expire(self, now: float) -> set[str]:
        """Drop rows that are older than ``ttl``; the origins that lost some."""
        touched: set[str] = set()
        while self._by_time and self.defences.ttl is not None and self._by_time[0][0] < now - self.defences.ttl:
            time, origin, number = heapq.heappop(self._by_time)
            if self._is_of(time, origin, number):
                self._drop(origin, number)
                touched.add(origin)
        return touched

    def _drop(self, origin: str, number: int) -> None:
        self._count(self.rows[origin].pop(number), -1)
        window = self._windows[origin]
        _change(self._told, window.teller_of(number), -1)
        window.remove(number)
        if not window:
            del self._windows[origin]

    def teller_of(self, row: Row) -> str:
        """The neighbour who told a row that is kept; "" for this node, and where that was not noted."""
        return self._windows[row.origin].teller_of(row.number)

    def _count(self, row: Row, change: int) -> None:
        """O(1) updates of every count; what falls to 0 is removed, so that sizes of dictionaries are numbers of distinct things."""
        term, item, origin = self.term_key(row.term), row.item, row.origin
        by_item = self.count.setdefault(term, {})
        _change(by_item.setdefault(item, Counter()), origin, change)
        claims = self.claims.setdefault(item, {})
        claim = row.metadata()
        _change(claims.setdefault(claim, Counter()), origin, change)
        _change(self.clicks[origin], (term, item), change)
        _change(self.terms[origin], term, change)
        _change(self.items[origin], item, change)
        _change(self.popularity, item, change)
        if change < 0:
            places: list[tuple[dict[Any, Any], Any]]
            places = [(by_item, item), (self.count, term), (claims, claim), (self.claims, item)]
            for outer, key in places:
                if not outer[key]:
                    del outer[key]
        self.num_rows += change
        self.num_bytes += change * row.size()

    def restore(self, origin: str, ends: list[int]) -> None:
        """Note that these numbers were held once, so that rows dropped before a save are not asked for again."""
        held = self.held.setdefault(origin, Ranges())
        for low, high in zip(ends[::2], ends[1::2], strict=True):
            held.add(low, high)

    # Giving rows out

    def vector(self) -> Vector:
        """Which rows are held, or were."""
        return {origin: list(held.ends) for origin, held in self.held.items()}

    def part(self, begin: Key, room: int) -> tuple[Vector, Key]:
        """As much of the vector from ``begin`` on as ``room`` bytes of JSON hold, and where the rest begins (`END` for none).

        What is held of the keys between the two is all in it, so a question about these is a true one, however long the vector is.
        """
        found: Vector = {}
        for origin in sorted(origin for origin in self.held if origin >= begin[0]):
            ends = self.held[origin].ends
            if origin == begin[0]:
                ends = Ranges(ends).between(begin[1], NUMBER_LIMIT)
            if not ends:
                continue
            room -= len(dump(origin)) + AROUND_ORIGIN
            taken = 0
            while taken < len(ends) and room >= 0:
                room -= len(str(ends[taken])) + len(str(ends[taken + 1])) + 2
                taken += 2
            taken -= 2 * (room < 0 and taken > 0)
            if taken:
                found[origin] = ends[:taken]
            if room < 0:
                return found, (origin, ends[taken])
        return found, END

    def beyond(self, since: Vector, part: Part = (START, END)) -> Iterator[tuple[str, list[int]]]:
        """Numbers of the rows in ``part`` that ``since`` lacks, rising, by origin: our own first, then the others in order."""
        begin, end = part
        asked = (origin for origin in self.rows if begin[0] <= origin and (end == END or origin <= end[0]))
        for origin in sorted(asked, key=lambda origin: (origin != self.own, origin)):
            rows = self.rows[origin]
            low = begin[1] if origin == begin[0] else 0
            high = end[1] if end != END and origin == end[0] else NUMBER_LIMIT
            held = Ranges(self.held[origin].between(low, high))
            missing = held.without(Ranges(since.get(origin)))
            numbers = [number for low, high in missing for number in _present(rows, low, high)]
            if numbers:
                yield origin, numbers

    def all_rows(self) -> Iterator[Row]:
        """Every row, by origin and number."""
        for origin in sorted(self.rows):
            for number in sorted(self.rows[origin]):
                yield self.rows[origin][number]

    def metadata(self, item: Id) -> Item:
        """An item as most origins describe it; of equally many, the first in order of their text."""
        claims = self.claims.get(item, {})
        if not claims:
            return Item(item)
        return min(claims, key=lambda claim: (-len(claims[claim]), claim.title, claim.artist, claim.tags))


def _change(counter: Counter, key: Any, change: int) -> None:
    counter[key] += change
    if not counter[key]:
        del counter[key]


def _present(rows: dict[int, Row], low: int, high: int) -> list[int]:
    """The numbers from ``low`` to before ``high`` that are among ``rows``, rising."""
    if high - low <= len(rows):
        return [number for number in range(low, high) if number in rows]
    return sorted(number for number in rows if low <= number < high)
