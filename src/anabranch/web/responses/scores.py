"""Which log probabilities of a chat are those of its text: chat tells those of thoughts, of calls and of what marks them among them.

Nothing says where one ends and the other begins but the tokens themselves, whose text the answer has. A place where a token begins counts
before one within a token, as what marks thoughts is mostly one token.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, dropwhile, islice
from typing import Any

from anabranch.web.body import is_int

__all__ = ["logprobs_beside_texts", "logprobs_of", "logprobs_of_nothing", "logprobs_of_texts", "logprobs_within"]

# Places at which a text may begin that are looked at.
_MOST_PLACES = 64
_REPLACEMENT = "\ufffd"


def logprobs_of(choice: dict[str, Any]) -> list[Any]:
    """Log-probabilities of what a choice of chat, or a piece of one, says."""
    told = choice.get("logprobs")
    listed = told.get("content") if isinstance(told, dict) else None
    return listed if isinstance(listed, list) else []


def logprobs_within(text: str, logprobs: list[Any], *, has_others: bool = False) -> tuple[list[Any], list[Any]]:
    """Those of a piece of a stream that is the first text of a message, and those behind it.

    Args:
        text: the piece.
        logprobs: of its tokens, of what came before it, and of what is held back, is called or ends an answer behind it.
        has_others: there are others; where the text is not that of any tokens nothing is known of any then, else all are its own.
    """
    tokens = _Tokens(logprobs)
    found = tokens.last(text, 0, tokens.size)
    if found is None:
        return ([] if has_others else logprobs), []
    is_all = found[1] >= tokens.size
    return tokens.between(*found), [] if is_all else logprobs[tokens.from_(found[1]) :]


def logprobs_of_texts(
    pieces: Sequence[tuple[str, Any]], logprobs: list[Any], *, thoughts: str, is_refused: bool
) -> list[list[Any]]:
    """Those of each text of a whole answer, as its stream tells them.

    Args:
        pieces: what it says, in its order (`anabranch.web.said_order.said`).
        logprobs: of all its tokens.
        thoughts: what it thought first.
        is_refused: a refusal is behind its first text.
    """
    tokens = _Tokens(logprobs)
    has_others = bool(thoughts) or any(kind != "text" for kind, _ in pieces)
    found: list[list[Any]] = []
    for at, place in _places_of_texts(tokens, pieces, thoughts):
        if place is None:
            found.append([] if has_others else logprobs)
            continue
        # What ends an answer is what its last text held back.
        is_last = at == len(pieces) - 1 and not is_refused
        found.append(tokens.between(place[0], tokens.size if is_last else place[1]))
    return found


def logprobs_beside_texts(pieces: Sequence[tuple[str, Any]], logprobs: list[Any], *, thoughts: str) -> list[list[Any]]:
    """All of them, each once and in order, divided among the texts of a whole answer: with each those of what follows it up to the next.

    The first has those of what came before it too; a later one that is not that of any tokens has none. Arguments are as of
    `logprobs_of_texts`.
    """
    tokens = _Tokens(logprobs)
    found: list[list[Any]] = []
    end = len(logprobs)
    places = [place for _, place in _places_of_texts(tokens, pieces, thoughts)]
    for at in range(len(places) - 1, -1, -1):
        place = places[at]
        begin = 0 if at == 0 else end if place is None else min(tokens.at(place[0]), end)
        found.append(logprobs[begin:end])
        end = begin
    return found[::-1]


def logprobs_of_nothing(logprobs: list[Any], usage: Any) -> list[Any]:
    """Those of a message that says nothing: of what ends an answer, and not of what marks thoughts that hold nothing.

    Args:
        logprobs: of all tokens of the answer, which come first with those that were thought.
        usage: in the words of chat; it says how many were thought, the marks around them included. Some count thoughts that nobody sees.
    """
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    thought = details.get("reasoning_tokens") if isinstance(details, dict) else None
    tokens = usage.get("completion_tokens")
    if not isinstance(thought, int) or not isinstance(tokens, int) or not (is_int(thought) and is_int(tokens)):
        return logprobs
    if thought <= 0 or len(logprobs) <= tokens - thought:
        return logprobs
    # Blanks behind thoughts are no part of what is said.
    rest = logprobs[thought:]
    return list(dropwhile(lambda one: _bytes_of(one).isspace(), rest))


def _places_of_texts(
    tokens: "_Tokens", pieces: Sequence[tuple[str, Any]], thoughts: str
) -> list[tuple[int, tuple[int, int] | None]]:
    """The number of each piece that is a text, and where that stands; None for one that is not that of any tokens."""
    thought = tokens.first(thoughts.strip(), 0) if thoughts else None
    least, end = 0 if thought is None else thought[1], tokens.size
    found: list[tuple[int, tuple[int, int] | None]] = []
    # Those behind calls from the last on: a call may hold the same words.
    for at in range(len(pieces) - 1, -1, -1):
        kind, text = pieces[at]
        if kind != "text":
            continue
        # Words may stand in what ends an answer too.
        is_forward = at == 0 and not (thoughts and thought is None)
        place = tokens.first(text, least, end) if is_forward else tokens.last(text, least, end)
        found.append((at, place))
        end = end if place is None else place[0]
    return found[::-1]


class _Tokens:
    """The text of tokens with log probabilities.

    Args:
        logprobs: of each token.
    """

    def __init__(self, logprobs: list[Any]) -> None:
        self._logprobs, self._pieces = logprobs, [_bytes_of(one) for one in logprobs]
        self._text = b"".join(self._pieces)
        self.size = len(self._text)

    # Each is made once, and looked up by halves: an answer may have many texts, and many tokens.

    @cached_property
    def _begins(self) -> list[int]:
        return [0, *accumulate(map(len, self._pieces))][:-1]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self._pieces)))

    @cached_property
    def _starts(self) -> frozenset[int]:
        return frozenset(self._begins)

    def between(self, begin: int, end: int) -> list[Any]:
        """Log probabilities of tokens that have something between these places; up to the end with those of no bytes there."""
        stop = len(self._logprobs) if end == self.size else self.from_(end)
        return self._logprobs[bisect_right(self._ends, begin) : stop]

    def at(self, place: int) -> int:
        """The number of the token that has the byte of a place."""
        return max(0, bisect_right(self._begins, place) - 1)

    def from_(self, place: int) -> int:
        """That of the first token which begins there or behind it."""
        return bisect_left(self._begins, place)

    def first(self, text: str, begin: int, end: int | None = None) -> tuple[int, int] | None:
        """Where a text stands first from one place to another; None where it does not."""
        return self._found(text, begin, self.size if end is None else end, is_last=False)

    def last(self, text: str, begin: int, end: int) -> tuple[int, int] | None:
        """Where it stands last."""
        return self._found(text, begin, end, is_last=True)

    def _found(self, text: str, begin: int, end: int, *, is_last: bool) -> tuple[int, int] | None:
        # A half of a character at the end is told as one that stands for it.
        told = text.rstrip(_REPLACEMENT).encode(errors="surrogatepass")
        if not told:
            return None
        places = list(islice(self._places(told, begin, end, is_last=is_last), _MOST_PLACES))
        if places:
            at = next((place for place in places if place in self._starts), places[0])
            return at, at + len(told)
        # White space between its parts may not have been told.
        own = range(self.from_(begin), self.from_(end))
        for number in islice(reversed(own) if is_last else own, _MOST_PLACES):
            at, piece = self._begins[number], self._pieces[number]
            # What a token begins with may not have been told either: most words do with a blank.
            blanks = len(piece) - len(piece.lstrip())
            for start in {at, at + blanks if blanks < len(piece) else at}:
                if (stop := self._walked(told, start, end)) is not None:
                    return at, stop
        return None

    def _places(self, told: bytes, begin: int, end: int, *, is_last: bool) -> Iterator[int]:
        while True:
            at = self._text.rfind(told, begin, end) if is_last else self._text.find(told, begin, end)
            if at < 0:
                return
            yield at
            if is_last:
                end = at + len(told) - 1
            else:
                begin = at + 1

    def _walked(self, told: bytes, at: int, end: int) -> int | None:
        """Where a text ends that begins at a place and has all but some of the white space there; None for another text."""
        if at >= end or self._text[at] != told[0]:
            return None
        for byte in told:
            while at < end and self._text[at] != byte and self._text[at : at + 1].isspace():
                at += 1
            if at >= end or self._text[at] != byte:
                return None
            at += 1
        return at


def _bytes_of(one: Any) -> bytes:
    """Of a token: those it names, which may be a part of a character, or of its text."""
    table = one if isinstance(one, dict) else {}
    named, token = table.get("bytes"), table.get("token")
    if isinstance(named, list) and all(is_int(value) and 0 <= value < 256 for value in named):
        return bytes(named)
    return token.encode(errors="surrogatepass") if isinstance(token, str) else b""
