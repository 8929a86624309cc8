"""`AnswerText`: the tokens of one answer as its text: reasoning apart, the rest up to a stop string, which is not looked for in it."""

from collections.abc import Iterable

from anabranch.serving.chat.reasoning import Part, Reasoning
from anabranch.serving.core.text import Detokenizer, StopMatcher
from anabranch.serving.http.reading import Reader

# Reasoning, and what is said.
Text = tuple[str, str]


class AnswerText:
    """See the module.

    Attributes:
        read: characters that tokens have given.
        told: of them, those that were told, or dropped for good.
        reasoning_tokens: tokens that were thought, the marks around it included.

    Args:
        reader: of the model.
        stop: strings that end the answer.
        reasoning: how it is told apart; None where there is none.
        shows_marks: marks that are special tokens are part of the text, for whoever tells calls apart.
    """

    def __init__(
        self, reader: Reader, stop: tuple[str, ...], reasoning: Reasoning | None = None, *, shows_marks: bool = False
    ) -> None:
        self._decoder = Detokenizer(reader.tokenizer, reader.marks if shows_marks or reasoning else None)
        self._splitter = None if reasoning is None else reasoning.splitter()
        self._matcher = StopMatcher(stop) if stop else None
        self.read = self.reasoning_tokens = 0
        # Characters that a stop string may still take, or has taken.
        self._kept = 0
        # Tokens of which nobody knows yet what they are.
        self._undecided = 0

    @property
    def told(self) -> int:
        """See the class."""
        return self.read - self._kept - (0 if self._splitter is None else self._splitter.held)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._matcher is not None and self._matcher.stopped_by is not None

    def push(self, token: int) -> Text:
        """What the token completes."""
        was_reasoning = self._splitter is not None and self._splitter.is_reasoning
        told = self._take(self._decoder.push(token))
        if self._splitter is not None:
            self._undecided += 1
            if was_reasoning or self._splitter.is_reasoning or told[0]:
                self.reasoning_tokens += self._undecided
                self._undecided = 0
            elif not self._splitter.is_undecided:
                self._undecided = 0
        return told

    def end(self) -> Text:
        """What was held back, after the last token."""
        thought, said = self._take(self._decoder.flush())
        if self._splitter is not None:
            more, rest = self._match(self._splitter.end())
            thought, said = thought + more, said + rest
        return thought, said + self._flush()

    def _take(self, text: str) -> Text:
        self.read += len(text)
        return self._match([("text", text)] if self._splitter is None else self._splitter.push(text))

    def _match(self, parts: Iterable[Part]) -> Text:
        thought = said = ""
        for kind, text in parts:
            if kind == "reasoning":
                thought += text
            elif self.is_stopped:
                self._kept += len(text)
            elif kind == "mark":
                # No stop string goes on behind it.
                said += self._flush() + text
            else:
                given = text if self._matcher is None else self._matcher.push(text)
                self._kept += len(text) - len(given)
                said += given
        return thought, said

    def _flush(self) -> str:
        rest = "" if self._matcher is None else self._matcher.flush()
        self._kept -= len(rest)
        return rest
