"""A row of the click log, its form on the wire, and the vector that says which rows a peer has.

A row is identified by (origin, number). On the wire it is a JSON list of its fields, strictly checked on the way in. A vector is,
by origin, the numbers held as rising half-open ranges ``[low, high, low, high, ...]``: one range where the log of an origin is
whole, more after a bootstrap by a random share.
"""

import bisect
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.errors import DataError
from anabranch.graph.rank.items import ID_LIMIT, TEXT_LIMIT, Id, Item, fault_of_item

SHOWN_LIMIT = 100
NUMBER_LIMIT = 2**53
Vector = dict[str, list[int]]

# An origin and a number: where a part of all rows, in this order, begins (with it) and ends (before it).
Key = tuple[str, int]
Part = tuple[Key, Key]
START: Key = ("", 0)
# No origin is called "", and no row is there before it.
END: Key = ("", -1)


@dataclass(frozen=True, slots=True)
class Row:
    """One click.

    Attributes:
        origin: the node whose user clicked.
        number: of this click among the origin's, from 0.
        term: normalised.
        item: id of what was clicked.
        title: of the item, as are artist and tags, so that a peer without the item can rank and match it.
        artist: see title.
        tags: see title.
        shown: ids of the results shown, the first 100.
        time: seconds, by the origin's clock; None without one.
        signature: hexadecimal, of the content; empty without one.
    """

    origin: str
    number: int
    term: str
    item: Id
    title: str = ""
    artist: str = ""
    tags: tuple[str, ...] = ()
    shown: tuple[Id, ...] = ()
    time: float | None = None
    signature: str = ""

    def content(self) -> tuple:
        """All but the signature."""
        return (*self.key, self.term, self.item, self.title, self.artist, self.tags, self.shown, self.time)

    @property
    def key(self) -> tuple[str, int]:
        """Origin and number."""
        return self.origin, self.number

    def signed_bytes(self) -> bytes:
        """What a signature covers."""
        return b"anabranch.rank.row\0" + dump(self.content())

    def to_json(self) -> list[Any]:
        """The row as JSON holds it."""
        return [*self.content()[:6], list(self.tags), list(self.shown), self.time, self.signature]

    def size(self) -> int:
        """Bytes on the wire."""
        return len(dump(self.to_json()))

    def metadata(self) -> Item:
        """The item as this row describes it."""
        return Item(self.item, self.title, self.artist, self.tags)


def dump(value: Any) -> bytes:
    """A value as it goes on the wire."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def row_from_json(value: Any) -> Row:
    """The row of a JSON list. Raises DataError that says what is wrong with it."""
    if not isinstance(value, list | tuple) or len(value) != 10:
        raise DataError("a row is a list of 10 fields")
    origin, number, term, item, title, artist, tags, shown, time, signature = value
    if not is_node(origin):
        raise DataError(f"an origin is a text of 1 to {ID_LIMIT} characters")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < NUMBER_LIMIT:
        raise DataError("a row's number is a whole number from 0 to 2**53")
    if not isinstance(term, str) or not 0 < len(term) <= TEXT_LIMIT:
        raise DataError(f"a term has 1 to {TEXT_LIMIT} characters")
    if not isinstance(tags, list | tuple) or not isinstance(shown, list | tuple) or len(shown) > SHOWN_LIMIT:
        raise DataError(f"tags and shown results are lists, the latter of at most {SHOWN_LIMIT}")
    wrong = fault_of_item(item, title, artist, tuple(tags))
    if wrong is None and any(fault_of_item(other, "", "", ()) for other in shown):
        wrong = "a shown result is not an id"
    if wrong:
        raise DataError(wrong)
    if time is not None and (isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time)):
        raise DataError("a time is a finite number or null")
    if not isinstance(signature, str) or len(signature) > ID_LIMIT:
        raise DataError(f"a signature is a text of at most {ID_LIMIT} characters")
    return Row(origin, number, term, item, title, artist, tuple(tags), tuple(shown), time, signature)


def is_node(value: Any) -> bool:
    """Whether this can be the name of a node."""
    return isinstance(value, str) and 0 < len(value) <= ID_LIMIT


def check_vector(value: Any) -> Vector:
    """A vector from the wire or a file. Raises DataError if it is none."""
    if not isinstance(value, Mapping):
        raise DataError("a vector is an object of ranges by origin")
    for origin, ranges in value.items():
        good = is_node(origin) and isinstance(ranges, list | tuple) and len(ranges) % 2 == 0
        good = good and all(isinstance(end, int) and not isinstance(end, bool) for end in ranges)
        if not good or any(low >= high for low, high in itertools.pairwise(ranges)) or min(ranges, default=0) < 0:
            raise DataError(
                f"a vector has rising ranges [low, high, low, high, ...] by origin; that of {origin!r:.80} is none"
            )
    return {origin: list(ranges) for origin, ranges in value.items()}


def check_part(value: Any) -> Part:
    """A part of all rows from the wire: ``[[origin, number], [origin, number]]``, null in place of one for the start or the end.

    Raises DataError if it is none.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise DataError("a part of all rows has a start and an end")
    found = [_check_key(key, default) for key, default in zip(value, (START, END), strict=True)]
    if found[1] != END and found[0] > found[1]:
        raise DataError("a part of all rows ends before it starts")
    return found[0], found[1]


