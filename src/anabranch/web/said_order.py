"""The order of text and calls in a whole message of chat, which has one text and a list of calls behind it.

Models say something behind a call too, and streams tell it there, as do the forms that know items or blocks. So that a whole answer can be
told in those as its stream is, a message with text behind a call says its order beside the rest:

    "extra_content": {"gateway": {"order": [{"text": 5}, {"call": 0}, {"text": 7}]}}

characters of ``content``, and places in ``tool_calls``; where ``content`` is a list, ``{"parts": 2}`` is so many of its parts. One in which
all text comes first says none. A message that comes back may say it too, whether a chat brings it as it was told or another form had an
order of its own; it goes no further than to providers whose form has one (`in_turn`).
"""

from collections.abc import Sequence
from typing import Any

from anabranch.web.body import is_int

__all__ = ["ORDER", "OWN", "SaidOrder", "in_turn", "said", "unordered", "without_order"]

Json = dict[str, Any]

# The field of a message that says it, and what in that is the gateway's own.
ORDER = "extra_content"
OWN = "gateway"


class SaidOrder:
    """Notes in which order a message comes."""

    def __init__(self) -> None:
        self._told: list[Json] = []
        self._num_calls, self._is_mixed = 0, False

    def add_text(self, text: str) -> None:
        """Some text came."""
        if not text:
            return
        if self._told and "text" in self._told[-1]:
            self._told[-1]["text"] += len(text)
        else:
            self._is_mixed = self._is_mixed or bool(self._num_calls)
            self._told.append({"text": len(text)})

    def add_part(self) -> None:
        """A part of the content came, where that is a list."""
        if self._told and "parts" in self._told[-1]:
            self._told[-1]["parts"] += 1
        else:
            self._is_mixed = self._is_mixed or bool(self._num_calls)
            self._told.append({"parts": 1})

    def add_call(self, at: int) -> None:
        """A call began: that in place ``at``, or in one before which others are still to come."""
        self._num_calls += 1
        self._told.append({"call": at})

    def put_into(self, message: Json) -> None:
        """Have a message say its order, where text came behind a call."""
        if not self._is_mixed:
            return
        content, order = message.get("content"), self._told
        if isinstance(content, str):
            # The one part that it has is its text.
            order = [{"text": len(content)} if "parts" in one else one for one in order]
        message[ORDER] = {**_own_of(message), OWN: {"order": order}}


def said(message: Json) -> list[tuple[str, Any]]:
    """What a message says, in its order: ``text`` with a piece of it, and ``call`` with the object of ``tool_calls``.

    Where it says no order, or one that is not that of what it holds, all its text comes first.
    """
    content, calls = message.get("content"), message.get("tool_calls")
    content = content if isinstance(content, str) else ""
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return _ordered("text", content, calls, _order_of(message)) or [
        *([("text", content)] if content else []),
        *(("call", call) for call in calls),
    ]


def in_turn(message: Json) -> list[tuple[str, Any]]:
    """What a message of an assistant that comes back says, in its order, whatever it is made of.

    Returns:
        ``text`` with some of its content, as that is: a text or a list of parts; and ``call`` with one of ``tool_calls``. Where it says no
        order, or one that is not that of what it holds, all its content comes first.
    """
    content, calls = message.get("content"), message.get("tool_calls") or ()
    order = _order_of(message)
    found = []
    if order and isinstance(calls, list) and isinstance(content, str | list):
        found = _ordered("parts" if isinstance(content, list) else "text", content, calls, order)
    return found or [
        *([] if content is None or content in ("", []) else [("text", content)]),
        *(("call", call) for call in calls),
    ]


def unordered(message: Json) -> Json:
    """A message without it, for forms that have no place for it; the same object where it says none."""
    extra = message.get(ORDER)
    if not isinstance(extra, dict) or OWN not in extra:
        return message
    made = {name: value for name, value in message.items() if name != ORDER}
    others = without_order(extra)
    return {**made, ORDER: others} if others else made


def without_order(extra: Json) -> Json:
    """``extra_content`` without it, for forms that have an order of their own."""
    return {name: value for name, value in extra.items() if name != OWN} if OWN in extra else extra


def _own_of(message: Json) -> Json:
    found = message.get(ORDER)
    return found if isinstance(found, dict) else {}


def _order_of(message: Json) -> Sequence[Any]:
    own = _own_of(message).get(OWN)
    order = own.get("order") if isinstance(own, dict) else None
    return order if isinstance(order, list) else ()


def _ordered(unit: str, content: Any, calls: Sequence[Any], order: Sequence[Any]) -> list[tuple[str, Any]]:
    """Nothing for an order that does not name all of both, each once. ``unit`` is the name under which content is counted."""
    found: list[tuple[str, Any]] = []
    at, places = 0, set[int]()
    for one in order:
        length, place = (one.get(unit), one.get("call")) if isinstance(one, dict) else (None, None)
        if isinstance(length, int) and is_int(length) and length > 0:
            found.append(("text", content[at : at + length]))
            at += length
        elif isinstance(place, int) and is_int(place) and 0 <= place < len(calls) and place not in places:
            found.append(("call", calls[place]))
            places.add(place)
        else:
            return []
    return found if at == len(content) and len(places) == len(calls) else []
