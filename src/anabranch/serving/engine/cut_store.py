"""`CutStore`: one step's view of the blocks that this rank holds; what the others hold comes as their partial results."""
# Shapes: T tokens of a step, H query heads, G key heads, D head width, S slots of this rank, W rows that it keeps

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.cluster.ring.kernel import attend, fine_dtype
from anabranch.cluster.ring.layout import Run
from anabranch.cluster.ring.pieces import Mask, Piece, pieces_between
from anabranch.cluster.ring.scored import with_sinks
from anabranch.errors import ConfigError
from anabranch.nn.scored import PLAIN, Scoring
from anabranch.serving.engine.cut import Cut
from anabranch.serving.engine.layout import Span, StepLayout
from anabranch.serving.engine.paged import PagedPool, ToldSlot, VisitSlots

__all__ = ["CutStore"]


@dataclass(frozen=True)
class _Part:
    """What one sequence's rows see of this rank's keys: its rows in the step, slots of the keys, and the pieces of the work."""

    rows: slice
    slot_S: Tensor
    pieces: tuple[Piece, ...]


class CutStore:
    """The `anabranch.nn.context.AttendingStore` of a forward pass over keys and values that are cut over ranks.

    Args:
        pool: this rank's blocks.
        layout: where the step's rows stand, with the scheduler's numbers of blocks.
        cut: the ranks.
        visits: where each visit of a block is kept.
    """

    keeps_visits = True
    takes_scoring = True

    def __init__(self, pool: PagedPool, layout: StepLayout, cut: Cut, visits: VisitSlots | ToldSlot) -> None:
        self.pool, self.layout, self.cut, self._visits = pool, layout, cut, visits
        self._kept: tuple[Tensor, Tensor] | None = None
        self._parts: dict[int | None, list[_Part]] = {}

    def attend(
        self,
        layer: int,
        query_BHLD: Tensor,
        key_BGLD: Tensor,
        value_BGLD: Tensor,
        *,
        visit: int = 0,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """y_BHLD; B is 1, L the rows T of the step. Raises ConfigError for latent attention, whose values are part of its keys."""
        if scoring.value_width is not None:
            raise ConfigError("keys and values that share their numbers (latent attention) are not cut over ranks")
        slot = self._visits.of(layer, visit)
        key_SGD, value_SGD = self.pool.key[slot, 0], self.pool.value[slot, 0]
        row_W, slot_W = self._keeps()
        for stored_SGD, new_BGLD in ((key_SGD, key_BGLD), (value_SGD, value_BGLD)):
            stored_SGD.index_copy_(0, slot_W, new_BGLD[0].transpose(0, 1)[row_W].to(stored_SGD.dtype))
        fine = fine_dtype(query_BHLD.dtype)
        out = torch.zeros(*query_BHLD.shape[:3], value_BGLD.shape[-1], dtype=fine, device=query_BHLD.device)
        lse = torch.full(query_BHLD.shape[:3], -torch.inf, dtype=fine, device=query_BHLD.device)
        scale = query_BHLD.shape[3] ** -0.5 if scoring.scale is None else scoring.scale
        for part in self._seen(scoring.window):
            if len(part.slot_S):
                key, value = (stored[part.slot_S].transpose(0, 1)[None] for stored in (key_SGD, value_SGD))
                rows = part.rows
                attend(query_BHLD[:, :, rows], key, value, part.pieces, out[:, :, rows], lse[:, :, rows], scale=scale)
        out, lse = self.cut.merged(out, lse)
        return with_sinks(out.transpose(1, 2), lse.transpose(1, 2), scoring).transpose(1, 2).to(query_BHLD.dtype)

    def _keeps(self) -> tuple[Tensor, Tensor]:
        """(row_W, slot_W): rows of the step that this rank keeps, and where."""
        if self._kept is None:
            rows, slots = [], []
            for number, span in enumerate(self.layout.spans):
                place_S, slot_S = self._own(number)
                is_new = place_S >= span.past
                rows.append(place_S[is_new] - span.past + span.first)
                slots.append(slot_S[is_new])
            self._kept = self._tensor(np.concatenate(rows)), self._tensor(np.concatenate(slots))
        return self._kept

    def _seen(self, window: int | None) -> list[_Part]:
        """What each sequence sees, by how far back."""
        if window not in self._parts:
            self._parts[window] = [
                self._part(span, *self._own(number), window) for number, span in enumerate(self.layout.spans)
            ]
        return self._parts[window]

    def _part(self, span: Span, place_S: NDArray[np.int64], slot_S: NDArray[np.int64], window: int | None) -> _Part:
        last = span.length - 1
        if window is not None:
            is_seen = place_S > span.past - window
            place_S, slot_S = place_S[is_seen], slot_S[is_seen]
        # Between those that only some rows see, as their window has left them or they come after: what all rows see is one piece.
        first = 0 if window is None else int(np.searchsorted(place_S, last - window, "right"))
        end = max(first, int(np.searchsorted(place_S, span.past, "right")))
        runs = [*_runs(place_S[:first], 0), *_runs(place_S[end:], end)]
        pieces = pieces_between([Run(0, range(span.past, span.length))], runs, Mask(True, window))
        whole = (Piece((0, span.count), (first, end)),) if end > first else ()
        return _Part(slice(span.first, span.first + span.count), self._tensor(slot_S), (*whole, *pieces))

    def _own(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(positions, slots) of a sequence that lie here, in order."""
        layout, span, size = self.layout, self.layout.spans[number], self.layout.block_tokens
        start = layout.start_N[number]
        block_U = layout.table_U[start : start - (-span.length // size)].astype(np.int64)
        # Below zero is what was given back.
        (mine_M,) = np.nonzero((block_U >= 0) & (block_U % self.cut.world == self.cut.rank))
        inside = np.arange(size)
        place_S = (mine_M[:, None] * size + inside).reshape(-1)
        slot_S = (block_U[mine_M, None] // self.cut.world * size + inside).reshape(-1)
        is_there = place_S < span.length
        return place_S[is_there], slot_S[is_there]

    def _tensor(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self.pool.device)


def _runs(place_S: NDArray[np.int64], row: int) -> list[Run]:
    """Positions that follow each other; the first is row ``row`` of the keys."""
    if not len(place_S):
        return []
    ends = [*(np.nonzero(np.diff(place_S) != 1)[0] + 1).tolist(), len(place_S)]
    made, first = [], 0
    for end in ends:
        made.append(Run(row + first, range(int(place_S[first]), int(place_S[end - 1]) + 1)))
        first = end
    return made
