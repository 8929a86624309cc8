"""``/v1/responses``: read as a chat and answered as one, in the form of OpenAI's Responses API (`anabranch.web.responses`)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from anabranch.serving.core.client import EngineInfo
from anabranch.serving.http.choice import ChoiceDelta
from anabranch.serving.http.fields import FieldName, unsupported
from anabranch.serving.http.generation_request import GenerationRequest, read_chat
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.shape import MOST_AT_ONCE, ChatShape
from anabranch.web.api_error import ApiError
from anabranch.web.body import said
from anabranch.web.large_json import together
from anabranch.web.responses import ResponseStream, to_chat
from anabranch.web.responses.request import table_of

# Of this API alone; what asks for nothing passes.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "n": (1,),
    "max_tool_calls": (),
    "context_management": ([],),
}
# Of chat, which calls here by other names or tells what a response has no place for, so that nobody knows them.
_OF_CHAT = (
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "logprobs",
    "reasoning_effort",
    "verbosity",
    "routing",
)
# What there is in fields that are tables.
_PARTS = {
    "text": ("format", "verbosity"),
    "reasoning": ("effort", "summary", "generate_summary"),
    "stream_options": ("include_obfuscation",),
}
# Fields of a response that tell how it was sampled.
_USED = ("temperature", "top_p")
# What a field of chat is called here. Items are not messages: several make one.
_NAMES = {
    "messages": FieldName("input"),
    "messages[]": FieldName("input", "an item of input"),
    "messages[].content": FieldName("input", "content of an item of input"),
    "messages[].content[].type": FieldName("input", "the type of a part of input"),
    "messages[].content[].text": FieldName("input", "the text of a part of input"),
    "messages[].content[].refusal": FieldName("input", "the refusal of a part of input"),
    "messages[].tool_calls[].function.arguments": FieldName("input", "arguments of a function_call in input"),
    "tools[].function": FieldName("tools[]"),
    "tool_choice.function": FieldName("tool_choice"),
    "max_completion_tokens": FieldName("max_output_tokens"),
    "reasoning_effort": FieldName("reasoning.effort"),
    "verbosity": FieldName("text.verbosity"),
    "response_format": FieldName("text.format"),
    "response_format.json_schema": FieldName("text.format"),
}


def read_response(
    body: dict[str, Any], reader: Reader, info: EngineInfo, most_n: int, *, default_tokens: int | None = None
) -> GenerationRequest:
    """A request to ``/v1/responses``; ``default_tokens`` as of `read_chat`. Raises ApiError (400) that names the parameter."""
    for name, allowed in _REFUSED.items():
        # True is no 1.
        if body.get(name) is not None and (isinstance(body[name], bool) or body[name] not in allowed):
            raise unsupported(name, f"{name} is {said(body[name])}, which this server does not do; leave it out")
    # Nothing is stored, which the response says.
    gone = (*_REFUSED, *_OF_CHAT, "store")
    own = {name: value for name, value in body.items() if name not in gone}
    chat = to_chat(own, keeps_reasoning=True)
    read = read_chat(chat, reader, info, most_n, _NAMES, default_tokens=default_tokens)
    more = [name for name in _OF_CHAT if name in body]
    more += [f"{name}.{part}" for name, known in _PARTS.items() for part in table_of(body, name) if part not in known]
    return replace(read, response_of=own, unknown=(*read.unknown, *more))


class ResponseShape(ChatShape):
    """``/v1/responses``: what a chat says, in this form; whole it is what the events of its stream come to."""

    # Its streams end with their last event.
    ending = b""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # What the engine went by, which the model's makers say where the request does not.
        used = {name: getattr(self.request.sampling, name) for name in _USED}
        body = {**(self.request.response_of or {}), **used}
        self._events, self._has_started = ResponseStream(body, tells=self.request.is_stream), False

    def take(self, change: ChoiceDelta) -> None:
        """See `Shape`."""
        for chunk in self.chunks(change):
            for _ in self._events.add(chunk):
                pass

    def whole(self) -> dict[str, Any]:
        """See `Shape`."""
        for _ in (*self._events.add({"usage": self.usage()}), *self._events.end()):
            pass
        return self._events.response

    def _rows(self, values: int, make: Callable[[], Iterable[Any]]) -> list[Any]:
        """See `Shape`: they are taken into the response, so they are made at once."""
        return list(make())

    def events(self, change: ChoiceDelta) -> bytes:
        """See `Shape`."""
        return b"".join([*self._begin(), *(made for chunk in self.chunks(change) for made in self._events.add(chunk))])

    def long_events(self, changes: Iterable[ChoiceDelta]) -> Iterator[bytes]:
        """See `Shape`."""
        chunks = (chunk for change in changes for chunk in self.chunks(change))
        told = (piece for chunk in chunks for piece in self._events.add(chunk, in_slices=True))
        return together(chain(self._begin(), told))

    def _begin(self) -> Iterable[bytes]:
        if self._has_started:
            return ()
        self._has_started = True
        return self._events.begin()

    @property
    def has_long_end(self) -> bool:
        """See `Shape`: the last events tell all that was said, each once more, with all log probabilities."""
        tokens = sum(choice.completion_tokens for choice in self.choices)
        told = tokens * (1 if self.request.logprobs is None else self._each)
        return told + sum(map(self._of_state, range(len(self.choices)))) > MOST_AT_ONCE

    def long_last_events(self) -> Iterator[bytes]:
        """See `Shape`."""
        told = (made for chunk in self.last() for made in self._events.add(chunk, in_slices=True))
        return together(chain(told, self._events.end(in_slices=True)))

    def last_events(self) -> bytes:
        """See `Shape`."""
        return b"".join([*(made for chunk in self.last() for made in self._events.add(chunk)), *self._events.end()])

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        return b"".join(self._events.fail(str(error), error.code))
