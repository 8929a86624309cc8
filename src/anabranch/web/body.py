"""The JSON of a request, and how an error shows a value of it."""

import json
import math
from typing import Any

from anabranch.bounds import shown
from anabranch.web.api_error import ApiError

# Characters of a number in a message.
_LONGEST = 40


def parse(raw: bytes) -> dict[str, Any]:
    """JSON of a body. Raises ApiError (400) for what is none, is not UTF-8, or is no object."""
    try:
        body = read_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_utf8", f"the body is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deep") from None
    except _InfiniteError as error:
        raise ApiError(400, "invalid_json", f"the body holds the number {error}, which is too large") from None
    except ValueError as error:
        where = ""
        if isinstance(error, json.JSONDecodeError):
            where = f": {error.msg} at line {error.lineno}, column {error.colno}"
        raise ApiError(400, "invalid_json", f"the body is not JSON{where}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", f"the body is a {kind(body)}; send an object")
    return body


def read_json(text: str) -> Any:
    """JSON whose numbers are finite. Raises ValueError, and RecursionError."""
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("a byte order mark is no JSON", text, 0)
    return _DECODER.decode(text)


def is_int(value: Any) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


class _InfiniteError(ValueError):
    """A number that is one by JSON, and infinite for all who read it: what is made of it would be no JSON."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _InfiniteError(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# Made once: that takes as long as to read a short body.
_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def kind(value: Any) -> str:
    """JSON's name of the value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def said(value: Any) -> str:
    """The value as an error shows it: never the text of a prompt."""
    if value is None:
        return "missing"
    if isinstance(value, bool | int | float):
        return shown(value)[:_LONGEST]
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 and value.isprintable() else f"a string of {len(value):,} characters"
    return f"{'an' if isinstance(value, dict) else 'a'} {kind(value)}" + ("" if value else " with nothing in it")


# Lists and objects within one another. More are of no use to a model, and what walks through them or writes them calls itself as often.
MOST_DEPTH = 200


def is_too_deep(value: Any, most: int = MOST_DEPTH) -> bool:
    """Whether more than ``most`` lists and objects lie within one another."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
