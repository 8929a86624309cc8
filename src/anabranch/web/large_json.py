"""JSON of megabytes, read and written in steps, so that no other thread waits long for Python's lock.

The json module holds the lock from beginning to end: ten megabytes stop an event loop for a tenth of a second, also when another thread
reads them. What is long in a large body is mostly a few texts (documents, images in base64). Those are cut out, read or written on their
own in short steps, and put back; the rest, in which places are kept for them, is small. A value is written from its beginning to its end,
as much at once as takes no time (`json_slices`), which an event loop may do too.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

from anabranch.web.body import is_too_deep, parse, read_json
from anabranch.web.json_places import long_lists, unescaped_quotes
from anabranch.web.json_text import Rows, to_json

# Bytes of a body, from which on it is worth while to give it to another thread, and to go by steps there.
LARGE = 1 << 18

# So much a body weighs (`weight_of`) from which on it is, too: some thousand short values, which are checked and counted one by one.
HEAVY = 1 << 16

# Objects and lists of a body that are read at once.
_DENSE = 1 << 8

# Characters of a text that is read or written on its own, and of one step.
_LONG, _STEP = 1 << 9, 1 << 17

# No step ends so near behind a backslash: an escape, or the second half of a pair of them, could be cut.
_ESCAPE = 12

# Places for the end of a step that are tried; a text without any is read at once.
_LOOKS = 4096

# A sign that is written as two escapes.
_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]")

# Bytes of the items of a list that are read at once, where the rest of a body is long.
_GROUP = 1 << 16

# What a value weighs beside its text: many short ones take as long as few long ones.
_VALUE = 1 << 6

# What is written at once weighs so much: a thousand numbers, which take about a millisecond.
SLICE = 1 << 16
_NUMBERS = (int, float)

# Bytes of a thousand values that are as short as values are: a slice of `together` that has fewer is the last.
TOGETHER = 1 << 13

# So that no sender can write what stands for a long text.
_SALT = secrets.token_hex(16)


def parse_large(raw: bytes) -> dict[str, Any]:
    """What `anabranch.web.body.parse` gives, or raises, of the same body."""
    body = _in_steps(raw, read_json)
    # What is wrong with it is told as ever, of the body as it came.
    return parse(raw) if body is None else body


def is_long_to_read(parts: Sequence[bytes]) -> bool:
    """Whether the pieces of a body would hold up an event loop: of many bytes, or of many objects and lists, however short."""
    if sum(map(len, parts)) > LARGE:
        return True
    return sum(part.count(b"{") + part.count(b"[") for part in parts) > _DENSE


def load_large(raw: bytes, read: Callable[[str], Any] | None = None) -> Any:
    """What ``json.loads``, or ``read``, gives of the same text, or raises: a ValueError, or RecursionError."""
    value = _in_steps(raw, read or json.loads)
    if value is not None:
        return value
    return json.loads(raw) if read is None else read(raw.decode("utf-8"))


def _in_steps(raw: bytes, read: Callable[[str], Any]) -> dict[str, Any] | None:
    """An object; None for what is none, or is wrong or odd, and is to be read at once.

    Args:
        raw: JSON.
        read: reads a piece of it. Raises ValueError.
    """
    quotes = unescaped_quotes(raw)
    if len(quotes) % 2:
        return None
    pieces: list[bytes] = []
    texts: list[str] = []
    mark, kept = secrets.token_hex(16), 0
    starts, ends = quotes[0::2], quotes[1::2]
    is_long = ends - starts > _LONG
    for start, end in zip(starts[is_long].tolist(), ends[is_long].tolist(), strict=True):
        text = _text(raw, start + 1, end)
        if text is None:
            return None
        pieces += (raw[kept:start], f'"{mark}{len(texts)}"'.encode())
        texts.append(text)
        kept = end + 1
    rest = b"".join([*pieces, raw[kept:]]) if texts else raw
    try:
        body = _grouped(rest, mark, read) if len(rest) > _GROUP else read(rest.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    if not texts:
        return body
    if is_too_deep(body):
        return None
    places = {f"{mark}{number}": text for number, text in enumerate(texts)}
    found: dict[str, Any] = _mapped(body, lambda text: places.get(text, text))
    return found


def _grouped(raw: bytes, mark: str, read: Callable[[str], Any]) -> Any:
    """What ``read`` gives of a text, the items of its long lists read some at a time. Raises what that does, and ValueError."""
    groups: list[list[Any]] = []
    pieces: list[bytes] = []
    kept = 0
    for start, end, commas in long_lists(raw, _GROUP):
        cuts = [start, *_spread(commas, start), end]
        for before, behind in pairwise(cuts):
            items = read("[" + raw[before + 1 : behind].decode("utf-8") + "]")
            if not items:
                raise ValueError("a comma with nothing before it or behind it")
            groups.append(items)
        names = ",".join(f'"{mark}g{number}"' for number in range(len(groups) - len(cuts) + 1, len(groups)))
        pieces += (raw[kept : start + 1], names.encode())
        kept = end
    body = read(b"".join([*pieces, raw[kept:]]).decode("utf-8"))
    if not isinstance(body, dict):
        raise ValueError("no object")
    places = {f"{mark}g{number}": items for number, items in enumerate(groups)}
    for name, value in body.items():
        if isinstance(value, list) and value and isinstance(value[0], str) and value[0] in places:
            body[name] = list(chain.from_iterable(places[place] for place in value))
    return body


def _spread(commas: "np.ndarray", start: int) -> list[int]:
    """Some of the places, each at least a group behind the one before."""
    chosen, at = [], start
    while (next_ := int(np.searchsorted(commas, at + _GROUP))) < len(commas):
        at = int(commas[next_])
        chosen.append(at)
    return chosen


def _text(raw: bytes, start: int, end: int) -> str | None:
    """The text between its quotes; None if it may not be so."""
    parts = []
    while start < end:
        stop = _cut(raw, start, end)
        piece = raw[start:stop]
        if np.any(np.frombuffer(piece, np.uint8) < 0x20):
            return None
        try:
            text = piece.decode("utf-8")
            parts.append(json.loads(f'"{text}"') if "\\" in text else text)
        except ValueError:
            return None
        start = stop
    return "".join(parts)


def _cut(raw: bytes, start: int, end: int) -> int:
    """Where a step that begins at ``start`` ends: before a whole sign, and within no escape or pair of them."""
    first = start + _STEP
    if first >= end:
        return end
    for stop in range(first, min(first + _LOOKS, end)):
        if raw[stop] & 0xC0 == 0x80:
            # The middle of a sign.
            continue
        if b"\\" not in raw[max(start, stop - _ESCAPE) : stop + 1]:
            return stop
        if raw[stop] != 0x5C:
            continue
        # An escape may begin here, but not the second half of a pair.
        run = stop - start - len(raw[start:stop].rstrip(b"\\"))
        if run % 2 == 0 and not _PAIR.match(raw, max(start, stop - 6), end):
            return stop
    return end


def dump_large(value: Any, *, allow_nan: bool = False) -> bytes:
    """The same as ``json.dumps(value, separators=(",", ":"), allow_nan=allow_nan).encode()``."""
    return b"".join(dump_parts(value, allow_nan=allow_nan))


def dump_parts(value: Any, *, allow_nan: bool = False) -> list[bytes]:
    """`dump_large` in parts: to put megabytes together from bytes takes no lock of Python's, and to copy them as they grow does."""

    def dump(part: Any) -> bytes:
        return json.dumps(part, separators=(",", ":"), allow_nan=allow_nan).encode()

    return list(json_slices(value, dump))


