"""Attention to keys and values that many sequences have in front, and to each sequence's own, without a copy for each.

With few queries the shared entries are met by all sequences in one product, and one softmax goes over both parts; so they are read once,
and stored once ("Hydragen", Juravsky et al. 2024, arXiv 2402.05099, splits attention there too). With many queries, as of a prompt, both
parts are put together for the moment: attention is then no matter of reading.
"""
# Shapes: B sequences, Q shared fronts (Q divides B), H query heads, G key heads, L queries, M shared entries, S own ones, D head width

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SharedPrefix", "attend_few", "copied", "gated_sum", "side_by_side", "with_prefix"]

# key_QGMD, value_QGMD: the b-th of B sequences has the (b Q // B)-th.
SharedPrefix = tuple[Tensor, Tensor]


def with_prefix(part_BGSD: Tensor, front_QGMD: Tensor) -> Tensor:
    """``[B, G, M + S, D]``: what is shared, copied for each sequence, then its own."""
    return torch.cat((copied(front_QGMD.to(part_BGSD), part_BGSD.shape[0]), part_BGSD), dim=2)


def copied(front_QGMD: Tensor, num_sequences: int) -> Tensor:
    """``[B, G, M, D]``: what is in front of each of the sequences."""
    return front_QGMD[:, None].expand(-1, num_sequences // len(front_QGMD), -1, -1, -1).flatten(0, 1)


def side_by_side(
    query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, front: SharedPrefix, gate_BL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value) of heads twice as wide, whose plain attention keeps the front, behind each query's gate, and the rest apart.

    Both share one softmax: (q, g q) meets own keys as (k, 0) and those in front as (0, p), and values likewise; `gated_sum` adds up.
    """
    gate = gate_BL[:, None, :, None].to(query_BHLD.dtype)
    # Attention divides by the root of the width.
    query = torch.cat((query_BHLD, query_BHLD * gate), dim=-1) * 2**0.5
    batch = key_BGSD.shape[0]
    key, value = (
        torch.cat((F.pad(copied(shared.to(part), batch), [part.shape[3], 0]), F.pad(part, [0, part.shape[3]])), dim=2)
        for shared, part in zip(front, (key_BGSD, value_BGSD), strict=True)
    )
    return query, key, value


def gated_sum(y_BHLD: Tensor, gate_BL: Tensor) -> Tensor:
    """Half as wide: what comes of own entries, and behind the gates what comes of those in front."""
    own, shared = y_BHLD.chunk(2, dim=-1)
    return own + gate_BL[:, None, :, None].to(shared.dtype) * shared


def attend_few(
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    front: SharedPrefix,
    mask_BL: Tensor | None = None,
    gate_BL: Tensor | None = None,
) -> Tensor:
    """y_BHLD: each query sees all of the front, and of its sequence's own entries those of the mask ``[B or 1, 1, L, S]`` (None: all).

    ``gate_BL`` is what each query multiplies keys and values of the front by; None for 1. What half types hold is multiplied in float32.
    Memory grows with L (M + S).
    """
    groups, width = key_BGSD.shape[1], key_BGSD.shape[3]
    fine = torch.promote_types(query_BHLD.dtype, torch.float32)
    query = (query_BHLD.to(fine) * width**-0.5).unflatten(1, (groups, -1))  # [B, G, H / G, L, D]
    shape = query.shape[2:4]
    query = query.flatten(2, 3)
    gate = None if gate_BL is None else gate_BL.to(fine)[:, None, None, :, None].expand(-1, 1, *shape, 1).flatten(2, 3)
    key_BGDS = key_BGSD.to(fine).transpose(2, 3)
    front_key_QGMD, front_value_QGMD = (part.to(query) for part in front)
    num_front, num_shared = front_key_QGMD.shape[0], front_key_QGMD.shape[2]
    own = (query @ key_BGDS).unflatten(2, shape)
    if mask_BL is not None:
        own = own.masked_fill(~mask_BL[:, :, None], float("-inf"))
    gated = query if gate is None else query * gate
    shared = _alone(_together(gated, num_front) @ front_key_QGMD.transpose(2, 3), query)
    weight = torch.cat((shared, own.flatten(2, 3)), dim=-1).softmax(-1)
    shared_weight, own_weight = weight[..., :num_shared], weight[..., num_shared:]
    y = own_weight @ value_BGSD.to(fine)
    shared_weight = shared_weight if gate is None else shared_weight * gate
    y = y + _alone(_together(shared_weight, num_front) @ front_value_QGMD, query)
    return y.unflatten(2, shape).flatten(1, 2).to(query_BHLD.dtype)


def _together(x_BGLX: Tensor, num_front: int) -> Tensor:
    """``[Q, G, B / Q L, X]``: the rows of all sequences that share a front."""
    # Said, not inferred: an empty batch leaves nothing to infer it from.
    return x_BGLX.unflatten(0, (num_front, x_BGLX.shape[0] // num_front)).transpose(1, 2).flatten(2, 3)


def _alone(x_QGNX: Tensor, query_BGLD: Tensor) -> Tensor:
    """Back to ``[B, G, L, X]``, of as many rows as the queries."""
    batch, _, length, _ = query_BGLD.shape
    return x_QGNX.unflatten(2, (batch // x_QGNX.shape[0], length)).transpose(1, 2).flatten(0, 1)
