"""Characters as bytes: ranges of code points in UTF-8, and as they are written inside a JSON string."""

from collections.abc import Iterable

from anabranch.serving.grammar.machine import Machine

__all__ = ["ALL", "Ranges", "complement", "intersect", "json_character", "json_literal", "normal", "utf8_character"]

Ranges = tuple[
    tuple[int, int], ...
]  # of code points, both ends inside, in order, apart from each other, without surrogates

ALL: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
_LAST = 0x10FFFF
_SHORT = {0x22: '"', 0x5C: "\\", 0x2F: "/", 8: "b", 12: "f", 10: "n", 13: "r", 9: "t"}  # after a backslash
_BARE: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, _LAST))  # written as they are
_UTF8 = ((0, 0x7F, 0, 1), (0x80, 0x7FF, 0xC0, 2), (0x800, 0xFFFF, 0xE0, 3), (0x10000, _LAST, 0xF0, 4))


def normal(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """``ranges`` in any order and overlapping, as `Ranges`."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return intersect(tuple(merged), ALL)


def intersect(left: Ranges, right: Ranges) -> Ranges:
    """Code points in both."""
    both = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return tuple(sorted((low, high) for low, high in both if low <= high))


def complement(ranges: Ranges) -> Ranges:
    """Code points that are not in ``ranges``."""
    gaps, low = [], 0
    for first, last in ranges:
        gaps.append((low, first - 1))
        low = last + 1
    return intersect(tuple((low, high) for low, high in [*gaps, (low, _LAST)] if low <= high), ALL)


def utf8_character(machine: Machine, ranges: Ranges) -> int:
    """One character out of ``ranges`` in UTF-8."""
    return machine.regular(machine.choice(*_utf8(machine, ranges)))


def json_character(machine: Machine, ranges: Ranges) -> int:
    r"""One character out of ``ranges`` in any way that a JSON string may write it: bare, ``\n``, ``é``, a surrogate pair."""
    options = _utf8(machine, intersect(ranges, _BARE))
    short = [ord(name) for code, name in _SHORT.items() if any(low <= code <= high for low, high in ranges)]
    if short:
        options.append(machine.sequence(machine.literal(b"\\"), machine.one_of(short)))
    escape = machine.literal(b"\\u")
    for low, high in intersect(ranges, ((0, 0xFFFF),)):
        options += [machine.sequence(escape, part) for part in _hex(machine, low, high)]
    for low, high in intersect(ranges, ((0x10000, _LAST),)):
        pairs = _digits(divmod(low - 0x10000, 1024), divmod(high - 0x10000, 1024), 1024)
        for (high_first, high_last), (low_first, low_last) in pairs:
            first = machine.choice(*_hex(machine, 0xD800 + high_first, 0xD800 + high_last))
            second = machine.choice(*_hex(machine, 0xDC00 + low_first, 0xDC00 + low_last))
            options.append(machine.sequence(escape, first, escape, second))
    return machine.regular(machine.choice(*options))


def json_literal(machine: Machine, text: str) -> int:
    """The JSON string of ``text``, as Python writes it with ``ensure_ascii`` or without, with its quotes."""
    import json

    forms = (json.dumps(text, ensure_ascii=flag).encode("utf-8", "surrogatepass") for flag in (False, True))
    return machine.choice(*(machine.literal(form) for form in forms))


def _utf8(machine: Machine, ranges: Ranges) -> list[int]:
    options = []
    for first, last, lead, size in _UTF8:
        for low, high in intersect(ranges, ((first, last),)):
            for parts in _digits(_split(low, size), _split(high, size), 64):
                (lead_low, lead_high), *rest = parts
                heads = range(lead + lead_low, lead + lead_high + 1)
                tails = (machine.one_of(range(0x80 + a, 0x80 + b + 1)) for a, b in rest)
                options.append(machine.sequence(machine.one_of(heads), *tails))
    return options


def _split(code: int, size: int) -> tuple[int, ...]:
    """Digits of ``code`` in base 64, as many as ``size``; the first takes what is left."""
    return (code >> 6 * (size - 1), *((code >> 6 * at & 63) for at in range(size - 2, -1, -1)))


def _hex(machine: Machine, low: int, high: int) -> list[int]:
    """Four hexadecimal digits, in either case, for each of the numbers from ``low`` to ``high``."""
    digits = [tuple(value >> shift & 15 for shift in (12, 8, 4, 0)) for value in (low, high)]
    return [
        machine.sequence(
            *(machine.one_of(ord(c) for d in range(a, b + 1) for c in {f"{d:x}", f"{d:X}"}) for a, b in parts)
        )
        for parts in _digits(digits[0], digits[1], 16)
    ]


def _digits(low: tuple[int, ...], high: tuple[int, ...], base: int) -> list[tuple[tuple[int, int], ...]]:
    """The numbers from ``low`` to ``high``, given by their digits, as a few products of ranges of digits."""
    if len(low) == 1:
        return [((low[0], high[0]),)]
    zeros, nines = (0,) * (len(low) - 1), (base - 1,) * (len(low) - 1)
    if low[0] == high[0]:
        return [((low[0], low[0]), *rest) for rest in _digits(low[1:], high[1:], base)]
    if low[1:] != zeros:
        head = [((low[0], low[0]), *rest) for rest in _digits(low[1:], nines, base)]
        return head + _digits((low[0] + 1, *zeros), high, base)
    if high[1:] != nines:
        tail = [((high[0], high[0]), *rest) for rest in _digits(zeros, high[1:], base)]
        return _digits(low, (high[0] - 1, *nines), base) + tail
    return [((low[0], high[0]), *((0, base - 1) for _ in nines))]
