"""Attention whose scores are scaled otherwise, reach only so far back, or share their weight with a sink.

    weight of key s for query l  =  exp(c q_l k_s) / (sum over the keys that l sees of exp(c q_l k_s)  +  exp(sink))

A window (Beltagy et al. 2020, arXiv 2004.05150; Mistral, arXiv 2310.06825) lets a query see the last so many positions, its own among
them. A sink is a learned score of each head that takes weight and gives nothing (gpt-oss, arXiv 2508.10925), after the first tokens that
do so in other models (Xiao et al. 2023, arXiv 2309.17453). Queries are taken in parts, so that a window costs what it is wide and not what
the sequence is long.
"""
# Shapes: B sequences, H query heads, G key heads, L queries, S keys, D head width, V width of a value

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.nn.causal import attention

__all__ = ["PLAIN", "Scoring", "scored_attention"]

# Queries of one part where there is a window or a sink.
PART = 512


@dataclass(frozen=True, eq=False)
class Scoring:
    """How scores become weights.

    Attributes:
        scale: c; None for 1 / sqrt(D).
        window: positions that a query sees, its own among them; None for all before it.
        sink_H: float ``[H]``, the sinks' scores; None without.
        value_width: V, where values are the first V numbers of the keys and not stored beside them; None where they are.
    """

    scale: float | None = None
    window: int | None = None
    sink_H: Tensor | None = None
    value_width: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax(q k / sqrt(D)) over all that a query may see."""
        return self.scale is None and self.window is None and self.sink_H is None and self.value_width is None


PLAIN = Scoring()


def scored_attention(
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSV: Tensor,
    scoring: Scoring,
    mask_BLS: Tensor | None = None,
    *,
    position_S: Tensor | None = None,
) -> Tensor:
    """y_BHLV: the queries are those of the last L of S places, and see none after their own.

    ``mask_BLS`` is bool ``[B or 1, 1, L, S]``, True where a query may look, or None. The window is counted in places, or, where tokens were
    left out between them, in ``position_S``: int64, ascending.
    """
    length, past = query_BHLD.shape[2], key_BGSD.shape[2] - query_BHLD.shape[2]
    if scoring.value_width is not None:
        value_BGSV = key_BGSD[..., : scoring.value_width]
    is_cut = scoring.window is not None or scoring.sink_H is not None
    made = []
    for first in range(0, length, PART if is_cut else length):
        last = min(first + PART, length) if is_cut else length
        begin, end = _begin(past + first, scoring.window, position_S), past + last
        seen = _seen(first, last, past, begin, scoring.window, query_BHLD.device, position_S)
        if mask_BLS is not None:
            part = mask_BLS[:, :, first:last, begin:end]
            seen = part if seen is None else part & seen
        made.append(
            _part(query_BHLD[:, :, first:last], key_BGSD[:, :, begin:end], value_BGSV[:, :, begin:end], scoring, seen)
        )
    return made[0] if len(made) == 1 else torch.cat(made, dim=2)


def _begin(place: int, window: int | None, position_S: Tensor | None) -> int:
    """The first key that the query at a place sees."""
    if window is None:
        return 0
    if position_S is None:
        return max(0, place + 1 - window)
    return int(torch.searchsorted(position_S, position_S[place] - window, right=True))


def _seen(
    first: int,
    last: int,
    past: int,
    begin: int,
    window: int | None,
    device: torch.device,
    position_S: Tensor | None = None,
) -> Tensor | None:
    """bool ``[L, S]``: what the queries first to last see of the keys from ``begin`` on; None for all of them."""
    if last - first == 1:
        return None
    query_L1 = torch.arange(past + first, past + last, device=device).unsqueeze(1)
    key_S = torch.arange(begin, past + last, device=device)
    seen_LS = key_S <= query_L1
    if window is None:
        return seen_LS
    if position_S is not None:
        query_L1, key_S = position_S[past + first : past + last].unsqueeze(1), position_S[begin : past + last]
    return seen_LS & (key_S > query_L1 - window)


def _part(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, seen: Tensor | None) -> Tensor:
    if scoring.sink_H is None:
        return attention(query, key, value, attn_mask=seen, scale=scoring.scale)
    fine = torch.promote_types(query.dtype, torch.float32)
    scale = key.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    groups, shared = key.shape[1], query.shape[1] // key.shape[1]
    # The heads of a group meet its keys in one product.
    rows_BGXD = (query.to(fine) * scale).unflatten(1, (groups, shared)).flatten(2, 3)
    score_BGRLS = (rows_BGXD @ key.to(fine).transpose(2, 3)).unflatten(2, (shared, -1))
    if seen is not None:
        score_BGRLS = score_BGRLS.masked_fill(~(seen[:, :, None] if seen.dim() == 4 else seen), -torch.inf)
    sink = scoring.sink_H.to(fine).view(1, groups, shared, 1, 1).expand(*score_BGRLS.shape[:-1], 1)
    weight = torch.cat((score_BGRLS, sink), dim=-1).softmax(-1)[..., :-1]
    y = weight.flatten(2, 3) @ value.to(fine)
    return y.unflatten(2, (shared, -1)).flatten(1, 2).to(query.dtype)
