"""A whole answer put together from the chunks of a stream, in time that grows with the stream and not with its square."""

from collections.abc import Iterable
from typing import Any

from anabranch.gateway.providers.chunks import TEXTS, choices_of, place_of, string
from anabranch.gateway.providers.native_events import NATIVE
from anabranch.gateway.providers.provider import Json
from anabranch.web.beside import joined
from anabranch.web.reasoning_details import details_in, joined_details
from anabranch.web.said_order import SaidOrder

_OF_CALL = ("index", "id", "type", "function")


def assembled(chunks: Iterable[Json], endpoint: str = "chat") -> Json:
    """The whole answer that a stream's chunks make, in the form a request without ``stream`` gets."""
    body: Json = {}
    choices: dict[int, _Choice] = {}
    for chunk in chunks:
        for name, value in chunk.items():
            # The last's event of another form is not the whole's.
            if name not in ("choices", "object", *NATIVE) and (value is not None or name not in body):
                body[name] = value
        for choice in choices_of(chunk):
            at = place_of(choice, 0)
            if at not in choices:
                choices[at] = _Choice(at, endpoint)
            choices[at].add(choice)
    body["object"] = "chat.completion" if endpoint == "chat" else "text_completion"
    body["choices"] = [_unnumbered(choices[at].whole()) for at in sorted(choices)]
    return body


class _Table:
    """An object whose values come in pieces: texts and lists grow, tables go together, of anything else the last counts.

    What grows is joined once, at the end; until then an empty value holds its place among the names.
    """

    def __init__(self, start: Json) -> None:
        self.values = start
        self._texts: dict[str, list[str]] = {}
        self._lists: dict[str, list[Any]] = {}
        self._tables: dict[str, list[Json]] = {}

    def add_text(self, name: str, more: str) -> None:
        if name not in self._texts:
            self._set(name, "")
            self._texts[name] = []
        self._texts[name].append(more)

    def add_list(self, name: str, more: list[Any]) -> None:
        if name not in self._lists:
            self._set(name, None)
            # The chunk's own stays as it is.
            self._lists[name] = []
        self._lists[name].extend(more)

    def add_table(self, name: str, more: Json) -> None:
        if name not in self._tables:
            self._set(name, None)
            self._tables[name] = []
        self._tables[name].append(more)

    def put(self, name: str, value: Any) -> None:
        self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        for kind in (self._texts, self._lists, self._tables):
            kind.pop(name, None)
        self.values[name] = value

    def whole(self) -> Json:
        self.values.update({name: "".join(pieces) for name, pieces in self._texts.items()})
        self.values.update(self._lists)
        self.values.update({name: _all_joined(tables) for name, tables in self._tables.items()})
        return self.values


def _is_of_calls(item: tuple[str, Any]) -> bool:
    return item[0] == "tool_calls"


def _all_joined(tables: list[Json]) -> Json:
    """Neighbours first, then those that came of that: sound of megabytes is copied some times, and not once for each piece."""
    while len(tables) > 1:
        pairs = [tables[at : at + 2] for at in range(0, len(tables), 2)]
        tables = [joined(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return tables[0]


class _Choice:
    """One choice of an answer."""

    def __init__(self, at: int, endpoint: str) -> None:
        self._whole: Json = {"index": at, "finish_reason": None}
        self._is_chat = endpoint == "chat"
        self._texts: list[str] = []
        self._logprobs: _Table | None = None
        self._message: _Table | None = None
        self._calls: list[_Call] = []
        self._order = SaidOrder()

    def add(self, choice: Json) -> None:
        whole = self._whole
        if choice.get("finish_reason"):
            whole["finish_reason"] = choice["finish_reason"]
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict):
            if self._logprobs is None:
                whole["logprobs"] = None
                self._logprobs = _Table({})
            for name, value in logprobs.items():
                if isinstance(value, list):
                    self._logprobs.add_list(name, value)
                else:
                    self._logprobs.put(name, value)
        if not self._is_chat:
            whole.setdefault("text", "")
            self._texts.append(string(choice.get("text")))
            return
        if self._message is None:
            whole["message"] = None
            self._message = _Table({"role": "assistant", "content": None})
        delta = choice.get("delta")
        # Text of one piece stands before its calls, in whatever order a program wrote their names.
        for name, value in sorted(delta.items(), key=_is_of_calls) if isinstance(delta, dict) else ():
            self._add_to_message(self._message, name, value)

    def _add_to_message(self, message: _Table, name: str, value: Any) -> None:
        if name == "tool_calls":
            if isinstance(value, list):
                message.values.setdefault("tool_calls", None)
                self._add_calls(value)
        elif name in TEXTS and isinstance(value, str):
            message.add_text(name, value)
            if name == "content":
                self._order.add_text(value)
        elif isinstance(value, list):
            # Such as the details of thoughts, which come piece by piece.
            message.add_list(name, value)
        elif isinstance(value, dict):
            # Sound, or what a provider says beside the rest.
            message.add_table(name, value)
        elif value is not None:
            message.put(name, value)

    def _add_calls(self, pieces: list[Any]) -> None:
        for piece in pieces:
            if not isinstance(piece, dict):
                continue
            at = place_of(piece, len(self._calls))
            while len(self._calls) <= at:
                # Also of those that others are still to come before: each is there once.
                self._order.add_call(len(self._calls))
                self._calls.append(_Call())
            self._calls[at].add(piece)

    def whole(self) -> Json:
        whole = self._whole
        if self._logprobs is not None:
            whole["logprobs"] = self._logprobs.whole()
        if self._texts:
            whole["text"] = "".join(self._texts)
        if self._message is not None:
            whole["message"] = message = self._message.whole()
            if "tool_calls" in message:
                message["tool_calls"] = [call.whole() for call in self._calls]
                self._order.put_into(message)
        return whole


class _Call:
    """A call of a tool."""

    def __init__(self) -> None:
        self._whole: Json = {"id": None, "type": "function", "function": None}
        self._function = _Table({"name": "", "arguments": ""})

    def add(self, piece: Json) -> None:
        whole = self._whole
        whole["id"] = piece.get("id") or whole["id"]
        whole |= {name: value for name, value in piece.items() if name not in _OF_CALL}
        function = piece.get("function")
        for name, value in function.items() if isinstance(function, dict) else ():
            if isinstance(value, str):
                self._function.add_text(name, value)

    def whole(self) -> Json:
        self._whole["function"] = self._function.whole()
        return self._whole


def _unnumbered(choice: Json) -> Json:
    """Without the numbers by which clients put lists of a stream together."""
    message = choice.get("message") or {}
    for name in ("thinking_blocks", "images"):
        held = message.get(name)
        if isinstance(held, list):
            message[name] = [
                {field: value for field, value in one.items() if field != "index"} if isinstance(one, dict) else one
                for one in held
            ]
    if details := details_in(message):
        # Whoever gives them back gives them as they are in a whole answer.
        message["reasoning_details"] = joined_details(details)
    return choice
