"""`steady_attention`: attention of rows of one sequence that is the same to the bit however many of them a step computes at once.

A position has its place in a tile of `ROWS` queries and in one of `KEYS` keys, whatever a step begins or ends with: position p is row
p % ROWS of its tile. Each product, sum and exponential is of whole tiles, so of the same sizes, and tiles of keys are added up in order
(the running softmax of Milakov and Gimelshein, 2018, arXiv 1805.02867). One of which a row sees nothing adds zeros to it
and changes no bit.
"""
# Shapes: P streams, H query heads, G key heads, L rows, S keys, D head width, V width of a value, M entries in front, N tiles,
# K = KEYS, X = rows of a tile of all heads that share a key head

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.nn.scored import Scoring

__all__ = ["KEYS", "ROWS", "steady_attention"]

ROWS, KEYS = 8, 256

# The greatest score of a row that has seen nothing: finite, as the difference of two infinities is no number.
LEAST = -1e30


def steady_attention(
    query_PHLD: Tensor,
    key_PGSD: Tensor,
    value_PGSV: Tensor,
    scoring: Scoring,
    past: int,
    front: tuple[Tensor, Tensor] | None = None,
    *,
    position_S: Tensor | None = None,
) -> Tensor:
    """y_PHLV in the queries' type; computed in float32 at least.

    Args:
        query_PHLD: of positions ``past`` on.
        key_PGSD: of the last S positions up to that of the last query: all that any of them sees.
        value_PGSV: likewise; not read with ``scoring.value_width``.
        scoring: how scores become weights.
        past: positions before the first query.
        front: (key_PGMD, value_PGMV) that every query sees beside.
        position_S: int64, of the keys, in which a window is counted where tokens were left out between them; all else goes by their places
            then. None for the places.
    """
    if scoring.value_width is not None:
        value_PGSV = key_PGSD[..., : scoring.value_width]
    streams, heads, length, width = query_PHLD.shape
    groups, begin = key_PGSD.shape[1], past + length - key_PGSD.shape[2]
    fine = torch.promote_types(query_PHLD.dtype, torch.float32)
    scale = width**-0.5 if scoring.scale is None else scoring.scale
    key_NPGKD, value_NPGKV = (_tiles(part.to(fine), begin, KEYS) for part in (key_PGSD, value_PGSV))
    fronts = [] if front is None else [_tiles(part.to(query_PHLD).to(fine), 0, KEYS) for part in front]
    offset_K, offset_R = (torch.arange(size, device=query_PHLD.device) for size in (KEYS, ROWS))
    # By place, from that of the first tile of keys on.
    begun = begin // KEYS * KEYS
    table_S = None if position_S is None else _table(position_S, begin - begun, past + length - begun)
    made = []
    for number, query_PHRD in enumerate(_tiles(query_PHLD.to(fine) * scale, past, ROWS), past // ROWS):
        # A tile of its own lies where any other would: kernels may ask how memory is aligned.
        rows = _Rows.of(query_PHRD.reshape(streams * groups, -1, width).clone(), value_PGSV.shape[-1])
        for tile in range(len(fronts[0]) if fronts else 0):
            seen_RK = (tile * KEYS + offset_K < front[0].shape[2]).expand(ROWS, -1)  # type: ignore[index]
            rows = rows.after(fronts[0][tile], fronts[1][tile], seen_RK)
        position_R1 = (number * ROWS + offset_R).unsqueeze(1)
        lowest = 0 if scoring.window is None or table_S is not None else max(number * ROWS + 1 - scoring.window, 0)
        for tile in range(max(lowest, begin) // KEYS, (min((number + 1) * ROWS, past + length) - 1) // KEYS + 1):
            position_K = tile * KEYS + offset_K
            seen_RK = position_K <= position_R1
            if scoring.window is not None and table_S is not None:
                seen_RK = seen_RK & (
                    table_S[position_K - begun] > table_S[(position_R1 - begun).clamp_min(0)] - scoring.window
                )
            elif scoring.window is not None:
                seen_RK = seen_RK & (position_K > position_R1 - scoring.window)
            rows = rows.after(key_NPGKD[tile - begin // KEYS], value_NPGKV[tile - begin // KEYS], seen_RK)
        made.append(rows.result(scoring.sink_H).reshape(streams, heads, ROWS, -1))
    return torch.cat(made, dim=2)[:, :, past % ROWS :][:, :, :length].to(query_PHLD.dtype)


def _table(position_S: Tensor, before: int, count: int) -> Tensor:
    """int64: positions by place, with room for whole tiles of keys and of queries; where there is no key no window reaches."""
    behind = -count % KEYS + ROWS
    return F.pad(position_S, (before, behind), value=torch.iinfo(torch.int64).min // 2)


class _Rows(NamedTuple):
    """A tile of queries and what they have seen so far.

    Attributes:
        query_BXD: scaled; B is streams times key heads.
        most_BX1: the greatest score of each.
        total_BX1: sum of exp(score - most).
        sum_BXV: of values by the same weights.
    """

    query_BXD: Tensor
    most_BX1: Tensor
    total_BX1: Tensor
    sum_BXV: Tensor

    @classmethod
    def of(cls, query_BXD: Tensor, value_width: int) -> "_Rows":
        sizes = query_BXD.shape[:2]
        zeros_BX1 = query_BXD.new_zeros(*sizes, 1)
        return cls(query_BXD, zeros_BX1 + LEAST, zeros_BX1, query_BXD.new_zeros(*sizes, value_width))

    def after(self, key_PGKD: Tensor, value_PGKV: Tensor, seen_RK: Tensor) -> "_Rows":
        """With one more tile of keys."""
        key_BKD, value_BKV = key_PGKD.flatten(0, 1), value_PGKV.flatten(0, 1)
        score_BXK = torch.bmm(self.query_BXD, key_BKD.transpose(1, 2))
        # Heads of a group stand one after the other, each with all rows.
        score_BXK = score_BXK.unflatten(1, (-1, ROWS)).masked_fill(~seen_RK, -torch.inf).flatten(1, 2)
        most_BX1 = torch.maximum(self.most_BX1, score_BXK.amax(-1, keepdim=True))
        # In place, as they are functions of whole tiles already.
        weight_BXK, kept_BX1 = (score_BXK - most_BX1).exp_(), (self.most_BX1 - most_BX1).exp_()
        total_BX1 = self.total_BX1 * kept_BX1 + weight_BXK.sum(-1, keepdim=True)
        return self._replace(
            most_BX1=most_BX1, total_BX1=total_BX1, sum_BXV=self.sum_BXV * kept_BX1 + torch.bmm(weight_BXK, value_BKV)
        )

    def result(self, sink_H: Tensor | None) -> Tensor:
        """y_BXV."""
        if sink_H is None:
            return self.sum_BXV / self.total_BX1
        count, size, _ = self.most_BX1.shape
        sink_HR = sink_H.to(self.most_BX1.dtype).unsqueeze(1).expand(-1, ROWS)
        sink_BX1 = sink_HR.reshape(-1, size).repeat(count * size // sink_HR.numel(), 1).unsqueeze(2)
        most_BX1 = torch.maximum(self.most_BX1, sink_BX1)
        kept_BX1 = (self.most_BX1 - most_BX1).exp_()
        return self.sum_BXV * kept_BX1 / (self.total_BX1 * kept_BX1 + (sink_BX1 - most_BX1).exp_())


def _tiles(part_PGSD: Tensor, begin: int, size: int) -> Tensor:
    """``[N, P, G, size, D]``, each tile in one piece: position ``begin`` + s at its place, zeros where there is none."""
    before = begin % size
    behind = -(before + part_PGSD.shape[2]) % size
    padded = F.pad(part_PGSD, (0, 0, before, behind))
    return padded.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4).contiguous()
