"""Which rank has which positions of a sequence that is cut over N ranks.

    contiguous   rank r has the r-th of N equal chunks
    zigzag       2 N chunks, rank r has chunks r and 2 N - 1 - r: under a causal mask all ranks have equal work (ring-flash-attention)
    stripe       rank r has positions r, r + N, r + 2 N, ... (Brandon et al. 2023, arXiv 2311.09431)

    layout = Layout("zigzag", world=4, length=1000)
    x_BLW = layout.shard(whole_BLW, rank)            # padded where 1000 is no multiple of 8
    whole_BLW = layout.unshard([part_of_each_rank])  # and without the padding again

`Placement` is what attention needs of it: for each rank the runs of positions that its rows are, cut where documents end, without padding.
"""
# Shapes: B sequences, L positions of a rank, S positions of all

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import InputError

__all__ = ["KINDS", "Layout", "Placement", "Run", "check_documents", "rows_together"]

KINDS = ("contiguous", "zigzag", "stripe")


class Run(NamedTuple):
    """Rows of a rank that are evenly spaced positions of one document.

    Attributes:
        row: the first of them.
        positions: of the rows, ascending.
        document: number of the document.
    """

    row: int
    positions: range
    document: int = 0

    def within(self, first: int, last: int) -> "Run":
        """What of it is rows ``first`` to ``last`` (exclusive)."""
        begin = min(max(first - self.row, 0), len(self.positions))
        end = min(max(last - self.row, begin), len(self.positions))
        return Run(self.row + begin, self.positions[begin:end], self.document)


@dataclass(frozen=True)
class Placement:
    """Where the positions are.

    Attributes:
        rows: rows of each rank, padding among them.
        runs: the runs of each rank; rows in none of them are padding, which sees nothing and is not seen.
    """

    rows: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.rows)

    def followed_by(self, other: "Placement") -> "Placement":
        """The rows of this, and behind them those of ``other``, on each rank."""
        runs = tuple(
            _joined((*mine, *(run._replace(row=run.row + rows) for run in theirs)), len(mine))
            for rows, mine, theirs in zip(self.rows, self.runs, other.runs, strict=True)
        )
        return Placement(tuple(map(sum, zip(self.rows, other.rows, strict=True))), runs)


def rows_together(placement: Placement, size: int) -> Placement:
    """Every ``size`` ranks as one, their rows one behind another."""
    made: list[Placement] = []
    for first in range(0, placement.world, size):
        together = Placement((0,), ((),))
        for rank in range(first, first + size):
            together = together.followed_by(Placement((placement.rows[rank],), (placement.runs[rank],)))
        made.append(together)
    return Placement(tuple(one.rows[0] for one in made), tuple(one.runs[0] for one in made))


