"""`Reader`: text into tokens and back for one model: its tokenizer, its chat template, its grammars."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from anabranch.data import Tokenizer
from anabranch.data.templates import TemplatesBusyError, template_variables
from anabranch.errors import InputError, TokenizerError
from anabranch.seen_files import SeenFiles
from anabranch.serving.chat import Dialect, FieldError, Tools, render
from anabranch.serving.core.text import Detokenizer, marks_of
from anabranch.serving.http.fields import of_field, unsupported_field
from anabranch.web.api_error import ApiError, wrong

# Of a template's values, what is not for a request to say.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "tokenizer")
# What every template may call.
FUNCTIONS = ("range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now")
# What templates that know no effort call the switch.
_SWITCHES = ("enable_thinking", "thinking")
_EFFORTS = {"minimal": "low", "xhigh": "high"}


class Reader:
    """Reads for one model.

    Args:
        tokenizer: the model's.
        defaults: fields of requests that do not say them, see `anabranch.lm.generation_defaults`.
        dialect: how the model says what it thinks and calls; None for what its chat template tells of it.
        files: that all this was read from, see `EngineInfo`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        defaults: Mapping[str, Any] | None = None,
        dialect: Dialect | None = None,
        files: SeenFiles = SeenFiles(),  # noqa: B008
    ) -> None:
        self.tokenizer, self.defaults, self.files = tokenizer, dict(defaults or {}), files
        self.dialect = dialect or Dialect.of(tokenizer)
        self.marks = marks_of(tokenizer)

    def with_defaults(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request with what it does not say."""
        return {**self.defaults, **{name: value for name, value in body.items() if value is not None}}

    @property
    def has_template(self) -> bool:
        """Whether `render` asks another process, and may have to wait for it."""
        return self.tokenizer.chat_template is not None

    def template_values(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What a request has for the chat template, and the fields of it that the template does not know. Raises ApiError."""
        given, effort = dict(body.get("chat_template_kwargs") or {}), body.get("reasoning_effort")
        if not given and effort is None:
            return {}, []
        names = self._template_names()
        for name in given:
            if name in RESERVED or name in FUNCTIONS or name.endswith("_token"):
                what = f"chat_template_kwargs has {name!r}, which the server gives"
                raise wrong(f"chat_template_kwargs.{name}", what)
        values = {**effort_values(effort, names), **given}
        return values, [f"chat_template_kwargs.{name}" for name in given if name not in names]

    def _template_names(self) -> frozenset[str]:
        """What the chat template expects to be given."""
        template = self.tokenizer.chat_template
        try:
            return frozenset() if template is None else template_variables(template)
        except TemplatesBusyError as error:
            raise ApiError(503, "busy", str(error), headers={"Retry-After": "1"}) from None
        except TokenizerError as error:
            raise wrong("messages", str(error)) from None

    def render(
        self,
        messages: Sequence[Any],
        tools: Tools | None,
        *,
        is_open: bool = True,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises ApiError: 400 for one that the template refuses, 503 where none can be rendered now.

        Args:
            messages: as they came.
            tools: what may be called.
            is_open: end with the beginning of the assistant's turn.
            values: more for the template, see `template_values`.
        """
        offered = tools.offered if tools is not None else ()
        try:
            return render(self.tokenizer, messages, tools=offered, add_generation_prompt=is_open, **(values or {}))
        except FieldError as error:
            raise of_field(error) from None
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

    def offsets(self, tokens: Iterable[int], text: str) -> Iterator[int]:
        """The character of ``text`` at which each of its ``tokens`` begins, counted from 0; one inside a character, where that begins."""
        decoder, at = Detokenizer(self.tokenizer), 0
        for token in tokens:
            yield min(at, len(text))
            # Special tokens have no bytes, but are there in a text that is told with them; one that was put before it is not.
            is_special = self.tokenizer.token_bytes(token) == b""
            piece = self.token_text(token)[0] if is_special else decoder.push(token)
            at += len(piece) if not is_special or text.startswith(piece, at) else 0

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


def effort_values(effort: str | None, names: Container[str]) -> dict[str, Any]:
    """What ``reasoning_effort`` is to a template that expects ``names``.

    Args:
        effort: of the request: ``none`` to ``xhigh``; None where it says nothing.
        names: of the template's values.

    Raises ApiError (400) for a model that cannot reason, or cannot do without, as OpenAI does.
    """
    if effort is None:
        return {}
    switch = next((name for name in _SWITCHES if name in names), None)
    if effort == "none":
        if switch is None and "reasoning_effort" in names:
            what = "is 'none', but this model always reasons; give low, medium or high"
            raise unsupported_field("reasoning_effort", what)
        return {} if switch is None else {switch: False}
    if "reasoning_effort" in names:
        return {"reasoning_effort": _EFFORTS.get(effort, effort)}
    if switch is None:
        what = f"is {effort!r}, but this model's chat template knows of no reasoning; leave it out"
        raise unsupported_field("reasoning_effort", what)
    return {switch: True}
