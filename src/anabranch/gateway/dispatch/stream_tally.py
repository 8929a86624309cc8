"""`Tally`: what has come of a stream, in texts, bytes and what its upstream said of usage.

Some upstreams speak of usage with every chunk: zeros, or what it was so far. It is what the answer comes to if it was said with its end or
behind it, or if no text came after it.

An event in a form of its own (a message's, a response's) comes with a chunk that says the same, or some of it: arguments for a tool that
runs at the provider are in the event alone. The larger of both counts.
"""

import re
from dataclasses import replace

from anabranch.gateway.dispatch.billed import tokens_of
from anabranch.gateway.providers.provider import Json, Usage
from anabranch.gateway.providers.usage import is_untold

_FIELD = rb'"(content|reasoning_content|reasoning|thinking|summary|text|arguments|partial_json|input|refusal|name|transcript)"\s*:\s*"'
# What has no backslash is taken in runs, ten times as quick as letter by letter; possessive, so that no sign is looked at twice.
_SAID = rb'((?=[^"\\]|\\.)[^"\\]*+(?:\\.[^"\\]*+)*+)'
_TEXT = re.compile(_FIELD + _SAID + b'"')
# Of an event that has not come to its end.
_BEGUN = re.compile(_FIELD + _SAID)
_THOUGHTS = frozenset({b"reasoning_content", b"reasoning", b"thinking", b"summary"})
# Of a delta of a message; that of a response is the text itself.
_ADDED = ("text", "thinking", "partial_json")
# Looked for before all else is: what they name is seldom there. In a text a backslash is before their last quote.
_RARE = (b'"reasoning_details"', b'"thinking_blocks"', b'"audio"', b'"images"', b'"video"', b'"image_url"')
# Thoughts that may be sealed, and what is no text; said with nothing in it by some with every chunk.
_SEALED = re.compile(rb'"(?:reasoning_details|thinking_blocks)"\s*:\s*\[\s*\{')
_NO_TEXT = re.compile(rb'"(?:audio|images|video|image_url)"\s*:\s*(?:\[\s*)?(?:\{|"[^"])')


class Tally:
    """See the module.

    Attributes:
        usage: as the upstream said last; None until it names a prompt.
        has_thought: thoughts came, or a summary of them, or sealed ones: how many tokens they were is not to be seen.
        has_media: sound or a picture came, likewise.

    Args:
        prompt_tokens: counted or estimated.
        num_choices: that were asked for.
        echoes: the prompt, which is told, is among the texts.
    """

    def __init__(self, prompt_tokens: int, num_choices: int, echoes: bool = False) -> None:
        self.usage: Usage | None = None
        self._texts = self._text_bytes = self._native_texts = self._native_bytes = 0
        self.has_thought = self.has_media = False
        self._prompt_tokens, self._num_choices, self._echoes = prompt_tokens, num_choices, echoes
        # When the usage was said: how many texts were before it, whether the answer was at its end, and nothing else was said with it.
        self._texts_told, self._at_end, self._is_alone = -1, False, False
        # Completion tokens of a usage without a prompt.
        self._least = 0

    @property
    def texts(self) -> int:
        """Pieces of text that came."""
        return max(self._texts, self._native_texts)

    @property
    def text_bytes(self) -> int:
        """Bytes of them, at most."""
        return max(self._text_bytes, self._native_bytes)

    def hear(self, chunk: Json, has_finished: bool) -> Usage | None:
        """Take note of the usage that a chunk speaks of, and return it; its own texts are counted after that."""
        said = Usage.of(chunk)
        if said is None:
            return None
        if not said.prompt:
            # Some say 0 before they know.
            self._least = max(self._least, said.completion)
            return said
        if self.usage is not None:
            # Nothing that was billed is taken back, but by mistake.
            most, so_far = max(said.prompt, self.usage.prompt), max(said.completion, self.usage.completion)
            bills = [one.nano for one in (said, self.usage) if one.nano is not None]
            said = replace(said, prompt=most, completion=so_far, nano=max(bills, default=None))
        self.usage, self._texts_told = said, self.texts
        self._at_end, self._is_alone = has_finished, not chunk.get("choices")
        return said

    def told_whole(self, usage: Usage) -> None:
        """Take note of what a whole answer comes to."""
        self.usage, self._at_end, self._is_alone = usage, True, True

    def count(self, block: bytes) -> None:
        """Take note of the texts in whole events."""
        for field, text in _TEXT.findall(block):
            self._texts += 1
            self._text_bytes += _num_bytes(text)
            self.has_thought = self.has_thought or field in _THOUGHTS
        self._note(block)

    def count_begun(self, rest: bytes) -> None:
        """Take note of what has come of an event that will not come to its end."""
        for field, text in _BEGUN.findall(rest):
            self._texts += 1
            self._text_bytes += len(text)
            self.has_thought = self.has_thought or field in _THOUGHTS
        self._note(rest)

    def count_native(self, value: Json) -> None:
        """Take note of what an event in a form of its own adds: what has come whole by then, and is said again, does not."""
        delta = value.get("delta")
        added = [delta.get(name) for name in _ADDED] if isinstance(delta, dict) else [delta]
        for text in added:
            if isinstance(text, str) and text:
                self._native_texts += 1
                self._native_bytes += len(text.encode("utf-8", "surrogatepass"))

    def _note(self, data: bytes) -> None:
        if any(name in data for name in _RARE):
            self.has_thought = self.has_thought or _SEALED.search(data) is not None
            self.has_media = self.has_media or _NO_TEXT.search(data) is not None

    def is_told(self, is_done: bool) -> bool:
        """Whether `usage` is that of the whole answer; ``is_done`` once the stream has said its last."""
        if self.usage is None or (not self._echoes and is_untold(self.usage.completion, self.text_bytes)):
            return False
        if self._at_end and (self._is_alone or is_done):
            return True
        return is_done and self._texts_told == self.texts

    def counted(self, is_done: bool) -> Usage:
        """What the upstream said, else an estimate: the most of the texts, a quarter of their bytes, and what it said so far."""
        said = self.told
        if self.usage is not None and self.is_told(is_done):
            return self.usage
        least = said.completion if said is not None else 0
        prompt = self._prompt_tokens if self.usage is None else self.usage.prompt
        return Usage(prompt, max(self.texts, self.text_bytes // 4, least), 0, True)

    @property
    def told(self) -> Usage | None:
        """What the upstream has said so far; its prompt is 0 where it did not say that."""
        return self.usage or (Usage(0, self._least) if self._least else None)

    def at_most(self, bytes_per_token: float) -> int:
        """Completion tokens of what came, at most; each choice has an end, which is no text."""
        return tokens_of(self.texts, self.text_bytes, bytes_per_token) + self._num_choices


def _num_bytes(text: bytes) -> int:
    """Bytes at most of what stands in JSON as ``text``."""
    if b"\\" not in text or b"\\\\" in text:
        return len(text)
    # Each backslash begins an escape: of one byte, and, of four digits, of three bytes at most.
    return len(text) - text.count(b"\\") - 2 * text.count(b"\\u")
