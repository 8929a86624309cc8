"""`check_json_size`: how much a JSON text would make, found out before anything is made of it.

The parser holds Python's lock from beginning to end, and its time goes into what it makes: 8 MiB of ``[[],[],...]`` take it a second, in
which no other thread runs, and ten of them as many. Texts cost next to nothing. What is counted here is read by NumPy in blocks, which
holds the lock for none of them, and ends where the limit is passed.
"""

import numpy as np

from anabranch.errors import InputError
from anabranch.web.api_error import ApiError
from anabranch.web.json_places import find_quotes

__all__ = ["MOST_PARTS", "MOST_VALUES", "JsonRoom", "JsonSizeError", "check_json_size"]

# Of a body, where nobody says otherwise.
MOST_VALUES, MOST_PARTS = 1 << 18, 1 << 16
_BLOCK = 1 << 18
# Of a value, on average; long numbers take the parser longer than their share.
_DIGITS = 8
_COMMA, _LIST, _OBJECT, _COLON = (ord(letter) for letter in ",[{:")


def check_json_size(raw: bytes, most_values: int, most_parts: int, block: int = _BLOCK) -> None:
    """Raises ApiError (400) for a body with too much in it. One that is no JSON may pass; the parser will say so.

    Args:
        raw: UTF-8.
        most_values, most_parts: see `JsonRoom`.
        block: bytes that are looked at together.
    """
    # All that there can be; commas and brackets within texts are none, but most bodies have few even of those.
    is_short = len(raw) <= _DIGITS * most_values
    if is_short and raw.count(b",") <= most_values and sum(map(raw.count, (b"[", b"{", b":"))) <= most_parts:
        return
    try:
        JsonRoom(most_values, most_parts).take(raw, block)
    except JsonSizeError as error:
        raise ApiError(400, "too_many_values", f"the body has {error}") from None


class JsonSizeError(InputError):
    """There is more in a text than may be; says what."""


class JsonRoom:
    """What may be in several JSON texts together.

    Args:
        most_values: values that stand side by side in lists and objects, such as the token ids of a prompt; of their numbers' digits
            there may be eight times as many.
        most_parts: lists, objects and names of values in them, together; these cost the most.
    """

    def __init__(self, most_values: int, most_parts: int) -> None:
        self._most_values, self._most_parts = most_values, most_parts
        self._values = self._parts = self._digits = 0

    def take(self, raw: bytes, block: int = _BLOCK) -> None:
        """Count one more text, in UTF-8. Raises JsonSizeError where that makes too much. See `check_json_size`."""
        is_inside = is_escaped = 0
        for start in range(0, len(raw), block):
            piece = np.frombuffer(raw, np.uint8, min(block, len(raw) - start), start)
            outside, is_inside, is_escaped = _outside_texts(piece, is_inside, is_escaped)
            counts = np.bincount(outside, minlength=256)
            self._values += int(counts[_COMMA])
            self._parts += int(counts[_LIST] + counts[_OBJECT] + counts[_COLON])
            self._digits += int(counts[ord("0") : ord("9") + 1].sum())
            for what, count, most in (
                ("values", self._values, self._most_values),
                ("lists, objects and names", self._parts, self._most_parts),
                ("digits of numbers", self._digits, _DIGITS * self._most_values),
            ):
                if count > most:
                    raise JsonSizeError(f"more than {most:,} {what}, as many as may be")


def _outside_texts(piece: np.ndarray, is_inside: int, is_escaped: int) -> tuple[np.ndarray, int, int]:
    """The bytes of a piece with 0 for those in texts; whether its end is within a text, and behind a backslash that escapes."""
    quotes, is_escaped = find_quotes(piece, is_escaped)
    inside = (np.add.accumulate(quotes, dtype=np.uint8) & 1) ^ is_inside
    return np.where(inside, 0, piece), int(inside[-1]), is_escaped
