"""`TextStream`: tokens to text as they come, up to a stop string.

Text is given out when it can no longer change: not before a character's last byte, and not while it could be the beginning of a stop
string. A token costs the same wherever it is in the text.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from anabranch.errors import InputError

# Special tokens that are part of what a model says: the marks of its reasoning and of its calls of tools.
MARKS = frozenset(
    {
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "<|python_start|>",
        "<|python_end|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|constrain|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    }
)
UNFINISHED = "\ufffd"
# Three bytes of a character may wait for its last, and byte fallback shows three more of the character before as broken with them.
MOST_UNFINISHED = 6

# Tokens without text that are kept for the sake of the next.
MOST_SILENT = 64


class Decodes(Protocol):
    """A tokenizer. One with ``token_bytes`` (see `anabranch.data.tokenizer.Tokenizer`) is asked for the bytes of single tokens."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids; broken UTF-8 as U+FFFD."""


def marks_of(tokenizer: Any, wanted: Iterable[str] = MARKS) -> dict[int, str]:
    """{token: its text} of the marks that a tokenizer has as special tokens, whose text nobody is shown otherwise."""
    id_of = getattr(tokenizer, "id_of", None)
    if id_of is None:
        return {}
    found = {id_of(text): text for text in wanted}
    return {token: text for token, text in found.items() if token is not None and not tokenizer.decode([token])}


class TextStream:
    """Text of one request.

    Args:
        tokenizer: decodes.
        stop: strings that end the text: the first to be complete does; of several that end at one character, the longest.
        include_stop: the stop string is part of the text.

    Attributes:
        stopped_by: the string that ended it; None as long as none has.
        num_tokens: tokens taken, up to and with the one that ended it.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._decoder = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self.num_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        """See the class."""
        return None if self._matcher is None else self._matcher.stopped_by

    def push(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """(new text, whether a stop string has ended it). After the end further tokens give nothing."""
        pieces = []
        for token in tokens:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            piece = self._decoder.push(token)
            if piece and self._matcher is not None:
                piece = self._matcher.push(piece)
            pieces.append(piece)
        return "".join(pieces), self.stopped_by is not None

    def flush(self) -> str:
        """What was held back, when no more tokens come: an unfinished character shows as U+FFFD."""
        rest = self._decoder.flush()
        if self._matcher is None:
            return rest
        return "" if self.stopped_by is not None else self._matcher.push(rest) + self._matcher.flush()


class Detokenizer:
    """Text of tokens one by one; joined it is what `Decodes.decode` makes of all, and no piece ends inside a character.

    (With SentencePiece-style byte fallback, whose decoder judges a run of bytes as a whole, as long as the bytes are UTF-8.)

    Args:
        tokenizer: decodes.
        shown: texts of special tokens that are shown, see `marks_of`.
    """

    def __init__(self, tokenizer: Decodes, shown: Mapping[int, str] | None = None) -> None:
        self._tokenizer, self._marks = tokenizer, dict(shown or {})
        self._bytes_of: Any = getattr(tokenizer, "token_bytes", None)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For tokenizers whose tokens lean on their neighbours: tokens from the last piece on, and how much of their text was shown.
        self._window: list[int] = []
        self._shown = 0
        # Tokens of the window that the shown text is of.
        self._num_shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty inside a character."""
        mark = self._marks.get(token)
        if mark is not None:
            return self.flush() + mark
        if self._bytes_of is not None:
            piece = self._bytes_of(token)
            if piece is not None:
                return self._utf8.decode(piece)
        window = self._window
        window.append(token)
        new = self._tokenizer.decode(window)[self._shown :]
        unfinished = len(new) - len(new.rstrip(UNFINISHED))
        if 0 < unfinished <= MOST_UNFINISHED and len(window) <= MOST_SILENT:
            return ""
        if new or len(window) > MOST_SILENT:
            # What comes next is decoded together with the tokens of this piece, as a word's blank may depend on what is before it.
            self._window = window[self._num_shown :] if new else window[-1:]
            self._shown, self._num_shown = len(self._tokenizer.decode(self._window)), len(self._window)
        return new

    def flush(self) -> str:
        """What was still held back; an unfinished character shows as U+FFFD."""
        held = self._tokenizer.decode(self._window)[self._shown :] if self._window else ""
        self._window, self._shown, self._num_shown = [], 0, 0
        return held + self._utf8.decode(b"", final=True)


class StopMatcher:
    """Finds the first of several strings in text that comes in pieces (Knuth, Morris and Pratt for each: O(1) a character, amortised).

    Attributes:
        stopped_by: the string that was found.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        if isinstance(stop, str) or not all(stop):
            raise InputError(f"stop is {stop!r}; it must be a list of strings, none of them empty")
        self._stops = sorted(set(stop), key=len, reverse=True)
        self._borders = [_borders(each) for each in self._stops]
        # Characters of each that the text ends with.
        self._matched = [0] * len(self._stops)
        self._include_stop = include_stop
        # The longest end of the text that is the beginning of a stop string.
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        """What can be given out; nothing after the end."""
        if self.stopped_by is not None:
            return ""
        stops, matched = self._stops, self._matched
        whole = self._held + text
        for index, character in enumerate(text, len(self._held) + 1):
            for number, stop in enumerate(stops):
                length = matched[number]
                while length and stop[length] != character:
                    length = self._borders[number][length - 1]
                length += stop[length] == character
                if length == len(stop):
                    self.stopped_by, self._held = stop, ""
                    return whole[: index if self._include_stop else index - length]
                matched[number] = length
        given = len(whole) - max(matched)
        self._held = whole[given:]
        return whole[:given]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _borders(text: str) -> list[int]:
    """For each beginning of ``text`` the length of its longest proper beginning that is also its end."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders
