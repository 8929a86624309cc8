"""The choices of a trace as caches of experts meet them: layers that share a pool of experts, and passes of one layer, have one cache.

consistency.hit_rates(pool_routes(trace), "lru", cold="miss").at_ratio(2.0)    # of each pool
"""
# Shapes: S sequences (pieces), T tokens, N decisions of a layer, M of a pool's layers, I tokens of any, K choices of a pool

from collections.abc import Iterable, Iterator

import numpy as np

from anabranch.routing.consistency import LENGTH, Routes, by_sequence
from anabranch.routing.trace import Decisions, RoutingTrace
from anabranch.routing.trace_schema import TraceLayer


def pool_routes(
    trace: RoutingTrace, layers: Iterable[int] | None = None, *, length: int | None = LENGTH
) -> Iterator[Routes]:
    """The choices of each pool, one pool in memory at a time: those of its layers side by side, in the order a token meets them.

    Args:
        trace: its layers name their pools.
        layers: numbers of those that count. Default: all.
        length: sequences are cut into pieces of so many tokens (a last, shorter piece stays); None leaves them whole.

    Of a pool's `Routes`, ``layer`` is its first and ``top_k`` the sum over its layers of what the trace says, even where it varies. A token
    that one of them did not route has unused choices there.
    """
    kept = {layer.layer for layer in trace.layers} if layers is None else set(layers)
    names = np.array([*trace.domains, None], object)
    for pool, every in trace.pools.items():
        members = [member for member in every if member.layer in kept]
        if not members:
            continue
        index_STK, length_S, code_S = by_sequence(*_side_by_side(trace, members), length)
        yield Routes(
            layer=members[0].layer,
            index_STK=index_STK,
            length_S=length_S,
            num_destinations=max(member.num_destinations for member in members),
            top_k=sum(member.top_k for member in members),
            domain_S=names[code_S],
            pool=pool,
            blocks=tuple(member.top_k for member in members) if len(members) > 1 else None,
        )


def _side_by_side(
    trace: RoutingTrace, members: list[TraceLayer]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """index_IK, item_I, position_I and domain_I: each token once, whichever layers routed it."""
    found = [trace.decisions(member.layer) for member in members]
    if len(found) == 1:
        return found[0].index_NK, found[0].item_N, found[0].position_N, found[0].domain_N
    key_M3 = np.concatenate([_keys(decisions) for decisions in found])
    key_I3, first_I, token_M = np.unique(key_M3, axis=0, return_index=True, return_inverse=True)
    domain_M = np.concatenate([decisions.domain_N for decisions in found])
    index_IK = np.full((len(key_I3), sum(member.top_k for member in members)), -1, np.int32)
    of_layer = np.split(token_M.reshape(-1), np.cumsum([len(decisions.item_N) for decisions in found])[:-1])
    columns = np.split(np.arange(index_IK.shape[1]), np.cumsum([member.top_k for member in members])[:-1])
    for token_N, column_K, decisions in zip(of_layer, columns, found, strict=True):
        index_IK[token_N[:, None], column_K] = decisions.index_NK
    return index_IK, key_I3[:, 0], key_I3[:, 1], domain_M[first_I]


def _keys(decisions: Decisions) -> np.ndarray:
    """int64 ``[N, 3]``: item, position, and how many decisions of the same two stand before."""
    order_N = np.lexsort((decisions.position_N, decisions.item_N))
    pair_N2 = np.stack([decisions.item_N, decisions.position_N], 1).astype(np.int64)
    sorted_N2 = pair_N2[order_N]
    begins_N = np.ones(len(order_N), bool)
    begins_N[1:] = (np.diff(sorted_N2, axis=0) != 0).any(1)
    place_N = np.arange(len(order_N))
    rank_N = np.empty(len(order_N), np.int64)
    rank_N[order_N] = place_N - np.maximum.accumulate(np.where(begins_N, place_N, 0))
    return np.column_stack([pair_N2, rank_N])
