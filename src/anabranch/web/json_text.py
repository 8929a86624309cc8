"""JSON as it goes over the wire, of values that hold whatever a client sent: always valid, whatever is in them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Rows:
    """A list that is made while it is written, so that whoever tells a million rows need not hold them all, nor make them in one go.

    Args:
        make: gives the items, from the first on, each time it is called.
    """

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def to_json(value: Any, separators: tuple[str, str] | None = None) -> bytes:
    """JSON in UTF-8.

    Half of a surrogate pair, which a client can spell (``"\\ud800"``) and UTF-8 cannot, is escaped as the client did; numbers that JSON
    has not (NaN, infinities) are null; what is no JSON at all is told as its text.

    Args:
        value: dicts, lists and so on, `Rows` among them.
        separators: as of `json.dumps`; None for its own.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain, allow_nan=False, separators=separators)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=_plain, separators=separators)
    # Python's form of the escape is JSON's, and what is no ASCII stands inside of texts only.
    return text.encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Rows) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple | Rows) else value
