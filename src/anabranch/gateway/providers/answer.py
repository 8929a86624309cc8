"""`Answer`: a whole answer in OpenAI's form, how it is read, and what it is taken to have used where the provider does not say."""

import json
from functools import cached_property
from typing import Any

from anabranch.gateway.providers.failures import excess, garbage
from anabranch.gateway.providers.upstream_request import Json, UpstreamRequest
from anabranch.gateway.providers.usage import Usage
from anabranch.web.body import MOST_DEPTH, is_too_deep
from anabranch.web.large_json import LARGE, dump_large, load_large, num_bytes

# Why an answer ended that can be given to others.
WHOLE = ("stop", "length", "tool_calls")


class Answer:
    """A whole answer, in OpenAI's form.

    Attributes:
        body: the object.
        raw: the bytes it was read from; None if it was translated.
        usage: tokens.
        report: how it was come by; set by the `Dispatcher`.
        is_cut: part of what the upstream said is not in it.
        is_large: it came in so many bytes that it is read and written in steps.
    """

    def __init__(self, body: Json, raw: bytes | None, usage: Usage) -> None:
        self.body, self.raw, self.usage = body, raw, usage
        self.is_cut = self.is_large = False
        self.report: Any = None

    @cached_property
    def data(self) -> bytes:
        """The body as JSON, as it came where it could stay so."""
        if self.raw is not None:
            return self.raw
        if self.is_large:
            return dump_large(self.body, allow_nan=True)
        return json.dumps(self.body, separators=(",", ":")).encode()

    @property
    def text(self) -> str:
        """What the first choice says; empty if it says nothing (tool calls) or this is no text."""
        choice = _first(self.body.get("choices"))
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        return text if isinstance(text, str) else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return _first(self.body.get("choices")).get("finish_reason")

    @property
    def is_whole(self) -> bool:
        """Every choice came to its end, none was held back, and nothing is left out."""
        if self.is_cut:
            return False
        choices = self.body.get("choices")
        found = [_first([one]).get("finish_reason") for one in choices] if isinstance(choices, list) else []
        return bool(found) and all(reason in WHOLE for reason in found)


def _first(items: Any) -> Json:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def parse_object(body: bytes, what: str = "an answer") -> Json:
    """A JSON object, nested at most `MOST_DEPTH` deep; ``what`` it is, for people. Raises UpstreamError (``garbage``, ``excess``)."""
    deep = f"{what} of more than {MOST_DEPTH} lists and objects within one another"
    try:
        value = load_large(body) if len(body) > LARGE else json.loads(body)
    except RecursionError:
        raise excess(deep) from None
    except ValueError as error:
        if type(error) is ValueError:
            # Of JSON that is well formed: an integer of more digits than Python reads.
            raise excess(f"{what} with a number of too many digits") from None
        raise garbage(f"{what} that is no JSON", body) from None
    if not isinstance(value, dict):
        raise garbage(f"{what} that is no JSON object", body)
    # What has few brackets cannot be deep, and need not be walked through.
    if body.count(b"{") + body.count(b"[") > MOST_DEPTH and is_too_deep(value):
        raise excess(deep)
    return value


def estimated(request: UpstreamRequest, body: Json, told: Usage | None = None) -> Usage:
    """Usage where the provider does not say: a token for every four bytes of text.

    ``told`` is what it said without a prompt, which it does not know then: not less than that.
    """
    return Usage(request.prompt_tokens, max(answer_bytes(body)[0] // 4, told.completion if told else 0), 0, True)


# Strings of a message that no model wrote.
_NOT_SAID = frozenset({"role", "id", "type", "index", "data"})


def answer_bytes(body: Json) -> tuple[int, int]:
    """Bytes (UTF-8) of all that the choices of an answer say: text, thoughts and calls; and how many choices there are."""
    choices = body.get("choices")
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    left: list[Any] = [choice.get(name) for choice in choices for name in ("message", "text")]
    size = 0
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += num_bytes(value)
        elif isinstance(value, dict):
            left += [inner for name, inner in value.items() if name not in _NOT_SAID]
        elif isinstance(value, list):
            left += value
    return size, len(choices)
