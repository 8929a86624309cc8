"""Attention of which only some heads are wanted, block by block of the queries: what nobody wants is not computed.

A head that weighs 0 for every query of a block (`anabranch.heads`) has neither queries, nor scores, nor a place in the last product there.
Keys and values are of all positions, since later queries may want them.
"""
# Shapes: B sequences, H query heads, G key heads, L queries, J blocks of them, S keys, D head width, V width of a value, N = B L, W width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.nn.causal import SHORT, attention, causal_attention
from anabranch.nn.kernels import attention as native

__all__ = ["SomeHeads", "attention_of_some", "join_some", "project_some"]

# Tokens in all for which products with a part of a matrix pay, and on average of each part.
MANY, EACH = 256, 64


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

    @property
    def share(self) -> float:
        """Wanted share of all (head, query) pairs, counted by blocks; 1 where there are none."""
        total = self.wanted_BJH.shape[0] * self.num_heads * self.length
        return float((self.wanted_BJH.sum((0, 2)) * self.lengths_J()).sum() / total) if total else 1.0

    def of_rows(self, rows: Sequence[int]) -> "SomeHeads":
        """Of some of the sequences."""
        return SomeHeads(self.wanted_BJH[list(rows)], self.block, self.length)

    def stretches(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first query, one past the last, wanted_BH) of neighbouring blocks that want the same."""
        begin, num_blocks = 0, self.wanted_BJH.shape[1]
        for end in range(1, num_blocks + 1):
            if end == num_blocks or not np.array_equal(self.wanted_BJH[:, end], self.wanted_BJH[:, begin]):
                yield begin * self.block, min(end * self.block, self.length), self.wanted_BJH[:, begin]
                begin = end

    @property
    def spares_products(self) -> bool:
        """Whether the products before and behind attention are worth taking in parts: each part of a matrix is copied."""
        return len(self.wanted_BJH) * self.length >= max(MANY, EACH * len(self._sets[0]))

    def groups(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """(positions among the N tokens, heads) of the tokens that want the same heads; each token is in one of them."""
        sets, set_of = self._sets
        token_BJT = np.arange(len(self.wanted_BJH) * self.length).reshape(len(self.wanted_BJH), self.length)
        set_BL = np.repeat(set_of, self.block, axis=1)[:, : self.length]
        return [
            (
                torch.from_numpy(token_BJT[set_BL == number]).to(device),
                torch.from_numpy(np.flatnonzero(wanted_H)).to(device),
            )
            for number, wanted_H in enumerate(sets)
        ]

    @cached_property
    def _sets(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct sets of heads, ``[sets, H]``, and which of them each block wants, ``[B, J]``."""
        flat = self.wanted_BJH.reshape(-1, self.num_heads)
        sets, set_of = np.unique(flat, axis=0, return_inverse=True)
        return sets, set_of.reshape(self.wanted_BJH.shape[:2])


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
    length, num_keys = query_BHLD.shape[2], key_BGSD.shape[2]
    y_BHLV = query_BHLD.new_zeros(*query_BHLD.shape[:3], value_BGSV.shape[-1])
    is_causal = is_causal and mask is None
    for first, last, wanted_BH in some.stretches():
        if not wanted_BH.any():
            continue
        end = num_keys - length + last if is_causal else num_keys
        part = None if mask is None else mask[:, :, first:last, :end] if mask.shape[2] > 1 else mask[..., :end]
        heads = np.flatnonzero(wanted_BH.any(0))
        keys, values = key_BGSD[:, :, :end], value_BGSV[:, :, :end]
        if wanted_BH[:, heads].all():
            y = _of_heads(query_BHLD[:, :, first:last], keys, values, heads, part, is_causal, scale)
            if len(heads) == query_BHLD.shape[1]:
                y_BHLV[:, :, first:last] = y
            else:
                y_BHLV[:, torch.from_numpy(heads).to(y.device), first:last] = y
        else:
            _of_pairs(y_BHLV, query_BHLD, keys, values, wanted_BH, (first, last), part, is_causal, scale)
    return y_BHLV


