"""Where things are in a JSON text, found by NumPy in blocks, which holds Python's lock for none of them."""

from collections.abc import Iterator

import numpy as np

_BLOCK = 1 << 18
_QUOTE, _SLASH, _COMMA = (ord(letter) for letter in '"\\,')

# What goes into a list or an object, and out of it.
_STEP = np.zeros(256, np.int8)
_STEP[[ord("["), ord("{")]] = 1
_STEP[[ord("]"), ord("}")]] = -1


def find_quotes(piece: np.ndarray, is_escaped: int) -> tuple[np.ndarray, int]:
    """Of the bytes of a piece: which are quotes that begin or end a text, and whether its end is behind a backslash that escapes.

    Args:
        piece: uint8.
        is_escaped: whether its beginning is.
    """
    quotes, slashes = piece == _QUOTE, piece == _SLASH
    if is_escaped or slashes.any():
        # A quote is none behind an odd number of backslashes: how many, from where the last other byte stands.
        places = np.arange(len(piece), dtype=np.int32)
        before = np.int32(-1 - is_escaped)
        last_other = np.maximum.accumulate(np.where(slashes, before, places))
        run = places - 1 - np.concatenate(([before], last_other[:-1]))
        quotes &= run % 2 == 0
        is_escaped = int(len(piece) - 1 - last_other[-1]) % 2
    return quotes, is_escaped


def _pieces(raw: bytes, block: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(raw), block):
        yield start, np.frombuffer(raw, np.uint8, min(block, len(raw) - start), start)


def unescaped_quotes(raw: bytes, block: int = _BLOCK) -> np.ndarray:
    """Places of all quotes that begin or end a text, int64, in order."""
    found, is_escaped = [], 0
    for start, piece in _pieces(raw, block):
        quotes, is_escaped = find_quotes(piece, is_escaped)
        found.append(np.flatnonzero(quotes) + start)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def long_lists(raw: bytes, least: int, block: int = _BLOCK) -> list[tuple[int, int, np.ndarray]]:
    """Lists of more than ``least`` bytes that are values of the outermost object: places of the brackets, and of commas between items.

    Of a text that is no JSON they are anywhere.
    """
    depth, is_inside, is_escaped = 0, 0, 0
    turns, commas = [], []
    for start, piece in _pieces(raw, block):
        quotes, is_escaped = find_quotes(piece, is_escaped)
        inside = (np.add.accumulate(quotes, dtype=np.uint8) & 1) ^ is_inside
        is_inside = int(inside[-1])
        outside = np.where(inside, 0, piece)
        steps = _STEP[outside]
        depths = np.add.accumulate(steps, dtype=np.int32) + depth
        depth = int(depths[-1])
        # Behind an opening bracket of the second level, and behind its closing one.
        turns.append(np.flatnonzero(((steps == 1) & (depths == 2)) | ((steps == -1) & (depths == 1))) + start)
        commas.append(np.flatnonzero((outside == _COMMA) & (depths == 2)) + start)
    if not turns:
        return []
    turn, comma = np.concatenate(turns), np.concatenate(commas)
    lists = []
    for at in range(0, len(turn) - 1, 2):
        opens, closes = int(turn[at]), int(turn[at + 1])
        if closes - opens > least and raw[opens : opens + 1] == b"[" and raw[closes : closes + 1] == b"]":
            within = slice(*np.searchsorted(comma, (opens, closes)))
            lists.append((opens, closes, comma[within]))
    return lists
