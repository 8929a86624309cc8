"""`Texts`: the texts of a prompt, whose tokens are counted a piece at a time: whoever else wants something counted is not kept waiting.

A text is cut before a space between two letters wherever there is one near, which no tokenizer of words has a token across: those that
split texts into words first (byte-level BPE, WordPiece) make as many tokens of the pieces as of the whole, and those that put a mark before
each text one more for a piece at most. Where a text has no such place it is cut in the middle: what is reserved for it is then `CUT_TOKENS`
more than what was counted, for each cut.
"""

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from anabranch.gateway.plain_values import said, whole_of
from anabranch.gateway.prompt_tokens import BYTES_PER_TOKEN, Counter, PromptCount
from anabranch.web.large_json import num_bytes
from anabranch.web.turns import plainly

# Characters that are counted at a time, which takes a tokenizer some milliseconds; and how many of them are searched for a place to cut.
PIECE = 1 << 13
_NEAR = 1 << 10

# So many tokens more a text may come to than its two parts, at most: a token or two on each side of the cut.
CUT_TOKENS = 4

# Letters alone: some tokenizers join a space to letters, and others leave it before digits.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")

# Has what it is given done beside the event loop, or at once.
Beside = Callable[[Callable[[], Any]], Awaitable[Any]]


# Marks that a tokenizer may put around a text; no other token is of less than a byte.
MARKS = 16


class UncountedError(ValueError):
    """A tokenizer of others does not count a text."""


def counted_by_others(counter: Counter, text: str) -> int:
    """Tokens of ``text`` as ``counter`` says. Raises UncountedError where it raises whatever, or gives what they cannot be."""
    try:
        given = plainly(lambda: counter(text))
        found = plainly(lambda: whole_of(given))
    except Exception as error:
        raise UncountedError(type(error).__name__) from error
    most = num_bytes(text) + MARKS
    if found is None or not 0 <= found <= most:
        raise UncountedError(f"{said(given)} is no number of tokens from 0 to {most:,}")
    return found


class Texts:
    """In place of the tokenizer, what `count_prompt` is given: it finds no tokens in a text, and has it in mind for `counted`.

    Args:
        counter: the tokenizer. Where it raises UncountedError the rest is estimated, as it is without one.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter, self._texts, self._cuts = counter, list[str](), 0
        # Bytes of what is estimated.
        self._uncounted, self._is_estimate = 0, False

    def __call__(self, text: str) -> int:  # noqa: D102
        self._texts.append(text)
        return 0

    async def counted(self, count: PromptCount, beside: Beside) -> PromptCount:
        """``count``, in which no text is counted yet, with all of them, each piece in a turn of its own."""
        found = 0
        for piece in self._pieces():
            found += await beside(lambda: self._sum(piece))  # noqa: B023
        return self._with(count, found)

    def counted_at_once(self, count: PromptCount) -> PromptCount:
        """As `counted`, for whoever has a thread to himself."""
        return self._with(count, sum(map(self._sum, self._pieces())))

    def _sum(self, piece: list[str]) -> int:
        found, left = 0, list(reversed(piece))
        while left and not self._is_estimate:
            try:
                found += self._counter(left[-1])
                left.pop()
            except UncountedError:
                self._is_estimate = True
        self._uncounted += sum(map(num_bytes, left))
        return found

    def _with(self, count: PromptCount, found: int) -> PromptCount:
        tokens = count.tokens + found + -(-self._uncounted // BYTES_PER_TOKEN)
        at_most = count.at_most + found + CUT_TOKENS * self._cuts + self._uncounted
        return replace(count, tokens=tokens, at_most=at_most, is_estimate=count.is_estimate or self._is_estimate)

    def _pieces(self) -> Iterator[list[str]]:
        """All texts, in their order, about `PIECE` characters at a time."""
        piece, size = list[str](), 0
        for text in self._texts:
            for part in self._parts(text):
                if piece and size + len(part) > PIECE:
                    yield piece
                    piece, size = [], 0
                piece.append(part)
                size += len(part)
        if piece:
            yield piece

    def _parts(self, text: str) -> Iterator[str]:
        at = 0
        while len(text) - at > PIECE:
            end = at + PIECE
            places = [found.start() for found in _BETWEEN_WORDS.finditer(text, end - _NEAR, end)]
            if not places:
                self._cuts += 1
            cut = places[-1] if places else end
            yield text[at:cut]
            at = cut
        yield text[at:]
