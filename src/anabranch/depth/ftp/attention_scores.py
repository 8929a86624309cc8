"""How much attention each token gets: column means of attention, in a pass of their own over queries and keys.

    a_j = mean over heads and over the queries q >= j of A[q, j],   A = softmax(c q k) over what a query sees

Queries are taken in chunks, so that what is there at once does not grow with the square of the prompt; on a CPU in chunks that its caches
hold, since all but the product of queries and keys waits for memory.
"""
# Shapes: B prompts, H query heads, G key heads, R = H / G, Q queries, S keys, C queries of a chunk, U last keys, D head width

import torch
from torch import Tensor

from anabranch.depth.gathered import Looks, visible

__all__ = ["CACHED", "ELEMENTS", "column_means"]

# Numbers of one head's chunk, and those on a CPU.
ELEMENTS, CACHED = 1024 * 1024, 128 * 1024


@torch.no_grad()
def column_means(
    query_BHQD: Tensor,
    key_BGSD: Tensor,
    looks: Looks,
    *,
    query_position_BQ: Tensor,
    key_position_BS: Tensor,
    query_real_BQ: Tensor | None = None,
    key_real_BS: Tensor | None = None,
    own_only: bool = False,
    elements: int | None = None,
) -> Tensor:
    """a_BS in float32: of each key, the mean of its attention weights over heads and over the real queries at or behind it.

    Args:
        query_BHQD, key_BGSD: with their positions in them.
        looks: how scores become weights.
        query_position_BQ, key_position_BS: places in the prompt.
        query_real_BQ, key_real_BS: False where there is padding; None for none.
        own_only: of each key the weight of the query at its own place alone, which knows nothing of later tokens.
        elements: of a chunk, per head; None for `ELEMENTS`, on a CPU `CACHED`.
    """
    batch, heads, num_queries, _ = query_BHQD.shape
    groups, num_keys = key_BGSD.shape[1:3]
    key_BGSD = key_BGSD.float()
    sum_BS = torch.zeros(batch, num_keys, dtype=torch.float32, device=key_BGSD.device)
    if elements is None:
        elements = CACHED if key_BGSD.device.type == "cpu" else ELEMENTS
    chunk = max(1, elements // max(1, num_keys))
    # Queries and keys that stand in the same order need no key behind the chunk, and see all before it.
    is_aligned = num_queries == num_keys and bool((query_position_BQ == key_position_BS).all())
    in_order = is_aligned and key_real_BS is None and bool((query_position_BQ.diff(dim=1) > 0).all())
    for first in range(0, num_queries, chunk):
        last = min(first + chunk, num_queries)
        end = last if in_order else num_keys
        begin = first if in_order and looks.window is None else 0
        position_BC, place_BU = query_position_BQ[:, first:last], key_position_BS[:, begin:end]
        seen_BCU = visible(
            position_BC, place_BU, None if key_real_BS is None else key_real_BS[:, begin:end], looks.window
        )
        rows_BGRCD = query_BHQD[:, :, first:last].unflatten(1, (groups, heads // groups))
        weight_BHCS = _weights(rows_BGRCD, key_BGSD[:, :, :end], seen_BCU, looks).flatten(1, 2)
        if query_real_BQ is not None:
            weight_BHCS *= query_real_BQ[:, None, first:last, None]
        if own_only:
            weight_BHCS *= (position_BC.unsqueeze(2) == key_position_BS[:, None, :end]).unsqueeze(1)
        sum_BS[:, :end] += weight_BHCS.sum((1, 2))
    # Later queries count though a window hides the key from them: they give it no weight.
    count_BS = _queries_of(query_position_BQ, key_position_BS, query_real_BQ, own_only=own_only)
    return sum_BS / heads / count_BS.clamp_min(1)


def _queries_of(query_BQ: Tensor, key_BS: Tensor, real_BQ: Tensor | None, *, own_only: bool) -> Tensor:
    """int64 ``[B, S]``: how many real queries stand at or behind each key; or at it alone."""
    if real_BQ is not None:
        query_BQ = query_BQ.masked_fill(~real_BQ, torch.iinfo(query_BQ.dtype).min)
    query_BQ, key_BS = query_BQ.sort(dim=1).values, key_BS.contiguous()
    before_BS = torch.searchsorted(query_BQ, key_BS)
    if own_only:
        return torch.searchsorted(query_BQ, key_BS, right=True) - before_BS
    return query_BQ.shape[1] - before_BS


def _weights(query_BGRCD: Tensor, key_BGSD: Tensor, seen_BCU: Tensor, looks: Looks) -> Tensor:
    """``[B, G, R, C, S]``: attention weights, where the last U keys may be unseen."""
    groups, shared, num_queries = query_BGRCD.shape[1:4]
    # The heads of a group meet its keys in one product.
    rows_BGXD = query_BGRCD.float().flatten(2, 3) * looks.scale
    score = (rows_BGXD @ key_BGSD.transpose(2, 3)).unflatten(2, (shared, num_queries))
    score[..., score.shape[-1] - seen_BCU.shape[2] :].masked_fill_(~seen_BCU[:, None, None], -torch.inf)
    if looks.sink_H is None:
        torch.softmax(score, -1, out=score)
    else:
        sink = looks.sink_H.float().view(1, groups, shared, 1)
        log_sum = torch.logaddexp(score.logsumexp(-1), sink)
        score.sub_(log_sum.unsqueeze(-1)).exp_()
    # A query that sees nothing, which is padding, gives NaN; it is not counted, but NaN times 0 is NaN.
    return score if seen_BCU.any(-1).all() else score.nan_to_num_(0.0)
