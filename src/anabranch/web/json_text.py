"""JSON as it goes over the wire, of values that hold whatever a client sent: always valid, whatever is in them."""

import json
import math
from typing import Any


def to_json(value: Any, separators: tuple[str, str] | None = None) -> bytes:
    """JSON in UTF-8.

    Half of a surrogate pair, which a client can spell (``"\\ud800"``) and UTF-8 cannot, is escaped as the client did; numbers that JSON
    has not (NaN, infinities) are null; what is no JSON at all is told as its text.

    Args:
        value: dicts, lists and so on.
        separators: as of `json.dumps`; None for its own.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False, separators=separators)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=str, separators=separators)
    # Python's form of the escape is JSON's, and what is no ASCII stands inside of texts only.
    return text.encode("utf-8", "backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
