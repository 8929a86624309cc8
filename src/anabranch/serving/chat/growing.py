"""`Growing`: a text that comes in pieces, for generators that read it: they yield wherever they need more of it."""

import json
import re
from collections.abc import Callable, Generator

__all__ = ["Growing"]

Read = Generator[None, None, str]
_BLANKS = re.compile(r"\s*")

# Of a JSON string.
_PLAIN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[\w.+-]*")

# The first of two escapes that make one character.
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_PAIR = re.compile(_HIGH.pattern + r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_LONE = re.compile(r"[\ud800-\udfff]")


class Growing:
    """See the module.

    Attributes:
        taken: what was read; whoever tells it, or drops it, empties this.
        is_over: nothing more comes, so that nothing is waited for.

    Args:
        taken: what was read before.
    """

    def __init__(self, taken: str = "") -> None:
        self.taken, self.is_over = taken, False
        self._text, self._at = "", 0

    def push(self, text: str) -> None:
        """More of it."""
        self._text, self._at = self._text[self._at :] + text, 0

    @property
    def rest(self) -> str:
        """What was not read."""
        return self._text[self._at :]

    def take(self, count: int) -> str:
        """Read so many characters, which are there."""
        piece = self._text[self._at : self._at + count]
        self._at += len(piece)
        self.taken += piece
        return piece

    def ahead(self, count: int = 1) -> Read:
        """The next characters, unread; fewer where the text ends before."""
        while len(self._text) - self._at < count and not self.is_over:
            yield
        return self._text[self._at : self._at + count]

    def blanks(self) -> Read:
        """Read blanks; gives the character after them, unread, and nothing at the end."""
        while True:
            match = _BLANKS.match(self._text, self._at)
            assert match is not None
            self.take(match.end() - self._at)
            if self._at < len(self._text) or self.is_over:
                return self._text[self._at : self._at + 1]
            yield

    def has(self, wanted: str) -> Generator[None, None, bool]:
        """Whether this comes next, perhaps after blanks; then it is read, and else nothing is."""
        while True:
            rest = self.rest.lstrip()
            if self.is_over or len(rest) >= len(wanted) or not wanted.startswith(rest):
                break
            yield
        if not wanted or not rest.startswith(wanted):
            return False
        self.take(len(self.rest) - len(rest) + len(wanted))
        return True

    def extent(self, depth: int = 0, tell: Callable[[str], None] | None = None) -> Generator[None, None, bool]:
        """Read a JSON object, list or string to its end, or the rest of one inside so many brackets. False if the text ends first.

        Brackets are counted and strings skipped; whether it is JSON in between is not looked at. ``tell`` gets what is read as it comes.
        """
        value = _Extent(depth)
        while True:
            end = value.end(self._text, self._at)
            piece = self.take((len(self._text) if end is None else end) - self._at)
            if tell is not None and piece:
                tell(piece)
            if end is not None or self.is_over:
                return end is not None
            yield

    def value(self) -> Read:
        """Read any JSON value; its text."""
        first = yield from self.blanks()
        parts: list[str] = []
        if first and first in '{["':
            yield from self.extent(tell=parts.append)
            return "".join(parts)
        while True:
            match = _SCALAR.match(self._text, self._at)
            assert match is not None
            parts.append(self.take(match.end() - self._at))
            if self._at < len(self._text) or self.is_over:
                return "".join(parts)
            yield

    def unescaped(self) -> Read:
        """Read some of what a JSON string says, from behind its quote on; nothing before the other quote, and at the end of the text.

        An escape that says nothing by itself (half a character, or none of JSON's) comes as it is.
        """
        first = yield from self.ahead()
        if first not in ("\\", '"'):
            match = _PLAIN.match(self._text, self._at)
            assert match is not None
            return self.take(match.end() - self._at)
        return (yield from self._escape()) if first == "\\" else ""

    def _escape(self) -> Read:
        escape = yield from self.ahead(2)
        if escape == "\\u":
            escape = yield from self.ahead(6)
            if _HIGH.fullmatch(escape) and (yield from self.ahead(7))[6:] == "\\":
                both = yield from self.ahead(12)
                escape = both if _PAIR.fullmatch(both) else escape
        if len(escape) < 2 or (escape[1] == "u" and len(escape) < 6):
            self.take(len(escape))
            # The text ends here.
            return ""
        try:
            said = str(json.loads(f'"{escape}"'))
        except ValueError:
            return self.take(2)
        self.take(len(escape))
        # Half a character, which no answer could carry.
        return escape if _LONE.search(said) else said


class _Extent:
    """Finds the end of a JSON object, list or string in a text that comes in pieces."""

    def __init__(self, depth: int) -> None:
        self._depth, self._in_string, self._is_escaped = depth, False, False

    def end(self, text: str, at: int) -> int | None:
        """The place after its last character, if that is in ``text``, read from ``at`` on."""
        for place in range(at, len(text)):
            character = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
                if self._depth == 0 and not self._in_string:
                    return place + 1
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None
