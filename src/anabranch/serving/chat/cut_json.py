"""`read_cut_object`: a JSON object whose text ends in the middle."""

import json
import re
from typing import Any

__all__ = ["read_cut_object"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{},]', re.DOTALL)
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
# That is cut off, behind backslashes that escape each other.
_ESCAPE = re.compile(r"((?<!\\)(?:\\\\)*)\\u[0-9a-fA-F]{0,3}$")
# Characters; no answer is as long.
_MOST = 1 << 20
_CLOSES = {"{": "}", "[": "]"}


def read_cut_object(text: str) -> dict[str, Any] | None:
    """What is there of a JSON object that was cut off; None for a text that no object begins with.

    A text in it ends where it was cut; any other value, or a name, that is not whole is left out. ``{"a": [1, {"b": "x`` is
    ``{"a": [1, {"b": "x"}]}``.
    """
    if len(text) > _MOST:
        return None
    closes: list[str] = []
    # Where its last value may be left out, and what closes it there.
    before, is_text_open = (0, ""), False
    for token in _TOKEN.finditer(text):
        sign = token.group()
        if sign in _CLOSES:
            closes.append(_CLOSES[sign])
            before = token.end(), "".join(reversed(closes))
        elif sign == ",":
            before = token.start(), "".join(reversed(closes))
        elif sign in "]}":
            if not closes or closes.pop() != sign:
                return None
        else:
            is_text_open = not _TEXT.fullmatch(sign)
            if is_text_open:
                # No part of an escape.
                text = _ESCAPE.sub(r"\1", text[: token.end()])
    at, rest = before
    for made in (text + '"' * is_text_open + "".join(reversed(closes)), text[:at] + rest):
        try:
            value = json.loads(made)
        except (ValueError, RecursionError):
            continue
        return value if closes and isinstance(value, dict) else None
    return None
