"""What the queries of one rank see of the keys of another, as rectangles and triangles that kernels are quick at.

Runs of evenly spaced positions see each other in few ways: not at all, wholly, or by a triangle, in front of which stands a rectangle
and behind which another. Only windows need a mask. So next to nothing is computed and masked away, and what is counted is what is done.
"""
# Shapes: L queries, S keys

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anabranch.cluster.ring.layout import Run
from anabranch.errors import InputError

__all__ = ["Mask", "Piece", "Rows", "hull", "pieces_between"]

# First row, and the first that is not of them any more.
Rows = tuple[int, int]


@dataclass(frozen=True)
class Mask:
    """What a query may see of its document.

    Attributes:
        causal: nothing behind itself.
        window: at most so many positions, its own among them; None for all. Only with ``causal``.

    Raises InputError for a window below 1, or one without ``causal``.
    """

    causal: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise InputError(
                f"window is {self.window} and causal {self.causal}; a window is at least 1, and of causal attention"
            )


class Piece(NamedTuple):
    """A part of the work.

    Attributes:
        rows: of the queries.
        keys: rows of the keys.
        kind: ``full``: each query sees each key; ``causal``: a square, query i sees keys 0 to i; ``window``: by the positions.
        query_positions, key_positions: where ``kind`` is ``window``.
        window: likewise.
    """

    rows: Rows
    keys: Rows
    kind: Literal["full", "causal", "window"] = "full"
    query_positions: range = range(0)
    key_positions: range = range(0)
    window: int = 0

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key see each other."""
        length = self.rows[1] - self.rows[0]
        if self.kind == "full":
            return length * (self.keys[1] - self.keys[0])
        if self.kind == "causal":
            return length * (length + 1) // 2
        keys, last_L = self.key_positions, _arange(self.query_positions, None)
        before_L, upto_L = (
            ((end_L - keys.start).div(keys.step, rounding_mode="floor") + 1).clamp(0, len(keys))
            for end_L in (last_L - self.window, last_L)
        )
        return int((upto_L - before_L).sum())

    def seen(self, first: int = 0, last: int | None = None, device: torch.device | None = None) -> Tensor:
        """bool ``[L, S]``: which pairs of the queries ``first`` to ``last`` (None: all), of a ``window``."""
        query_L1 = _arange(self.query_positions[first:last], device)[:, None]
        key_S = _arange(self.key_positions, device)
        return (key_S <= query_L1) & (key_S > query_L1 - self.window)


def pieces_between(queries: Iterable[Run], keys: Sequence[Run], mask: Mask) -> tuple[Piece, ...]:
    """What ``queries`` see of ``keys``; no pair is in two pieces."""
    found = [
        piece
        for query in queries
        for key in keys
        if query.document == key.document and query.positions and key.positions
        for piece in _of_runs(query, key, mask)
    ]
    return tuple(_joined(_joined(found, "keys"), "rows"))


def hull(rows: Iterable[Rows]) -> Rows | None:
    """The least interval that has all of them; None of none."""
    found = list(rows)
    return (min(first for first, _ in found), max(last for _, last in found)) if found else None


def _of_runs(query: Run, key: Run, mask: Mask) -> Iterator[Piece]:
    positions, others = query.positions, key.positions
    if not mask.causal:
        yield _full(query.row, len(positions), key.row, len(others))
    elif mask.window is not None and positions[-1] - others[0] >= mask.window:
        yield from _windowed(query, key, mask.window)
    elif positions.step == others.step or min(len(positions), len(others)) == 1:
        yield from _causal(query, key)
    elif positions[-1] >= others[0]:
        # Spaced otherwise, as where new queries meet keys that were placed before: no triangle has that form.
        yield from _windowed(query, key, positions[-1] - others[0] + 1)


def _causal(query: Run, key: Run) -> Iterator[Piece]:
    """Query i sees keys 0 to i + ahead."""
    length, keys = len(query.positions), len(key.positions)
    step = query.positions.step if length > 1 else key.positions.step if keys > 1 else 1
    ahead = (query.positions[0] - key.positions[0]) // step
    row, first = query.row + max(0, -ahead), key.row
    length, ahead = length - max(0, -ahead), max(0, ahead)
    if length <= 0:
        return
    front = min(ahead, keys)
    square = min(keys - front, length)
    if front:
        yield _full(row, length, first, front)
    if square:
        yield Piece((row, row + square), (first + front, first + front + square), "causal")
        if length > square:
            yield _full(row + square, length - square, first + front, square)


def _windowed(query: Run, key: Run, window: int) -> Iterator[Piece]:
    """Trimmed to rows and keys that see one of the others by their ends."""
    positions, others = query.positions, key.positions
    positions = _between(positions, others[0], others[-1] + window)
    if not positions:
        return
    others = _between(others, positions[0] - window + 1, positions[-1] + 1)
    if not others:
        return
    row = query.row + query.positions.index(positions[0])
    first = key.row + key.positions.index(others[0])
    if others[-1] <= positions[0] and positions[-1] - others[0] < window:
        yield _full(row, len(positions), first, len(others))
        return
    yield Piece((row, row + len(positions)), (first, first + len(others)), "window", positions, others, window)


def _between(positions: range, least: int, end: int) -> range:
    """Those from ``least`` on, before ``end``."""
    begin = max(0, -(-(least - positions.start) // positions.step))
    stop = max(begin, -(-(end - positions.start) // positions.step))
    return positions[begin:stop]


def _full(row: int, length: int, first: int, keys: int) -> Piece:
    return Piece((row, row + length), (first, first + keys))


def _joined(pieces: Sequence[Piece], along: Literal["rows", "keys"]) -> list[Piece]:
    """Full pieces that lie side by side as one: a kernel is called less often."""
    across = "rows" if along == "keys" else "keys"
    made: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (getattr(piece, across), getattr(piece, along))):
        last = made[-1] if made else None
        if (
            last is not None
            and last.kind == piece.kind == "full"
            and getattr(last, across) == getattr(piece, across)
            and getattr(last, along)[1] == getattr(piece, along)[0]
        ):
            joined = (getattr(last, along)[0], getattr(piece, along)[1])
            made[-1] = last._replace(rows=joined) if along == "rows" else last._replace(keys=joined)
        else:
            made.append(piece)
    return made


def _arange(positions: range, device: torch.device | None) -> Tensor:
    return torch.arange(positions.start, positions.stop, positions.step, device=device)
