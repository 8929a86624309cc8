"""Attention of which only some heads are wanted, block by block of the queries: what nobody wants is not computed.

A head that weighs 0 for every query of a block (`anabranch.heads`) has neither queries, nor scores, nor a place in the last product there.
Keys and values are of all positions, since later queries may want them.
"""
# Shapes: B sequences, H query heads, G key heads, L queries, J blocks of them, S keys, D head width, V width of a value, N = B L, W width

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.nn.causal import SHORT, attention, causal_attention
from anabranch.nn.kernels import attention as native

__all__ = ["SomeHeads", "attention_of_some", "can_spare", "join_some", "project_some"]

# Tokens from which on products of some heads pay.
MANY = 256


@dataclass(frozen=True, eq=False)
class SomeHeads:
    """Which heads are wanted where.

    Attributes:
        wanted_BJH: bool, by blocks of queries.
        block: queries of a block; the last one of a sequence may be shorter.
        length: L.
    """

    wanted_BJH: np.ndarray
    block: int
    length: int

    @classmethod
    def of(cls, wanted_BLH: Tensor, block: int) -> "SomeHeads":
        """A head is wanted in a block where any of its queries wants it. On a GPU this waits for the device."""
        length = wanted_BLH.shape[1]
        block = max(1, min(block, length))
        padded = F.pad(wanted_BLH, (0, 0, 0, -length % block))
        by_block = padded.unflatten(1, (-1, block)).any(2) if length else padded
        return cls(by_block.cpu().numpy(), block, length)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.wanted_BJH.shape[2]

    def lengths_J(self) -> np.ndarray:
        """Queries of each block."""
        first_J = np.arange(self.wanted_BJH.shape[1]) * self.block
        return np.minimum(self.block, self.length - first_J)

    def anywhere_H(self) -> np.ndarray:
        """bool: heads that any query wants."""
        return np.asarray(self.wanted_BJH.any((0, 1)))

    @property
    def share_of_products(self) -> float:
        """Share of heads that any query wants; 1 where there are none."""
        return float(self.anywhere_H().mean()) if len(self.wanted_BJH) else 1.0

    @property
    def share(self) -> float:
        """Computed share of all (head, query) pairs; 1 where there are none."""
        if 0 < self.length < SHORT:
            return self.share_of_products
        total = self.wanted_BJH.shape[0] * self.num_heads * self.length
        return float((self.wanted_BJH.sum((0, 2)) * self.lengths_J()).sum() / total) if total else 1.0

    def of_rows(self, rows: Sequence[int]) -> "SomeHeads":
        """Of some of the sequences."""
        return SomeHeads(self.wanted_BJH[list(rows)], self.block, self.length)


