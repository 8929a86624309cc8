"""How much attention each token gets: column means of attention, in a pass of their own over queries and keys.

    a_j = mean over heads and over the queries q >= j of A[q, j],   A = softmax(c q k) over what a query sees

Queries are taken in chunks, so that no more than about 1,024 x 1,024 numbers per head are there at once, however long the prompt is.
"""
# Shapes: B prompts, H query heads, G key heads, R = H / G, Q queries, S keys, C queries of a chunk, D head width

import torch
from torch import Tensor

from anabranch.depth.gathered import Looks, visible

__all__ = ["ELEMENTS", "column_means"]

# Numbers of one head's chunk.
ELEMENTS = 1024 * 1024


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
    elements: int = ELEMENTS,
) -> Tensor:
    """a_BS in float32: of each key, the mean of its attention weights over heads and over the real queries at or behind it.

    Args:
        query_BHQD, key_BGSD: with their positions in them.
        looks: how scores become weights.
        query_position_BQ, key_position_BS: places in the prompt.
        query_real_BQ, key_real_BS: False where there is padding; None for none.
        own_only: of each key the weight of the query at its own place alone, which knows nothing of later tokens.
        elements: of a chunk, per head.
    """
    batch, heads, num_queries, _ = query_BHQD.shape
    groups, num_keys = key_BGSD.shape[1:3]
    sum_BS = torch.zeros(batch, num_keys, dtype=torch.float32, device=key_BGSD.device)
    count_BS = torch.zeros_like(sum_BS)
    chunk = max(1, elements // max(1, num_keys))
    # Queries and keys that stand in the same order need no key behind the chunk.
    is_aligned = num_queries == num_keys and bool((query_position_BQ == key_position_BS).all())
    in_order = is_aligned and key_real_BS is None and bool((query_position_BQ.diff(dim=1) > 0).all())
    for first in range(0, num_queries, chunk):
        last = min(first + chunk, num_queries)
        end = last if in_order else num_keys
        position_BC = query_position_BQ[:, first:last]
        seen_BCS = visible(
            position_BC, key_position_BS[:, :end], None if key_real_BS is None else key_real_BS[:, :end], looks.window
        )
        rows_BGRCD = query_BHQD[:, :, first:last].unflatten(1, (groups, heads // groups))
        weight_BCS = _weights(rows_BGRCD, key_BGSD[:, :, :end], seen_BCS, looks)
        counted_BCS = seen_BCS
        if query_real_BQ is not None:
            counted_BCS = counted_BCS & query_real_BQ[:, first:last].unsqueeze(2)
        # Later queries count though a window hides the key from them: they give it no weight.
        behind_BCS = position_BC.unsqueeze(2) >= key_position_BS[:, :end].unsqueeze(1)
        if own_only:
            behind_BCS = position_BC.unsqueeze(2) == key_position_BS[:, :end].unsqueeze(1)
            counted_BCS = counted_BCS & behind_BCS
        if query_real_BQ is not None:
            behind_BCS = behind_BCS & query_real_BQ[:, first:last].unsqueeze(2)
        sum_BS[:, :end] += (weight_BCS * counted_BCS).sum(1)
        count_BS[:, :end] += behind_BCS.sum(1)
    return sum_BS / count_BS.clamp_min(1)


def _weights(query_BGRCD: Tensor, key_BGSD: Tensor, seen_BCS: Tensor, looks: Looks) -> Tensor:
    """``[B, C, S]``: attention weights, a mean over heads."""
    groups, shared, num_queries = query_BGRCD.shape[1:4]
    # The heads of a group meet its keys in one product.
    rows_BGXD = query_BGRCD.float().flatten(2, 3) * looks.scale
    score = (rows_BGXD @ key_BGSD.float().transpose(2, 3)).unflatten(2, (shared, num_queries))
    score = score.masked_fill_(~seen_BCS[:, None, None], -torch.inf)
    if looks.sink_H is None:
        # A query that sees nothing, which is padding, gives NaN; it is not counted, but NaN times 0 is NaN.
        return score.softmax(-1).mean((1, 2)).nan_to_num_(0.0)
    sink = looks.sink_H.float().view(1, groups, shared, 1)
    log_sum = torch.logaddexp(score.logsumexp(-1), sink)
    return (score - log_sum.unsqueeze(-1)).exp().mean((1, 2)).nan_to_num_(0.0)
