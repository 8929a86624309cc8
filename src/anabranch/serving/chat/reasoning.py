"""Reasoning told apart from the answer, while both are being said.

A splitter gets text as it comes and gives it back as parts: what was thought, what is said, and marks that belong to the form of what is
said (headers of messages), which no stop string may match. What is neither is dropped: tags, and blanks around them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from anabranch.data.tokenizer import Tokenizer
from anabranch.serving.chat.events import held
from anabranch.serving.chat.harmony import Header, Messages
from anabranch.serving.core.request import Preamble

__all__ = ["FORMATS", "Channels", "Reasoning", "ReasoningFormat", "Splitter", "Tagged"]

Part = tuple[Literal["reasoning", "text", "mark"], str]
_FINAL = ("<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>")


class Splitter(Protocol):
    """See the module.

    Attributes:
        is_reasoning: what comes next is thought, as far as is known.
        is_undecided: whether it is will be seen.
        held: characters that are still to be told or dropped.
    """

    @property
    def is_reasoning(self) -> bool: ...  # noqa: D102
    @property
    def is_undecided(self) -> bool: ...  # noqa: D102
    @property
    def held(self) -> int: ...  # noqa: D102

    def push(self, text: str) -> list[Part]:
        """What the text so far says for certain."""

    def end(self) -> list[Part]:
        """What was held back, after the last text."""


class Tagged:
    """Reasoning between two tags, at the beginning of an answer.

    Args:
        tags: that open and close it.
        state: ``open`` if the prompt ends with the opening tag, ``closed`` if it ends with the closing one, else ``maybe``.
    """

    def __init__(self, tags: tuple[str, str], state: str = "maybe") -> None:
        self._open, self._close = tags
        self._state, self._text = state, ""
        # What comes next is the first of the reasoning, or of the answer behind it.
        self._is_first = True

    @property
    def is_reasoning(self) -> bool:
        """See `Splitter`."""
        return self._state == "open"

    @property
    def is_undecided(self) -> bool:
        """See `Splitter`."""
        return self._state == "maybe"

    @property
    def held(self) -> int:
        """See `Splitter`."""
        return len(self._text)

    def push(self, text: str) -> list[Part]:
        """See `Splitter`."""
        self._text += text
        parts: list[Part] = []
        if self._state == "maybe":
            self._begin()
        if self._state == "open":
            parts += self._thought()
        if self._state == "closed":
            parts += self._said()
        return parts

    def end(self) -> list[Part]:
        """See `Splitter`."""
        text, self._text = self._text, ""
        if self._state == "open":
            text = text.rstrip() if not self._is_first else text.strip()
            return [("reasoning", text)] if text else []
        return (
            [("text", text)] if text and not (self._state == "closed" and self._is_first and not text.strip()) else []
        )

    def _begin(self) -> None:
        start = self._text.lstrip()
        if start.startswith(self._open):
            self._text, self._state = start[len(self._open) :], "open"
        elif not self._open.startswith(start):
            # The answer begins at once, with the blanks that it has.
            self._state, self._is_first = "closed", False

    def _thought(self) -> list[Part]:
        at = self._text.find(self._close)
        if at < 0:
            at = len(self._text) - held(self._text, [self._close])
            rest, text = self._text[at:], self._text[:at]
            # Blanks before the end are dropped, and nobody knows yet whether they are.
            kept = text.rstrip()
            self._text = text[len(kept) :] + rest
        else:
            kept, self._text = self._text[:at].rstrip(), self._text[at + len(self._close) :]
            self._state = "closed"
        if self._is_first:
            kept = kept.lstrip()
        self._is_first = self._state == "closed" or (self._is_first and not kept)
        return [("reasoning", kept)] if kept else []

    def _said(self) -> list[Part]:
        text, self._text = self._text, ""
        if self._is_first:
            text = text.lstrip()
            self._is_first = not text
        return [("text", text)] if text else []


class Channels:
    """Reasoning in messages of a channel, see `anabranch.serving.chat.harmony`.

    Args:
        begun: see `Messages`.
        is_formed: a grammar holds for the answer, which is on the channel ``final``: what is said before is no part of it.
    """

    def __init__(self, begun: str = "", *, is_formed: bool = False) -> None:
        self._messages = Messages(begun)
        self._is_formed = is_formed and not (self._messages.in_body and not self._messages.header.is_reasoning)

    @property
    def is_reasoning(self) -> bool:
        """See `Splitter`."""
        return self._messages.in_body and self._is_thought(self._messages.header)

    def _is_thought(self, header: Header) -> bool:
        return header.is_reasoning or (self._is_formed and header.channel != "final" and not header.to)

    @property
    def is_undecided(self) -> bool:
        """See `Splitter`."""
        return not self._messages.in_body

    @property
    def held(self) -> int:
        """See `Splitter`."""
        return self._messages.held

    def push(self, text: str, *, is_over: bool = False) -> list[Part]:
        """See `Splitter`."""
        parts: list[Part] = []
        for kind, piece, header in self._messages.push(text, is_over=is_over):
            if not self._is_thought(header):
                if piece:
                    parts.append(("text" if kind == "body" else "mark", piece))
            elif kind == "body":
                parts.append(("reasoning", piece))
        return parts

    def end(self) -> list[Part]:
        """See `Splitter`."""
        return self.push("", is_over=True)


class ReasoningFormat(Protocol):
    """How a model's reasoning is written. ``begun`` is what `after` gives of a prompt."""

    def after(self, prompt: str) -> str:
        """The end of a prompt, which may have begun the reasoning."""

    def said(self, begun: str) -> str:
        """Of ``begun``, the beginning of the turn that is no reasoning, which a parser of the turn needs."""

    def splitter(self, begun: str, *, is_formed: bool) -> Splitter:
        """A new one, at the beginning of the answer; ``is_formed``: a grammar holds for what is behind the reasoning."""

    def preamble(self, begun: str, tokenizer: Tokenizer, *, is_call: bool) -> Preamble | None:
        """What may come before what a grammar holds for, an answer or with ``is_call`` calls; None where nothing may."""