def _check_key(value: Any, default: Key) -> Key:
    if value is None:
        return default
    good = isinstance(value, list | tuple) and len(value) == 2 and is_node(value[0]) and isinstance(value[1], int)
    if not good or isinstance(value[1], bool) or not 0 <= value[1] <= NUMBER_LIMIT:
        raise DataError("a place among rows is an origin and a number")
    return str(value[0]), int(value[1])


class Ranges:
    """A set of whole numbers as rising half-open ranges that do not touch."""

    __slots__ = ("ends",)

    def __init__(self, ends: list[int] | None = None) -> None:
        self.ends: list[int] = [] if ends is None else list(ends)

    def __contains__(self, number: int) -> bool:
        return bisect.bisect_right(self.ends, number) % 2 == 1

    def add(self, low: int, high: int | None = None) -> None:
        """Take in ``low``, or all from ``low`` to before ``high``."""
        high = low + 1 if high is None else high
        # The usual case: the next number of a log that is whole.
        if self.ends and low == self.ends[-1]:
            self.ends[-1] = high
            return
        # An end equal to low belongs to a range that touches.
        first = bisect.bisect_left(self.ends, low)
        last = bisect.bisect_right(self.ends, high)
        self.ends[first:last] = [*([low] if first % 2 == 0 else []), *([high] if last % 2 == 0 else [])]

    def between(self, low: int, high: int) -> list[int]:
        """The ends of what is here from ``low`` to before ``high``."""
        if low >= high:
            return []
        first, last = bisect.bisect_right(self.ends, low), bisect.bisect_left(self.ends, high)
        return [*([low] if first % 2 else []), *self.ends[first:last], *([high] if last % 2 else [])]

    def without(self, other: "Ranges") -> Iterator[tuple[int, int]]:
        """The ranges of what is here and not in ``other``."""
        if self.ends == other.ends:
            return
        for low, high in zip(self.ends[::2], self.ends[1::2], strict=True):
            place = bisect.bisect_right(other.ends, low)
            # Low lies within one of the other's ranges.
            if place % 2 == 1:
                low, place = other.ends[place], place + 1
            while low < high:
                end = min(high, other.ends[place]) if place < len(other.ends) else high
                yield low, end
                if end == high:
                    break
                low, place = other.ends[place + 1], place + 2

    @property
    def end(self) -> int:
        """One more than the largest; 0 if empty."""
        return self.ends[-1] if self.ends else 0