@dataclass(frozen=True)
class Layout:
    """A sequence of ``length`` positions over ``world`` ranks, as many rows on each.

    Attributes:
        kind: ``contiguous``, ``zigzag`` or ``stripe``.
        world: N.
        length: S.
        documents: where documents that were packed into the sequence begin and the last one ends, ``(0, ..., S)``; positions of one do
            not see those of another. None for one document.
        first: position of the first, where others stand before the sequence.
        least_rows: rows that a rank has at least, where more padding is wanted than must be.

    Raises InputError for a kind that is none, a world below 1, a negative length, or documents that are not ascending from 0 to ``length``.
    """

    kind: Literal["contiguous", "zigzag", "stripe"]
    world: int
    length: int
    documents: tuple[int, ...] | None = None
    first: int = 0
    least_rows: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"layout is {self.kind!r}; use {', '.join(KINDS)}")
        if self.world < 1:
            raise InputError(f"world is {self.world}; there is at least 1 rank")
        if self.length < 0 or self.first < 0:
            raise InputError(f"length is {self.length} and first {self.first}; neither can be negative")
        if self.documents is not None:
            check_documents(self.documents, self.length)

    @cached_property
    def rows(self) -> int:
        """Rows of a rank: S / N rounded up, to an even number in zigzag; or `least_rows`, if that is more."""
        chunks = 2 if self.kind == "zigzag" else 1
        return max(-(-self.length // (chunks * self.world)), -(-self.least_rows // chunks)) * chunks

    def _pieces(self, rank: int) -> list[range]:
        """Places in the sequence of the rows of a rank, in order; beyond ``length`` they are padding."""
        if not 0 <= rank < self.world:
            raise InputError(f"rank is {rank}; use 0 to {self.world - 1}")
        if self.kind == "stripe":
            return [range(rank, rank + self.rows * self.world, self.world)]
        if self.kind == "contiguous":
            return [range(rank * self.rows, (rank + 1) * self.rows)]
        size, mirror = self.rows // 2, 2 * self.world - 1 - rank
        return [range(chunk * size, (chunk + 1) * size) for chunk in (rank, mirror)]

    def places(self, rank: int) -> Tensor:
        """int64 ``[L]``: place in the sequence of each row of a rank; those from ``length`` on are padding."""
        return torch.cat([torch.arange(piece.start, piece.stop, piece.step) for piece in self._pieces(rank)])

    def position_ids(self, rank: int) -> Tensor:
        """int64 ``[L]``: what rotary embeddings are to be given. Documents begin at 0 each; otherwise counted from ``first``."""
        places_L = self.places(rank)
        if self.documents is None:
            return places_L + self.first
        begin = torch.tensor(self.documents)
        number_L = (torch.searchsorted(begin, places_L, right=True) - 1).clamp(0, len(begin) - 1)
        return places_L - begin[number_L]

    def is_real(self, rank: int) -> Tensor:
        """bool ``[L]``: False for padding; what a loss is masked with."""
        return self.places(rank) < self.length

    @cached_property
    def placement(self) -> Placement:
        """The runs of all ranks."""
        bounds = (0, self.length) if self.documents is None else self.documents
        return Placement((self.rows,) * self.world, tuple(self._runs(rank, bounds) for rank in range(self.world)))

    def _runs(self, rank: int, bounds: tuple[int, ...]) -> tuple[Run, ...]:
        runs, row = [], 0
        for piece in self._pieces(rank):
            for document, (begin, end) in enumerate(pairwise(bounds)):
                start, stop = _first_from(piece, begin), _first_from(piece, end)
                if start < stop:
                    inside = piece[start:stop]
                    positions = range(inside.start + self.first, inside[-1] + self.first + 1, inside.step)
                    runs.append(Run(row + start, positions, document))
            row += len(piece)
        return tuple(runs)

    def shard(self, whole: Tensor, rank: int, *, dim: int = 1, value: float = 0) -> Tensor:
        """The rows of ``rank`` of a tensor with S positions along ``dim``; padding is ``value``.

        Raises InputError if it has another number of positions.
        """
        if whole.shape[dim] != self.length:
            raise InputError(f"the tensor has {whole.shape[dim]} positions, the layout is of {self.length}")
        missing = self.rows * self.world - self.length
        if missing:
            # `pad` counts dimensions from the last.
            behind = whole.dim() - 1 - dim % whole.dim()
            whole = F.pad(whole, (0, 0) * behind + (0, missing), value=value)
        return whole.index_select(dim, self.places(rank).to(whole.device))

    def unshard(self, parts: Sequence[Tensor], *, dim: int = 1) -> Tensor:
        """The whole of the rows of all ranks, in their order, without padding. Raises InputError for another number of ranks or rows."""
        sizes = [part.shape[dim] for part in parts]
        if sizes != [self.rows] * self.world:
            raise InputError(f"the parts have {sizes} rows; the layout has {self.rows} on each of {self.world} ranks")
        place = torch.cat([self.places(rank) for rank in range(self.world)]).argsort()
        whole = torch.cat(list(parts), dim)
        return whole.index_select(dim, place[: self.length].to(whole.device))


def check_documents(documents: Sequence[int], length: int) -> None:
    """Raise InputError unless they ascend from 0 to ``length``."""
    ascends = len(documents) > 1 and all(first <= second for first, second in pairwise(documents))
    if not ascends or documents[0] != 0 or documents[-1] != length:
        shown = list(documents) if len(documents) <= 8 else [*documents[:4], "...", documents[-1]]
        raise InputError(f"documents are {shown}; they must ascend from 0 to the sequence's length, {length}")


def _joined(runs: tuple[Run, ...], place: int) -> tuple[Run, ...]:
    """The same with the runs before and at ``place`` as one, where rows and positions go on evenly: else a cache had one for each token."""
    if not 0 < place < len(runs):
        return runs
    one, other = runs[place - 1], runs[place]
    first, last = one.positions, other.positions
    step = last[0] - first[-1]
    is_even = step > 0 and all(len(part) == 1 or part.step == step for part in (first, last))
    if one.document != other.document or one.row + len(first) != other.row or not is_even:
        return runs
    return (*runs[: place - 1], Run(one.row, range(first[0], last[-1] + 1, step), one.document), *runs[place + 1 :])


def _first_from(places: range, least: int) -> int:
    """Index of the first place that is not below ``least``."""
    return min(max(-(-(least - places.start) // places.step), 0), len(places))
