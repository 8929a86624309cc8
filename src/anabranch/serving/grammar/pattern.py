"""Regular expressions as automata over characters: a safe subset of what JSON Schema's patterns may say.

Literals, ``.``, classes ``[...]``, ``\\d \\w \\s`` and their negations (ASCII digits and words, as in ECMAScript), groups, ``|``, and
the quantifiers ``* + ? {m} {m,} {m,n}``. ``^`` and ``$`` where a whole alternative starts and ends. No look-around, no
back-references, no word boundaries: an automaton cannot say the last, and the others are not regular.
"""

from dataclasses import dataclass

from anabranch.errors import InputError
from anabranch.serving.grammar.text import ALL, Ranges, complement, normal

__all__ = ["Alternatives", "Characters", "Concatenation", "Expression", "Repetition", "parse"]

_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_BLANK = normal(
    [(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
     (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
)  # fmt: skip
_ANY = complement(normal([(10, 10), (13, 13), (0x2028, 0x2029)]))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _BLANK}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class Characters:
    """One character."""

    ranges: Ranges


@dataclass(frozen=True)
class Concatenation:
    """All of them in order; the empty text without any."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class Alternatives:
    """One of them."""

    options: tuple["Expression", ...]


@dataclass(frozen=True)
class Repetition:
    """A part, again and again; ``most`` None for no end."""

    part: "Expression"
    least: int
    most: int | None


Expression = Characters | Concatenation | Alternatives | Repetition

ANYTHING = Repetition(Characters(ALL), 0, None)


def parse(pattern: str, *, whole: bool) -> Expression:
    """The expression of ``pattern``.

    Args:
        pattern: see the module.
        whole: match the whole text; else any part of it, unless ``^`` and ``$`` say otherwise, as JSON Schema's patterns do.

    Raises InputError naming what is not supported, and where.
    """
    return _Parser(pattern, whole).parse()


class _Parser:
    def __init__(self, pattern: str, whole: bool) -> None:
        self.text, self.whole, self.at = pattern, whole, 0

    def parse(self) -> Expression:
        options = [self._alternative(top=True)]
        while self._take("|"):
            options.append(self._alternative(top=True))
        if self.at < len(self.text):
            raise self._error("a ) without its (")
        return Alternatives(tuple(options))

    def _alternative(self, *, top: bool = False) -> Expression:
        """What stands between two ``|``."""
        starts = top and self._take("^")
        parts: list[Expression] = []
        ends = False
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if self.text[self.at] == "$" and top and self.text[self.at + 1 : self.at + 2] in ("", "|"):
                self.at += 1
                ends = True
                break
            parts.append(self._quantified())
        if top and not self.whole:
            parts = [*([] if starts else [ANYTHING]), *parts, *([] if ends else [ANYTHING])]
        return Concatenation(tuple(parts))

    def _quantified(self) -> Expression:
        part = self._atom()
        while self.at < len(self.text) and self.text[self.at] in "*+?{":
            least, most = self._bounds()
            self._take("?")  # lazy or not, the texts are the same
            if isinstance(part, Repetition) and self.text[self.at - 1 : self.at] == "+":
                raise self._error("a possessive quantifier")
            part = Repetition(part, least, most)
        return part

    def _bounds(self) -> tuple[int, int | None]:
        sign = self._next()
        if sign != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        inside, found, _ = self.text[self.at :].partition("}")
        least, comma, most = inside.partition(",")
        if not found or not least.isdecimal() or (most and not most.isdecimal()):
            raise self._error("a { that is no {m}, {m,} or {m,n}; write \\{ for the character")
        self.at += len(inside) + 1
        low, high = int(least), int(most) if most else (None if comma else int(least))
        if high is not None and low > high:
            raise self._error(f"the bounds {low} and {high} in the wrong order")
        if max(low, high or 0) > _MOST_REPEATS:
            raise self._error(f"more than {_MOST_REPEATS} repetitions")
        return low, high

    def _atom(self) -> Expression:
        character = self._next()
        if character == "(":
            if self._take("?") and not self._take(":"):
                raise self._error("a group (?...); only (?:...) is supported")
            options = [self._alternative()]
            while self._take("|"):
                options.append(self._alternative())
            if not self._take(")"):
                raise self._error("a ( without its )")
            return Alternatives(tuple(options))
        if character == "[":
            return Characters(self._class())
        if character == ".":
            return Characters(_ANY)
        if character == "\\":
            return Characters(self._escape())
        if character in "*+?{":
            raise self._error(f"a {character} with nothing before it to repeat")
        if character in "^$":
            raise self._error(
                f"a {character} elsewhere than at the {'start' if character == '^' else 'end'} of the pattern"
            )
        return Characters(((ord(character), ord(character)),))

    def _class(self) -> Ranges:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            low = self._class_part()
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._class_part()
                if not (_single(low) and _single(high)) or low[0][0] > high[0][0]:
                    raise self._error("a range in [...] whose ends are in the wrong order or are no characters")
                low = ((low[0][0], high[0][0]),)
            ranges += low
        return complement(normal(ranges)) if negated else normal(ranges)

    def _class_part(self) -> Ranges:
        character = self._next(" a [ without its ]")
        if character == "\\":
            return ((8, 8),) if self._take("b") else self._escape()
        return ((ord(character), ord(character)),)

    def _escape(self) -> Ranges:
        name = self._next(" a \\ at the end")
        if name.lower() in _CLASSES:
            return _CLASSES[name] if name.islower() else complement(_CLASSES[name.lower()])
        if name in "xu":
            size = 2 if name == "x" else 4
            digits = self.text[self.at : self.at + size]
            if len(digits) < size or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
                raise self._error(f"a \\{name} without its {size} hexadecimal digits")
            self.at += size
            return normal([(int(digits, 16), int(digits, 16))])
        if name in _CONTROLS:
            return ((_CONTROLS[name], _CONTROLS[name]),)
        if name.isalnum():
            raise self._error(f"the escape \\{name}")
        return ((ord(name), ord(name)),)

    def _take(self, character: str) -> bool:
        found = self.text.startswith(character, self.at)
        self.at += found
        return found

    def _next(self, missing: str = "more characters") -> str:
        if self.at >= len(self.text):
            raise self._error(missing)
        self.at += 1
        return self.text[self.at - 1]

    def _error(self, what: str) -> InputError:
        return InputError(f"pattern {self.text!r} has {what.strip()} (character {self.at}), which is not supported")


def _single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]
