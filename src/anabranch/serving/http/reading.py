"""`Reader`: text into tokens and back for one model: its tokenizer, its chat template, its grammars."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anabranch.data import Tokenizer
from anabranch.data.templates import TemplatesBusyError
from anabranch.errors import InputError
from anabranch.serving.chat import render
from anabranch.serving.core.text import Detokenizer
from anabranch.serving.http.messages import Tools
from anabranch.web.api_error import ApiError, wrong


class Reader:
    """Reads for one model.

    Args:
        tokenizer: the model's.
        defaults: fields of requests that do not say them, see `anabranch.lm.generation_defaults`.
    """

    def __init__(self, tokenizer: Tokenizer, defaults: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.defaults = tokenizer, dict(defaults or {})

    def with_defaults(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request with what it does not say."""
        return {**self.defaults, **{name: value for name, value in body.items() if value is not None}}

    @property
    def has_template(self) -> bool:
        """Whether `render` asks another process, and may have to wait for it."""
        return self.tokenizer.chat_template is not None

    def render(self, messages: Sequence[dict[str, Any]], tools: Tools | None, *, is_open: bool = True) -> str:
        """The prompt of a conversation. Raises ApiError: 400 for one that the template refuses, 503 where none can be rendered now."""
        offered = tools.offered if tools is not None else ()
        try:
            return render(self.tokenizer, messages, tools=offered, add_generation_prompt=is_open)
        except InputError as error:
            raise wrong("messages", str(error)) from None
        except TemplatesBusyError as error:
            raise ApiError(503, "busy", str(error), headers={"Retry-After": "1"}) from None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text to go on from; the empty text is the beginning of one, where the model has a token for it."""
        return self._begun(self.tokenizer.encode_prompt(text))

    def encode_chat(self, text: str) -> tuple[int, ...]:
        """Token ids of what `render` gave."""
        return self._begun(self.tokenizer.encode_chat(text))

    def _begun(self, ids: list[int]) -> tuple[int, ...]:
        if not ids:
            start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            return () if start is None else (start,)
        return tuple(ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text, special tokens included."""
        return self.tokenizer.decode(tokens, skip_special=False)

    def offsets(self, tokens: Sequence[int], text: str) -> list[int]:
        """The character of ``text`` at which each of its ``tokens`` begins, counted from 0; one inside a character, where that begins."""
        decoder, at, made = Detokenizer(self.tokenizer), 0, []
        for token in tokens:
            made.append(min(at, len(text)))
            # Special tokens have no bytes, but are there in a text that is told with them; one that was put before it is not.
            is_special = self.tokenizer.token_bytes(token) == b""
            piece = self.token_text(token)[0] if is_special else decoder.push(token)
            at += len(piece) if not is_special or text.startswith(piece, at) else 0
        return made

    def token_text(self, token: int) -> tuple[str, list[int] | None]:
        """How a token is shown, and its bytes."""
        piece = self.tokenizer.token_bytes(token)
        if not piece:
            return self.tokenizer.decode([token], skip_special=False), None if piece is None else list(piece)
        return piece.decode("utf-8", "replace"), list(piece)

    def token_name(self, token: int) -> tuple[str, list[int] | None]:
        """Like `token_text`, but for bytes that are no characters: ``bytes:\\xe6``, as OpenAI writes them."""
        text, raw = self.token_text(token)
        if raw is None or text.encode() == bytes(raw):
            return text, raw
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw
