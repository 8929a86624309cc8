"""Measures of routing: pure functions of loads, decisions or scores, numpy arrays or CPU tensors in, numpy out.

Measures of balance take loads ``[..., E]``, so a whole ``load_LE`` gives one number per layer; a row with no load gives nan.
Measures of structure take the ``index_NK`` of decisions (-1 where a choice is unused), see `RoutingTrace.decisions`.

    trace = RoutingTrace.read("trace.parquet")
    max_violation(trace.load_LE())                        # [L]
    coactivation(trace.decisions(0).index_NK, 64)         # [64, 64]
"""
# Shapes: N items, K choices per item, E destinations, L layers, M domains, T token ids

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anabranch.errors import ConfigError
from anabranch.routing.trace import Decisions, RoutingTrace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Balance: loads [..., E]


def load_violation(load: ArrayLike) -> Floats:
    """LBV ``[..., E]``: (load_j - mean) / mean, how far each destination is off the mean load (ReXMoE, arXiv 2510.17483)."""
    load = _floats(load)
    mean = load.mean(-1, keepdims=True)
    return _ratio(load - mean, np.broadcast_to(mean, load.shape))


def max_violation(load: ArrayLike) -> Floats:
    """MaxVio ``[...]``: max_j load_j / mean - 1 (arXiv 2408.15664); 0 is perfect balance, E - 1 is all on one destination."""
    load = _floats(load)
    return _ratio(load.max(-1), load.mean(-1)) - 1


def idle_fraction(load: ArrayLike, threshold: float = 0.1) -> Floats:
    """``[...]``: the fraction of destinations with less than ``threshold`` of the mean load."""
    load = _floats(load)
    mean = load.mean(-1, keepdims=True)
    return np.where(mean[..., 0] > 0, (load < threshold * mean).mean(-1), np.nan)


def load_entropy(load: ArrayLike) -> Floats:
    """``[...]``: entropy of the load distribution in bits; log2 E when balanced, 0 when all go to one destination."""
    return _entropy(load)


def effective_destinations(load: ArrayLike) -> Floats:
    """``[...]``: 2 ** load entropy, the number of equally loaded destinations that would be as diverse."""
    return np.exp2(_entropy(load))


def coefficient_of_variation(load: ArrayLike) -> Floats:
    """``[...]``: standard deviation of the load over its mean (its square is the importance loss of Shazeer et al. 2017)."""
    load = _floats(load)
    return _ratio(load.std(-1), load.mean(-1))


def pool_load(trace: RoutingTrace, pool: str) -> Ints:
    """int64 ``[pool size]``: what each physical destination of a pool carries, over all layers that share it.

    Its `max_violation` is MaxVio_pool; the largest `max_violation` of the pool's layers is MaxVio_layer.
    """
    layers = trace.pools.get(pool)
    if layers is None:
        raise ConfigError(f"the trace has no pool {pool!r}; it has {', '.join(trace.pools)}")
    load = np.zeros(max(layer.pool_size for layer in layers), np.int64)
    for layer in layers:
        load[: layer.num_destinations] += trace.load_E(layer.layer)
    return load


def foreign_share(trace: RoutingTrace, layer: int) -> float:
    """The share of a layer's choices that fall on destinations which other layers own; 0 where the pool is its own (ReXMoE)."""
    load_E, own = trace.load_E(layer), trace.own_slots(layer)
    return 1 - float(_ratio(_floats(load_E[own.start : own.stop].sum()), _floats(load_E.sum())))


def drop_ratio(index_NK: ArrayLike) -> float:
    """The fraction of choices that name no destination (dropped by capacity, below a threshold, ...); nan if there is none."""
    index_NK = np.asarray(index_NK)
    return float((index_NK < 0).mean()) if index_NK.size else float("nan")


# Decisiveness


def routing_entropy(score_NE: ArrayLike) -> Floats:
    """``[N]``: entropy in bits of each item's scores, normalised to sum to 1; 0 is certain, log2 E undecided.

    With the ``weight_NK`` of decisions instead of scores: how evenly an item spreads its weight over what it chose, up to log2 K.
    """
    return _entropy(score_NE)


# What goes together


def coactivation(
    index_NK: ArrayLike, num_destinations: int, other_NK: ArrayLike | None = None, num_other: int = 0
) -> Ints:
    """int64 ``[E, E]``: how many items go to both destination i and destination j; the diagonal is the load.

    With the decisions ``other_NK`` of the same items at another layer, ``[E, num_other]``: how many go to i here and to j there.
    """
    index_NK = np.asarray(index_NK, np.int64)
    other_NK = index_NK if other_NK is None else np.asarray(other_NK, np.int64)
    if len(index_NK) != len(other_NK):
        raise ConfigError(f"decisions of {len(index_NK)} and {len(other_NK)} items cannot be paired; see aligned()")
    width = num_other or num_destinations
    count = np.zeros(num_destinations * width, np.int64)
    # K passes over [N, K], so that memory stays that of the decisions.
    for index_N in index_NK.T:
        pair_NK = index_N[:, None] * width + other_NK
        count += np.bincount(pair_NK[(index_N >= 0)[:, None] & (other_NK >= 0)], minlength=len(count))
    return count.reshape(num_destinations, width)


def coactivation_lift(count_EE: ArrayLike, prior: float = 0.0) -> Floats:
    """``[E, E]``: co-activation within a layer over what loads alone would give; 1 is chance. The diagonal is nan.

    Chance pairs i and j in proportion to load_i load_j, scaled to the pairs there are (an item never pairs a destination with
    itself, so plain independence would be biased for small K). ``prior`` pairs are added above and below, which draws what
    rests on few pairs towards 1. With ``prior=0``, nan also where a destination has no load.
    """
    count_EE = _floats(count_EE)
    load_E = np.diagonal(count_EE)
    others = ~np.eye(len(load_E), dtype=bool)
    chance_EE = np.outer(load_E, load_E)
    total = chance_EE[others].sum()
    chance_EE = chance_EE * (count_EE[others].sum() / total if total else 0.0)
    return np.where(others, _ratio(count_EE + prior, chance_EE + prior), np.nan)


def aligned(first: Decisions, second: Decisions) -> tuple[np.ndarray, np.ndarray]:
    """``index_NK`` of two layers for the items that both routed, matched by item id and position."""
    if np.array_equal(first.item_N, second.item_N) and np.array_equal(first.position_N, second.position_N):
        return first.index_NK, second.index_NK
    _, in_first, in_second = np.intersect1d(_key(first), _key(second), return_indices=True)
    return first.index_NK[in_first], second.index_NK[in_second]


# Reuse


def reuse_rate(index_NK: ArrayLike, before_NK: ArrayLike) -> float:
    """The fraction of used choices whose destination is also in the same row of ``before_NK``; nan if no choice is used.

    For consecutive layers that share a pool this is the same-expert rate of arXiv 2510.17483; see `chance_reuse`.
    """
    index_NK, before_NK = np.asarray(index_NK), np.asarray(before_NK)
    used_NK = index_NK >= 0
    again_NK = np.zeros_like(used_NK)
    for before_N in before_NK.T:
        again_NK |= index_NK == before_N[:, None]
    return float(again_NK[used_NK].mean()) if used_NK.any() else float("nan")


def consecutive_reuse(decisions: Decisions) -> float:
    """`reuse_rate` between each token and the one before it in its sequence (1 position earlier, same item)."""
    order = np.lexsort((decisions.position_N, decisions.item_N))
    item_N, position_N = decisions.item_N[order], decisions.position_N[order]
    follows = (np.diff(item_N) == 0) & (np.diff(position_N) == 1)
    return reuse_rate(decisions.index_NK[order[1:]][follows], decisions.index_NK[order[:-1]][follows])


