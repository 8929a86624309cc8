"""The order of text and calls in a whole message of chat, which has one text and a list of calls behind it.

Models say something behind a call too, and streams tell it there, as do the forms that know items or blocks. So that a whole answer can be
told in those as its stream is, a message with text behind a call says its order beside the rest:

    "extra_content": {"gateway": {"order": [{"text": 5}, {"call": 0}, {"text": 7}]}}

characters of ``content``, and places in ``tool_calls``. One in which all text comes first says none.
"""

from collections.abc import Sequence
from typing import Any

from anabranch.web.body import is_int

__all__ = ["OWN", "SaidOrder", "said", "without_order"]

Json = dict[str, Any]

# What in ``extra_content`` is the gateway's own.
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

    def add_call(self, at: int) -> None:
        """A call began: that in place ``at``, or in one before which others are still to come."""
        self._num_calls += 1
        self._told.append({"call": at})

    def put_into(self, message: Json) -> None:
        """Have a message say its order, where text came behind a call."""
        if self._is_mixed:
            message["extra_content"] = {**_own_of(message), OWN: {"order": self._told}}


def said(message: Json) -> list[tuple[str, Any]]:
    """What a message says, in its order: ``text`` with a piece of it, and ``call`` with the object of ``tool_calls``.

    Where it says no order, or one that is not that of what it holds, all its text comes first.
    """
    content, calls = message.get("content"), message.get("tool_calls")
    content = content if isinstance(content, str) else ""
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return _ordered(content, calls, _order_of(message)) or [
        *([("text", content)] if content else []),
        *(("call", call) for call in calls),
    ]


def without_order(extra: Json) -> Json:
    """``extra_content`` without it, for forms that have an order of their own."""
    return {name: value for name, value in extra.items() if name != OWN} if OWN in extra else extra


def _own_of(message: Json) -> Json:
    found = message.get("extra_content")
    return found if isinstance(found, dict) else {}


def _order_of(message: Json) -> Sequence[Any]:
    own = _own_of(message).get(OWN)
    order = own.get("order") if isinstance(own, dict) else None
    return order if isinstance(order, list) else ()


def _ordered(content: str, calls: Sequence[Json], order: Sequence[Any]) -> list[tuple[str, Any]]:
    """Nothing for an order that does not name all of both, each once."""
    found: list[tuple[str, Any]] = []
    at, places = 0, set[int]()
    for one in order:
        length, place = (one.get("text"), one.get("call")) if isinstance(one, dict) else (None, None)
        if isinstance(length, int) and is_int(length) and length > 0:
            found.append(("text", content[at : at + length]))
            at += length
        elif isinstance(place, int) and is_int(place) and 0 <= place < len(calls) and place not in places:
            found.append(("call", calls[place]))
            places.add(place)
        else:
            return []
    return found if at == len(content) and len(places) == len(calls) else []
