"""Attention of some queries to some keys as a partial result, how partial results are merged, and the gradients of a part.

    lse = log sum over keys s of exp(c q k_s)        o = sum over s of exp(c q k_s - lse) v_s
    merge:  o <- o - sigmoid(l' - l) (o - o');   l <- log(exp l + exp l')                    never overflows
    delta = rowsum(do * o) - dlse      P = exp(c q k - lse)      dS = P * (do v - delta)
    dv = P^T do        dq = c dS k        dk = c dS^T q              with lse of ALL keys, so gradients of parts add up

Partial results are float32 (float64 of float64): what rings of 16 bits lose by merging, these do not. Forward parts on a CPU are torch's
flash kernel, on whatever half types hold as float32; elsewhere, and backward, they are products in tiles.
"""
# Shapes: B sequences, H query heads, G key heads, X = (H / G) rows of a group, L queries, S keys, D head width

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anabranch.cluster.ring.pieces import Piece, Rows

__all__ = ["attend", "fine_dtype", "gradients", "merge"]

# Scores of one tile, in numbers: some megabytes.
TILE = 1 << 20

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def fine_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results are kept in."""
    return torch.promote_types(dtype, torch.float32)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take a partial result into ``out_BHLD`` and ``lse_BHL``, in place; a lse of minus infinity says that nothing was seen."""
    # Of two that saw nothing the difference is nan.
    share = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -torch.inf, 0.0)
    out.lerp_(part.to(out.dtype), share[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def attend(
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    pieces: Sequence[Piece],
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    *,
    scale: float,
    row: int = 0,
    key: int = 0,
) -> None:
    """Merge what the queries see of the keys into ``out`` and ``lse``, in place.

    Args:
        query_BHLD: H is a multiple of G.
        key_BGSD, value_BGSD: of any floating type.
        pieces: of the work.
        out_BHLD, lse_BHL: of type `fine_dtype`; zeros and minus infinity where nothing was seen yet.
        scale: c.
        row, key: which row the first of the queries, and of the keys, is in ``pieces``.
    """
    if 0 in query_BHLD.shape or 0 in key_BGSD.shape:
        return
    for piece in pieces:
        rows, keys = _slice(piece.rows, row), _slice(piece.keys, key)
        part, part_lse = _part(query_BHLD[:, :, rows], key_BGSD[:, :, keys], value_BGSD[:, :, keys], piece, scale)
        merge(out_BHLD[:, :, rows], lse_BHL[:, :, rows], part, part_lse)


def gradients(
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    dout_BHLD: Tensor,
    lse_BHL: Tensor,
    delta_BHL: Tensor,
    pieces: Sequence[Piece],
    into: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    row: int = 0,
    key: int = 0,
) -> None:
    """Add what the pairs of ``pieces`` give to (dquery, dkey, dvalue), in place; see the top of the file.

    Arguments as of `attend`; ``lse`` and ``delta`` are over all that a query sees.
    """
    if 0 in query_BHLD.shape or 0 in key_BGSD.shape:
        return
    dquery, dkey, dvalue = into
    groups, fine = key_BGSD.shape[1], dquery.dtype
    for piece in pieces:
        for rows, keys, seen in _tiles(piece, query_BHLD.shape[0] * query_BHLD.shape[1], query_BHLD.device):
            here, there = _slice(rows, row), _slice(keys, key)
            query, dout = (_by_group(part[:, :, here].to(fine), groups) for part in (query_BHLD, dout_BHLD))
            lse, delta = (_by_group(part[:, :, here, None], groups) for part in (lse_BHL, delta_BHL))
            keys_BGSD, values_BGSD = (part[:, :, there].to(fine) for part in (key_BGSD, value_BGSD))
            # A row that sees no key at all is masked here too, and its lse is minus infinity.
            weight = (query @ keys_BGSD.mT).mul_(scale).sub_(lse).exp_()
            if seen is not None:
                _masked(weight, seen, 0.0)
            dvalue[:, :, there] += weight.mT @ dout
            dscore = (dout @ values_BGSD.mT).sub_(delta).mul_(weight).mul_(scale)
            dquery[:, :, here] += _by_head(dscore @ keys_BGSD, query_BHLD.shape[1])
            dkey[:, :, there] += dscore.mT @ query


def _part(query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of one piece."""
    fine = fine_dtype(query.dtype)
    query, key, value = query.to(fine), key.to(fine), value.to(fine)
    heads, groups = query.shape[1], key.shape[1]
    if _FLASH is None or query.device.type != "cpu" or piece.kind == "window":
        return _plain(query, key, value, piece, scale)
    if piece.kind == "full":
        # The heads of a group meet its keys in one product.
        out, lse = _FLASH(_by_group(query, groups), key, value, scale=scale)
        return _by_head(out, heads), _by_head(lse.to(fine), heads)
    shared = heads // groups
    key, value = (part if shared == 1 else part.repeat_interleave(shared, 1) for part in (key, value))
    if scale <= 0:
        # The kernel scales what is masked too: minus infinity times 0 is NaN, and times less it is seen best of all.
        query, scale = query * scale, 1.0
    out, lse = _FLASH(query, key, value, is_causal=True, scale=scale)
    return out, lse.to(fine)


def _plain(query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    """The same by products in tiles: on any device, with any mask."""
    heads, groups = query.shape[1], key.shape[1]
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3])
    for rows, keys, seen in _tiles(piece, query.shape[0] * heads, query.device):
        here, there = _slice(rows, piece.rows[0]), _slice(keys, piece.keys[0])
        score = (_by_group(query[:, :, here], groups) @ key[:, :, there].mT).mul_(scale)
        if seen is not None:
            _masked(score, seen, -torch.inf)
        total = score.logsumexp(-1, keepdim=True)
        # A row that sees nothing has a sum of nothing.
        weight = score.sub_(total.masked_fill(total == -torch.inf, 0.0)).exp_()
        out[:, :, here] = _by_head(weight @ value[:, :, there], heads)
        lse[:, :, here] = _by_head(total.squeeze(-1), heads)
    return out, lse


def _tiles(piece: Piece, heads: int, device: torch.device) -> Iterator[tuple[Rows, Rows, Tensor | None]]:
    """(rows, keys, which pairs see each other) of parts whose scores are few enough."""
    first, last = piece.rows
    begin, end = piece.keys
    most = max(1, TILE // max(1, heads * (end - begin)))
    for start in range(first, last, most):
        stop = min(start + most, last)
        if piece.kind == "full":
            yield (start, stop), piece.keys, None
        elif piece.kind == "window":
            yield (start, stop), piece.keys, piece.seen(start - first, stop - first, device)
        else:
            # What is behind the last of these queries none of them sees.
            seen = torch.ones(stop - start, stop - first, dtype=torch.bool, device=device).tril(start - first)
            yield (start, stop), (begin, begin + stop - first), seen


def _masked(score_BGXS: Tensor, seen_LS: Tensor, value: float) -> None:
    score_BGXS.unflatten(2, (-1, seen_LS.shape[0])).masked_fill_(~seen_LS, value)


def _by_group(x_BHLD: Tensor, groups: int) -> Tensor:
    """``[B, G, X, D]``, X being the rows of all heads of a group."""
    return x_BHLD.unflatten(1, (groups, x_BHLD.shape[1] // groups)).flatten(2, 3)


def _by_head(x_BGX: Tensor, heads: int) -> Tensor:
    """Back to ``[B, H, L, ...]``."""
    shared = heads // x_BGX.shape[1]
    return x_BGX.unflatten(2, (shared, x_BGX.shape[2] // shared)).flatten(1, 2)


def _slice(rows: Rows, first: int) -> slice:
    return slice(rows[0] - first, rows[1] - first)