def segment_reuse(decisions: Decisions, length: int = 16) -> float:
    """1 - distinct / used destinations in segments of ``length`` tokens, over all whole segments; nan if there is none.

    What a cache that is empty at the start of a segment and never evicts would hit. See `chance_reuse`.
    """
    if length < 1:
        raise ConfigError(f"length is {length}; it must be at least 1")
    segment_N = np.stack([decisions.item_N, decisions.position_N // length], 1)
    _, number_N, size = np.unique(segment_N, axis=0, return_inverse=True, return_counts=True)
    index_NK = decisions.index_NK
    used_NK = (index_NK >= 0) & (size[number_N] == length)[:, None]
    if not used_NK.any():
        return float("nan")
    pair = number_N[:, None] * (int(index_NK.max()) + 1) + index_NK
    return 1 - len(np.unique(pair[used_NK])) / int(used_NK.sum())


def chance_reuse(top_k: float, num_destinations: int, length: int = 2, *, segment: bool = False) -> float:
    """What the rates above would be if every item chose K of E destinations evenly and independently.

    K / E for `reuse_rate` and `consecutive_reuse` (K / (r N) in a pool of r layers with N experts each). With ``segment``, for
    `segment_reuse`: 1 - E (1 - (1 - K/E)^length) / (length K).
    """
    share = top_k / num_destinations
    return 1 - (1 - (1 - share) ** length) / (length * share) if segment else share


# Specialisation


def total_variation(load: ArrayLike, other: ArrayLike) -> Floats:
    """``[...]``: half the sum of absolute differences of two load distributions; 0 is equal, 1 disjoint."""
    return np.abs(_shares(load) - _shares(other)).sum(-1) / 2


def domain_load(trace: RoutingTrace, layer: int) -> Ints:
    """int64 ``[M, E]``: the load of each domain, in the order of ``trace.domains``."""
    num_destinations = trace.layer(layer).num_destinations
    domain_R, destination_R = trace.column("domain", layer), trace.column("destination", layer).astype(np.int64)
    known_R = (domain_R >= 0) & (destination_R >= 0)
    pair_R = domain_R[known_R] * num_destinations + destination_R[known_R]
    count = np.bincount(pair_R, minlength=len(trace.domains) * num_destinations)
    return count.reshape(len(trace.domains), num_destinations)


def domain_distance(load_ME: ArrayLike) -> Floats:
    """``[M]``: `total_variation` between each domain's load and that of all domains together."""
    load_ME = _floats(load_ME)
    return total_variation(load_ME, load_ME.sum(0))


def mutual_information(load_ME: ArrayLike) -> float:
    """I(domain; destination) in bits: how much one choice tells about the domain it was made in; 0 is no specialisation.

    Between 0 and the smaller of the two entropies. Few rows give a value above 0 by chance, see `mutual_information_bias`.
    """
    load_ME = _floats(load_ME)
    if not load_ME.sum():
        return float("nan")
    bits = _entropy(load_ME.sum(0)) + _entropy(load_ME.sum(1)) - _entropy(load_ME.reshape(-1))
    return max(0.0, float(bits))


def mutual_information_bias(load_ME: ArrayLike) -> float:
    """What `mutual_information` is expected to show if there is none: (M - 1)(E - 1) / (2 rows ln 2) (Miller 1955).

    M and E count only what occurs. A value near this says nothing.
    """
    load_ME = _floats(load_ME)
    cells = max(0, int((load_ME.sum(1) > 0).sum()) - 1) * max(0, int((load_ME.sum(0) > 0).sum()) - 1)
    return float(cells / (2 * load_ME.sum() * np.log(2))) if load_ME.sum() else float("nan")


def next_tokens(decisions: Decisions) -> NDArray[np.int32]:
    """``[N]``: the token that follows in the same item, at the next position; -1 where none was recorded.

    For `vocabulary_specialization` of what is to be predicted, beside that of what is read and that of ``decisions.predicted_N``.
    """
    order = np.lexsort((decisions.position_N, decisions.item_N))
    # One number that orders as (item, position) does; the range of a position is its type's.
    key_N = decisions.item_N.astype(np.int64)[order] * 2**32 + decisions.position_N[order]
    wanted_N = decisions.item_N.astype(np.int64) * 2**32 + decisions.position_N + 1
    place_N = np.minimum(np.searchsorted(key_N, wanted_N), max(len(key_N) - 1, 0))
    if not len(key_N):
        return np.zeros(0, np.int32)
    return np.where(key_N[place_N] == wanted_N, decisions.token_N[order][place_N], -1).astype(np.int32)


def vocabulary_specialization(
    token_N: ArrayLike, index_NK: ArrayLike, num_destinations: int, *, min_count: int = 20, top: int = 15
) -> Floats:
    """``[E]``: the share of a token id's occurrences that go to the destination, averaged over its ``top`` ids (arXiv 2505.16056).

    Only ids that occur ``min_count`` times count; with fewer than ``top`` of them all are averaged, and with none it is nan.
    Balanced routing that ignores the token gives a little over K / E (it is a mean of largest values).
    """
    token_N, index_NK = np.asarray(token_N), np.asarray(index_NK, np.int64)
    index_NK, token_N = index_NK[token_N >= 0], token_N[token_N >= 0]
    _, number_N, count_T = np.unique(token_N, return_inverse=True, return_counts=True)
    frequent_T = count_T >= min_count
    if not frequent_T.any():
        return np.full(num_destinations, np.nan)
    row_T = np.cumsum(frequent_T) - 1
    kept_NK = (index_NK >= 0) & frequent_T[number_N][:, None]
    pair_NK = row_T[number_N][:, None] * num_destinations + index_NK
    num_frequent = int(frequent_T.sum())
    count_TE = np.bincount(pair_NK[kept_NK], minlength=num_frequent * num_destinations).reshape(num_frequent, -1)
    share_TE = count_TE / count_T[frequent_T][:, None]
    top = min(top, num_frequent)
    return np.partition(share_TE, num_frequent - top, axis=0)[num_frequent - top :].mean(0)


def _floats(values: Any) -> Floats:
    return np.asarray(values, np.float64)


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, nan where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) != 0)


def _shares(values: ArrayLike) -> Floats:
    values = _floats(values)
    total = values.sum(-1, keepdims=True)
    return _ratio(values, np.broadcast_to(total, values.shape))


def _entropy(values: ArrayLike) -> Floats:
    """Bits, over the last axis."""
    share = _shares(values)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    # + 0.0 turns -0.0 into 0.0.
    return -(share * logs).sum(-1) + 0.0


def _key(decisions: Decisions) -> np.ndarray:
    key_N = np.empty(len(decisions.item_N), [("item", np.int64), ("position", np.int32)])
    key_N["item"], key_N["position"] = decisions.item_N, decisions.position_N
    return key_N