def json_slices(value: Any, dump: Callable[[Any], bytes] = to_json) -> Iterator[bytes]:
    """The JSON that ``dump`` makes of a value, in slices that take about a millisecond: an event loop that makes them can turn between.

    A slice has what weighs `SLICE` (`weight_of`), twice that at most; of `Rows` no more is made than it has. Only an object's names are
    bounded by nothing.

    Args:
        value: dicts, lists, `Rows` and so on.
        dump: makes JSON of a light part.

    Raises what ``dump`` does.
    """
    held: list[bytes] = []
    weight = 0
    # What stands between two items.
    comma = dump([0, 0])[2:-2]
    for part, more in _parts(value, dump, comma):
        held.append(part)
        weight += more
        if weight >= SLICE:
            yield b"".join(held)
            held, weight = [], 0
    if held:
        yield b"".join(held)


def together(slices: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer slices: small ones together, as many as take no longer to make than one does.

    Raises what making one does, behind those that were made.
    """
    held: list[bytes] = []
    size = 0
    try:
        for piece in slices:
            held.append(piece)
            size += len(piece)
            if size >= TOGETHER:
                yield b"".join(held)
                held, size = [], 0
    except Exception:
        if held:
            yield b"".join(held)
        raise
    if held:
        yield b"".join(held)


def is_light(value: Any) -> bool:
    """Whether the JSON of a value is but one slice, which can as well be made at once."""
    return weight_of(value, SLICE) <= SLICE


def _parts(value: Any, dump: Callable[[Any], bytes], comma: bytes) -> Iterator[tuple[bytes, int]]:
    """Pieces of a value's JSON, with what each weighs."""
    weight = weight_of(value, SLICE)
    if weight <= SLICE:
        yield dump(value), weight
    elif isinstance(value, str):
        yield b'"', 0
        for start in range(0, len(value), SLICE):
            yield dump(value[start : start + SLICE])[1:-1], min(SLICE, len(value) - start)
        yield b'"', 0
    elif isinstance(value, dict):
        for place, (name, inner) in enumerate(value.items()):
            # The name as JSON has it, and what stands behind it.
            yield (comma if place else b"{") + dump({name: 0})[1:-2], _VALUE + len(str(name))
            yield from _parts(inner, dump, comma)
        yield b"}" if value else b"{}", 0
    elif isinstance(value, list | tuple | Rows):
        yield b"[", 0
        yield from _items(value, dump, comma)
        yield b"]", 0
    else:
        yield dump(value), weight


def _items(items: Iterable[Any], dump: Callable[[Any], bytes], comma: bytes) -> Iterator[tuple[bytes, int]]:
    """Those of a list, light ones together."""
    group: list[Any] = []
    held, before = 0, b""
    for item in items:
        weight = _VALUE if type(item) in _NUMBERS else weight_of(item, SLICE)
        if group and (weight > SLICE or held >= SLICE):
            yield before + dump(group)[1:-1], held
            group, held, before = [], 0, comma
        if weight > SLICE:
            yield before, 0
            yield from _parts(item, dump, comma)
            before = comma
        else:
            group.append(item)
            held += weight
    if group:
        yield before + dump(group)[1:-1], held


def shortened(value: Any) -> Any:
    """A copy in which a digest stands for each long text: equal where ``value`` is, in this process."""

    def short(text: str) -> str:
        if len(text) <= _LONG:
            return text
        digest = hashlib.sha256()
        for piece in utf8_pieces(text):
            digest.update(piece)
        return _SALT + digest.hexdigest()

    return _mapped(value, short)


def utf8_pieces(text: str) -> Iterator[bytes]:
    """A text in UTF-8, half of a surrogate pair too, some at a time: megabytes that are not ASCII would be written in one go."""
    for start in range(0, len(text), _STEP):
        yield text[start : start + _STEP].encode("utf-8", "surrogatepass")


def num_bytes(text: str) -> int:
    """Of a text in UTF-8, half of a surrogate pair too."""
    return len(text) if text.isascii() else sum(len(piece) for piece in utf8_pieces(text))


def weight_of(value: Any, most: int = LARGE) -> int:
    """About the bytes of its JSON, counted only until there are more than ``most``: to see whether a value is large, in next to no time."""
    weight, left = 0, [value]
    while left and weight <= most:
        one = left.pop()
        weight += _VALUE
        if isinstance(one, str):
            weight += len(one)
        elif isinstance(one, dict):
            weight += sum(len(name) for name in one if isinstance(name, str))
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            # Each weighs something: the rest of a long list is not needed to see that it is one.
            left.extend(one[: most // _VALUE + 1])
        elif isinstance(one, Rows):
            # How many they are is not known before they are made.
            return most + 1
    return weight


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with other texts, those that are names of values among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            change(name) if isinstance(name, str) else name: _mapped(inner, change) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(inner, change) for inner in value]
    return value