@dataclass(frozen=True, slots=True)
class TagFormat:
    """Reasoning between two tags, see `Tagged`.

    Attributes:
        opens, closes: the tags.
    """

    opens: str
    closes: str

    def after(self, prompt: str) -> str:
        """See `ReasoningFormat`."""
        return prompt[-100:]

    def said(self, begun: str) -> str:
        """See `ReasoningFormat`."""
        return ""

    def splitter(self, begun: str, *, is_formed: bool) -> Splitter:
        """See `ReasoningFormat`."""
        return Tagged((self.opens, self.closes), self._state(begun))

    def preamble(self, begun: str, tokenizer: Tokenizer, *, is_call: bool) -> Preamble | None:
        """See `ReasoningFormat`."""
        state = self._state(begun)
        if state == "closed":
            return None
        return Preamble(open=() if state == "open" else tuple(tokenizer.encode(self.opens)), close=(self.closes,))

    def _state(self, begun: str) -> str:
        end = begun.rstrip()
        return "open" if end.endswith(self.opens) else "closed" if end.endswith(self.closes) else "maybe"


class ChannelFormat:
    """Reasoning in messages of a channel, see `Channels`."""

    def after(self, prompt: str) -> str:
        """See `ReasoningFormat`."""
        return prompt[max(0, prompt.rfind("<|start|>")) :] if "<|start|>" in prompt else ""

    def said(self, begun: str) -> str:
        """See `ReasoningFormat`."""
        messages = Messages(begun)
        return "" if messages.in_body and messages.header.is_reasoning else begun

    def splitter(self, begun: str, *, is_formed: bool) -> Splitter:
        """See `ReasoningFormat`."""
        return Channels(begun, is_formed=is_formed)

    def preamble(self, begun: str, tokenizer: Tokenizer, *, is_call: bool) -> Preamble | None:
        """See `ReasoningFormat`."""
        messages = Messages(begun)
        if is_call:
            opens = () if messages.in_body else tuple(tokenizer.encode("<|channel|>analysis"))
            return Preamble(open=opens, close=("<|end|>",))
        return None if messages.in_body and not messages.header.is_reasoning else Preamble(close=_FINAL)


FORMATS: Mapping[str, ReasoningFormat] = {
    "think": TagFormat("<think>", "</think>"),
    "magistral": TagFormat("[THINK]", "[/THINK]"),
    "harmony": ChannelFormat(),
}


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How the reasoning of one answer is told apart.

    Attributes:
        format: one of `FORMATS`.
        begun: the end of the prompt, which may have begun the reasoning.
        is_formed: a grammar holds for the answer behind it.
    """

    format: ReasoningFormat
    begun: str
    is_formed: bool = False

    @classmethod
    def after(cls, format: str, prompt: str) -> "Reasoning":
        """Of an answer to a whole prompt, in the format of a name."""
        found = FORMATS[format]
        return cls(found, found.after(prompt))

    @property
    def said(self) -> str:
        """See `ReasoningFormat`."""
        return self.format.said(self.begun)

    def splitter(self) -> Splitter:
        """A new one, at the beginning of the answer."""
        return self.format.splitter(self.begun, is_formed=self.is_formed)

    def preamble(self, tokenizer: Tokenizer, *, is_call: bool = False) -> Preamble | None:
        """What may come before what a grammar holds for, an answer or with ``is_call`` calls; None where nothing may."""
        return self.format.preamble(self.begun, tokenizer, is_call=is_call)
