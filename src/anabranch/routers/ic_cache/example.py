"""A past request with a good answer, and what is remembered of its use."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

WORD = re.compile(r"\w+")
_RUN = re.compile(r"\S+")
_QUOTED = re.compile(r'"[^"\n]+"|\'[^\'\n]+\'')
_QUOTE_OR_DIGIT = re.compile(r"[\"'\d]")
# Two signs that make what they stand in a literal: a path, a name with signs in it, a number.
_PAIR = re.compile(r"(?=[\w*~$][/._*@$~\d-]|[/._*@$~\d-][\w*~$]).", re.DOTALL)
ANY_DOMAIN = "*"


@dataclass(frozen=True, slots=True)
class Traits:
    """What features are made from, computed once per text.

    Attributes:
        words: of the text, lower case.
        literals: quoted strings, paths, numbers, names with signs in them: what an answer must take over to the letter.
        length: characters.
    """

    words: frozenset[str]
    literals: frozenset[str]
    length: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Of a text."""
        return cls(frozenset(WORD.findall(text.casefold())), literals(text), len(text))


def literals(text: str) -> frozenset[str]:
    """Quoted strings without their quotes, and words with a digit or one of ``/._*@$~-`` in them, without closing punctuation."""
    found = (one.strip("\"'()[]{},;:").rstrip(".?!") for one in _literals(text))
    return frozenset(item for item in found if item)


def _literals(text: str) -> Iterator[str]:
    """As they stand, from left to right; in time linear in the text, since of each word it is found once where its last pair is."""
    at = 0
    for run in _RUN.finditer(text):
        # A quoted string before may reach into it, or beyond.
        at, end = max(at, run.start()), run.end()
        last = max((pair.start() for pair in _PAIR.finditer(text, at, end)), default=-1) if at < end else -1
        while at < end:
            quoted = _QUOTED.match(text, at)
            if quoted is not None:
                yield quoted[0]
                at = quoted.end()
            elif last >= at:
                yield text[at:end]
                at = end
            else:
                if text[at].isdecimal():
                    yield text[at]
                following = _QUOTE_OR_DIGIT.search(text, at + 1, end)
                at = end if following is None else following.start()


@dataclass(slots=True, kw_only=True)
class Example:
    """One entry of the pool.

    Attributes:
        id: in the pool and in its index.
        tenant: whose it is; nobody else ever sees it.
        domain: the kind of work it is from; it serves no other.
        user: the tenant's own name for who asked, by which it can be erased.
        source: of the decision whose answer it is, by which it can be erased; empty if it came otherwise.
        request: what was asked, after redaction.
        response: the answer, after redaction.
        model: that answered.
        trust: level of that model.
        created_s: when it came.
        expires_s: when it goes; None for never.
        quality: of the answer, 0 to 1; None if nobody said.
        uses: answers it was shown for.
        helped: of those, the sum of how good they were (0 to 1).
        rated: of those, how many were rated.
        offloads: successful uses by a cheaper model, decayed; as of ``offloads_s``.
        offloads_s: see there.
        gain: exponential moving average of G(e), what a better answer would be worth.
        replays: times the answer was made anew.
    """

    id: int
    tenant: str
    domain: str
    user: str
    request: str
    response: str
    model: str
    trust: int
    created_s: float
    expires_s: float | None = None
    quality: float | None = None
    uses: int = 0
    helped: float = 0.0
    rated: int = 0
    offloads: float = 0.0
    offloads_s: float = 0.0
    gain: float = 0.0
    replays: int = 0
    source: str = ""
    _traits: tuple[Traits, Traits] | None = field(default=None, repr=False, compare=False)
    _copied: tuple[float, float] | None = field(default=None, repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Of the plain text, UTF-8."""
        return len(self.request.encode("utf-8", "surrogatepass")) + len(self.response.encode("utf-8", "surrogatepass"))

    @property
    def traits(self) -> tuple[Traits, Traits]:
        """Of request and response."""
        if self._traits is None:
            self._traits = (Traits.of(self.request), Traits.of(self.response))
        return self._traits

    @property
    def copied(self) -> tuple[float, float]:
        """Shares of the response's words and of its literals that stand in the request, 0 for none of either."""
        if self._copied is None:
            then, answer = self.traits
            self._copied = (
                len(answer.words & then.words) / max(len(answer.words), 1),
                len(answer.literals & then.literals) / max(len(answer.literals), 1),
            )
        return self._copied

    def replace_response(self, response: str, quality: float | None) -> None:
        """Another answer to the same request."""
        self.response, self.quality = response, quality
        self._traits = self._copied = None

    def is_alive(self, now_s: float) -> bool:
        """Whether it has not expired."""
        return self.expires_s is None or now_s < self.expires_s

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: getattr(self, name) for name in self.__slots__ if not name.startswith("_")}