def attention_of_some(
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSV: Tensor,
    some: SomeHeads,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """y_BHLV, 0 where a head is not wanted.

    Args:
        query_BHLD: queries; those that are not wanted may hold anything.
        key_BGSD, value_BGSV: H / G heads share one.
        some: what is wanted.
        mask: bool (True where a query may look) or added to the scores, ``[B or 1, H or 1, L or 1, S]``; None for all, or causal.
        is_causal: the queries are those of the last L of S positions, and see none after their own; says nothing beside a ``mask``.
        scale: factor on scores; None for 1 / sqrt(D).
    """
    batch, num_heads, length = query_BHLD.shape[:3]
    # Laid out as the last product takes it.
    y_BHLV = query_BHLD.new_zeros(batch, length, num_heads, value_BGSV.shape[-1]).transpose(1, 2)
    call = _Call(query_BHLD, key_BGSD, value_BGSV, mask, is_causal and mask is None, scale, y_BHLV)
    # For few queries what counts is how often something is called.
    wanted_BJH = some.wanted_BJH if some.length >= SHORT else some.anywhere_H()[None, None]
    everywhere_H = np.asarray(wanted_BJH.all((0, 1)))
    for heads in call.pieces(everywhere_H):
        call.run(slice(None), heads, slice(0, some.length))
    for head in np.flatnonzero(some.anywhere_H() & ~everywhere_H).tolist():
        for rows, wanted_J in _alike(wanted_BJH[:, :, head]):
            for first, last in _runs(wanted_J):
                place = slice(first * some.block, min(last * some.block, some.length))
                call.run(rows, slice(head, head + 1), place)
    if some.length < SHORT:
        kept_BLH = torch.from_numpy(np.repeat(some.wanted_BJH, some.block, 1)[:, : some.length]).to(y_BHLV.device)
        y_BHLV = torch.where(kept_BLH.transpose(1, 2).unsqueeze(-1), y_BHLV, 0.0)
    return y_BHLV


@dataclass(frozen=True, eq=False)
class _Call:
    """Attention, of which parts are computed. All of it is by views: what is copied costs as much as what is spared."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    y: Tensor

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def pieces(self, wanted_H: np.ndarray) -> Iterator[slice]:
        """Ranges of these heads that keys can be cut for: of whole groups, or within one."""
        for first, last in _runs(wanted_H):
            begin, end = -(-first // self.shared) * self.shared, last // self.shared * self.shared
            bounds = (
                [first, begin, end, last] if begin < end else [first, *([begin] if first < begin < last else []), last]
            )
            yield from (slice(a, b) for a, b in itertools.pairwise(bounds) if a < b)

    def run(self, rows: slice, heads: slice, place: slice) -> None:
        """Compute these queries of these heads."""
        groups = slice(heads.start // self.shared, -(-heads.stop // self.shared))
        end = self.key.shape[2] - self.query.shape[2] + place.stop if self.is_causal else self.key.shape[2]
        query = self.query[rows, heads, place]
        key, value = self.key[rows, groups, :end], self.value[rows, groups, :end]
        mask = self.mask
        if mask is not None:
            sizes = zip((rows, heads, place), mask.shape, strict=False)
            mask = mask[tuple(part if size > 1 else slice(None) for part, size in sizes)][..., :end]
        self.y[rows, heads, place] = _attend(query, key, value, mask, self.is_causal, self.scale)


def _runs(wanted: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of neighbours that are True."""
    change = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
    yield from zip(change[::2].tolist(), change[1::2].tolist(), strict=True)


def _alike(wanted_BJ: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows that want the same blocks, where they stand at equal distances, else one by one; and what they want."""
    sets, set_of_B = np.unique(wanted_BJ, axis=0, return_inverse=True)
    for number, wanted_J in enumerate(sets):
        rows = np.flatnonzero(set_of_B.reshape(-1) == number)
        step = np.unique(np.diff(rows))
        if len(step) <= 1:
            yield slice(int(rows[0]), int(rows[-1]) + 1, int(step[0]) if len(step) else 1), wanted_J
        else:
            yield from ((slice(row, row + 1), wanted_J) for row in rows.tolist())


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    length, end = query.shape[2], key.shape[2]
    if scale == query.shape[-1] ** -0.5:
        scale = None
    if is_causal and length > 1:
        if scale is None and (length == end or (length >= SHORT and native.can(query, key, value))):
            return causal_attention(query, key, value)
        mask = torch.ones(length, end, dtype=torch.bool, device=query.device).tril(end - length)[None, None]
    return attention(query, key, value, attn_mask=mask, scale=scale)


def can_spare(x: Tensor, weight: Tensor, some: SomeHeads | None) -> bool:
    """Whether products of wanted heads alone are quicker: of all tokens, where a head is wanted of none of them.

    They are written where they belong, so nothing may be differentiated through them, nor cast on the way. Products of a head by parts of
    the tokens were tried, and took longer than they spared.
    """
    if some is None or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    is_large = len(some.wanted_BJH) * some.length >= MANY
    return is_large and x.dtype == weight.dtype and not bool(some.anywhere_H().all())


def project_some(x_BLW: Tensor, weight_RW: Tensor, bias_R: Tensor | None, some: SomeHeads) -> Tensor:
    """``[B, L, R]``: R = H D numbers of each token, of heads that any token wants; 0 of the others."""
    x_NW, width = x_BLW.flatten(0, 1), len(weight_RW) // some.num_heads
    y_NR = x_NW.new_zeros(len(x_NW), len(weight_RW))
    for first, last in _runs(some.anywhere_H()):
        own = slice(first * width, last * width)
        if bias_R is None:
            torch.mm(x_NW, weight_RW[own].t(), out=y_NR[:, own])
        else:
            torch.addmm(bias_R[own], x_NW, weight_RW[own].t(), out=y_NR[:, own])
    return y_NR.view(*x_BLW.shape[:2], -1)


def join_some(y_BLHD: Tensor, weight_WR: Tensor, bias_W: Tensor | None, some: SomeHeads) -> Tensor:
    """``[B, L, W]``: the last product of heads that any token wants; others give nothing."""
    y_NR, width = y_BLHD.flatten(2).flatten(0, 1), y_BLHD.shape[-1]
    out_NW = y_NR.new_zeros(len(y_NR), len(weight_WR))
    if bias_W is not None:
        out_NW += bias_W
    for first, last in _runs(some.anywhere_H()):
        own = slice(first * width, last * width)
        out_NW.addmm_(y_NR[:, own], weight_WR[:, own].t())
    return out_NW.view(*y_BLHD.shape[:2], -1)