def _of_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: np.ndarray,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """y of some heads of all sequences, ``[B, heads, L, V]``."""
    num_heads, groups = query.shape[1], key.shape[1]
    if len(heads) < num_heads:
        head_P = torch.from_numpy(heads).to(query.device)
        query = query[:, head_P]
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, head_P]
        group_of_P = heads // (num_heads // groups)
        group_P, count = np.unique(group_of_P, return_counts=True)
        # Heads of one group stand together, so key heads stay shared where all are by as many.
        wanted = group_P if (count == count[0]).all() else group_of_P
        if len(wanted) != groups or wanted is group_of_P:
            kept = torch.from_numpy(wanted).to(query.device)
            key, value = key[:, kept], value[:, kept]
    return _attend(query, key, value, mask, is_causal, scale)


def _of_pairs(
    y_BHLV: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    wanted_BH: np.ndarray,
    place: tuple[int, int],
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> None:
    """Write y of the wanted (sequence, head) pairs, each taken as a sequence of one head."""
    row, head = (torch.from_numpy(found).to(query.device) for found in np.nonzero(wanted_BH))
    group = head // (query.shape[1] // key.shape[1])
    first, last = place
    if mask is not None:
        mask = mask.expand(len(wanted_BH), query.shape[1] if mask.shape[1] > 1 else 1, -1, -1)
        mask = mask[row, head if mask.shape[1] > 1 else torch.zeros_like(head)].unsqueeze(1)
    query_P, key_P, value_P = (
        part.unsqueeze(1) for part in (query[row, head, first:last], key[row, group], value[row, group])
    )
    y_BHLV[row, head, first:last] = _attend(query_P, key_P, value_P, mask, is_causal, scale).squeeze(1)


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


def project_some(x_BLW: Tensor, weight_RW: Tensor, bias_R: Tensor | None, some: SomeHeads) -> Tensor:
    """``[B, L, R]``: R = H D numbers of each token, of wanted heads; 0 of the others."""
    x_NW, width = x_BLW.flatten(0, 1), len(weight_RW) // some.num_heads
    weight_HDW = weight_RW.unflatten(0, (some.num_heads, width))
    bias_HD = None if bias_R is None else bias_R.unflatten(0, (some.num_heads, width))
    y_NHD: Tensor | None = None
    for token_P, head_S in some.groups(x_BLW.device):
        bias = None if bias_HD is None else bias_HD[head_S].flatten()
        made = F.linear(x_NW[token_P], weight_HDW[head_S].flatten(0, 1), bias).unflatten(-1, (-1, width))
        if y_NHD is None:
            y_NHD = made.new_zeros(len(x_NW), some.num_heads, width)
        y_NHD[token_P.unsqueeze(1), head_S] = made
    assert y_NHD is not None, "there are tokens, or it was not worth it"
    return y_NHD.view(*x_BLW.shape[:2], -1)


def join_some(y_BLHD: Tensor, weight_WR: Tensor, bias_W: Tensor | None, some: SomeHeads) -> Tensor:
    """``[B, L, W]``: the last product of wanted heads; others give nothing."""
    y_NHD, width = y_BLHD.flatten(0, 1), y_BLHD.shape[-1]
    weight_WHD = weight_WR.unflatten(1, (some.num_heads, width))
    out_NW: Tensor | None = None
    for token_P, head_S in some.groups(y_BLHD.device):
        rows = y_NHD[token_P.unsqueeze(1), head_S].flatten(1)
        made = F.linear(rows, weight_WHD[:, head_S].flatten(1), bias_W)
        if out_NW is None:
            out_NW = made.new_empty(len(y_NHD), len(weight_WR))
        out_NW[token_P] = made
    assert out_NW is not None, "there are tokens, or it was not worth it"
    return out_NW.view(*y_BLHD.shape[:2], -1)
