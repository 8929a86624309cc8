"""Local routing consistency: is a mixture of experts worth offloading? SRP and SCH, exactly as defined.

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models", Liang et al., arXiv 2505.16056 (v3).

- **SRP**, segment routing best performance: the F1 of the best router that may only switch an expert on or off for m tokens at a time.
- **SCH**, segment cache best hit rate: the hits of a cache that knows the next m tokens (`anabranch.routing.cache_policy`).

Both need only recorded choices, and take a `RoutingTrace` or an array:

    consistency.srp(trace, 16).value                          # [L]
    consistency.sch(trace, 16).at_ratio(2.0)                  # [L], a cache of twice the active experts

Departure: windows never cross the end of a sequence, and sequences are cut into pieces of ``length`` tokens (512, as in the paper).
"""
# Shapes: S sequences (pieces), T tokens, K choices per token, E destinations, L layers, M domains, C capacities 1..E, P starts of a window,
# X windows, H pairs of destinations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.errors import ConfigError, DataError
from anabranch.routing.cache_policy import Cold, Hits, Policy, check_routes, simulate
from anabranch.routing.measure import domain_load
from anabranch.routing.trace import RoutingTrace

log = logging.getLogger(__name__)

# Tokens of a piece.
LENGTH = 512
# Destinations times tokens that are counted at once.
CELLS = 1 << 20
# The largest histogram of which two columns are counted together.
PAIRED = 80
# Share of Belady's hits.
GOOD_ENOUGH = 0.9
# SRP at m = 16 above which a model is in group 1, 2 or 3; read off the paper's table.
GROUPS = (0.50, 0.43, 0.33)


@dataclass(frozen=True)
class Routes:
    """The choices of one layer, sequence by sequence.

    Attributes:
        layer: its number.
        index_STK: integer, destinations; -1 where a choice is unused or the sequence has ended.
        length_S: tokens of each sequence.
        num_destinations: E.
        top_k: choices of every token, None where it varies.
        domain_S: names, None where unknown.
        pool: name of the pool that destinations are slots of, if layers share it; None for destinations of the layer's own.
        blocks: choices of each of several layers whose experts are held together, K in all (see `pool_routes`); None for one layer.
    """

    layer: int
    index_STK: np.ndarray
    length_S: np.ndarray
    num_destinations: int
    top_k: int | None
    domain_S: np.ndarray
    pool: Hashable = None
    blocks: tuple[int, ...] | None = None


Source = RoutingTrace | np.ndarray


def routes(
    source: Source,
    *,
    num_destinations: int | None = None,
    lengths: Sequence[int] | None = None,
    length: int | None = LENGTH,
    pools: Sequence[Hashable] | None = None,
) -> Iterator[Routes]:
    """Each layer's choices, one layer in memory at a time.

    Args:
        source: a trace; or a bool array ``[S, T, L, E]``; or an int array ``[S, T, L, K]`` with -1 for unused choices.
        num_destinations: E of an int array. Default: the largest index and one.
        lengths: tokens of each sequence of an array; what stands behind is padding. Default: all.
        length: cut sequences into pieces of this many tokens (a last, shorter piece stays); None leaves them whole.
        pools: the pool of each layer of an array, a name or None for one of its own; layers of one pool have the same destinations. A
            trace knows its pools.

    Raises DataError for an array of another shape or type, pools of another number of layers, a token that names a destination twice, or
    an empty trace.
    """
    if isinstance(source, RoutingTrace):
        for layer, decisions in source:
            names = np.array([*source.domains, None], object)
            of = decisions.index_NK, decisions.item_N, decisions.position_N, decisions.domain_N
            index_STK, length_S, code_S = by_sequence(*of, length)
            yield _routes(layer.layer, index_STK, length_S, layer.num_destinations, names[code_S], layer.pool)
        return
    source = np.asarray(source)
    if source.ndim != 4:
        raise DataError(f"routes are [sequences, tokens, layers, experts or choices], not {source.shape}")
    length_S = np.full(len(source), source.shape[1]) if lengths is None else np.asarray(lengths)
    pools = [None] * source.shape[2] if pools is None else pools
    if len(pools) != source.shape[2]:
        raise DataError(f"there are {len(pools)} pools for {source.shape[2]} layers; name the pool of each, or None")
    if source.dtype == bool:
        num_destinations = source.shape[3]
    for number in range(source.shape[2]):
        index_STK = _indices(source[:, :, number]) if source.dtype == bool else source[:, :, number]
        index_STK = np.where((np.arange(source.shape[1]) < length_S[:, None])[..., None], index_STK, -1)
        size = num_destinations or int(index_STK.max(initial=0)) + 1
        index_PTK, length_P = _cut(index_STK, length_S, length)
        yield _routes(number, index_PTK, length_P, size, np.full(len(length_P), None), pools[number])


def _routes(
    layer: int, index_STK: np.ndarray, length_S: np.ndarray, size: int, domain_S: np.ndarray, pool: Hashable
) -> Routes:
    used_ST = (index_STK >= 0).sum(-1)[np.arange(index_STK.shape[1]) < length_S[:, None]]
    top_k = int(used_ST[0]) if used_ST.size and (used_ST == used_ST[0]).all() else None
    return Routes(layer, check_routes(index_STK, size), length_S, size, top_k, domain_S, pool)


def _indices(chosen_STE: np.ndarray) -> np.ndarray:
    """From bool to indices, padded with -1."""
    most = max(int(chosen_STE.sum(-1).max(initial=0)), 1)
    order_STE = np.argsort(~chosen_STE, axis=-1, kind="stable")[..., :most]
    return np.where(np.take_along_axis(chosen_STE, order_STE, -1), order_STE, -1)


def by_sequence(
    index_NK: np.ndarray, item_N: np.ndarray, position_N: np.ndarray, domain_N: np.ndarray, length: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """index_STK, length_S and domain codes of pieces of ``length`` (None: whole); tokens of a sequence by position, then as recorded."""
    order_N = np.lexsort((position_N, item_N))
    item_N = item_N[order_N]
    begins_N = np.ones(len(item_N), bool)
    begins_N[1:] = np.diff(item_N) != 0
    start_S = np.flatnonzero(begins_N)
    place_N = np.arange(len(item_N)) - np.repeat(start_S, np.diff(np.append(start_S, len(item_N))))
    if length is not None:
        begins_N |= place_N % length == 0
        place_N = place_N % length
    row_N = np.cumsum(begins_N) - 1
    length_S = np.bincount(row_N)
    index_STK = np.full((len(length_S), int(length_S.max(initial=0)), index_NK.shape[1]), -1, np.int32)
    index_STK[row_N, place_N] = index_NK[order_N]
    return index_STK, length_S, domain_N[order_N][begins_N]


def _cut(index_STK: np.ndarray, length_S: np.ndarray, length: int | None) -> tuple[np.ndarray, np.ndarray]:
    num_sequences, num_tokens, top_k = index_STK.shape
    if length is None or num_tokens <= length:
        return index_STK, length_S
    pieces = -(-num_tokens // length)
    padded = np.full((num_sequences, pieces * length, top_k), -1, index_STK.dtype)
    padded[:, :num_tokens] = index_STK
    length_P = np.clip(length_S[:, None] - length * np.arange(pieces), 0, length).reshape(-1)
    return padded.reshape(-1, length, top_k)[length_P > 0], length_P[length_P > 0]


# SRP


@dataclass(frozen=True)
class Srp:
    """SRP of groups of experts; the arrays have one entry for each group.

    Attributes:
        value: the best F1; 0 for a group without activations.
        size_ratio: rho_hat, expert-tokens that the best segment router switches on, over those that the model activates.
        threshold: a*, the activations in a window from which on it switches an expert on.
        activation_rate: share of expert-tokens that are active.
    """

    value: np.ndarray
    size_ratio: np.ndarray
    threshold: np.ndarray
    activation_rate: np.ndarray


def window_counts(of: Routes, window: int, *, by: Literal["domain", "position"] | None = None) -> np.ndarray:
    """int64 ``[G, E, window + 1]``: in how many windows of ``window`` tokens a destination is chosen 0, 1, ... ``window`` times.

    G is 1, or the domains of ``of.domain_S`` in sorted order, or the starts 0, 1, ... of a window within its sequence.
    """
    if window < 1:
        raise ConfigError(f"the window is {window} tokens; it must be at least 1")
    num_sequences, num_tokens, _ = of.index_STK.shape
    num_starts, num_destinations = max(num_tokens - window + 1, 0), of.num_destinations
    group_S, num_groups = np.zeros(num_sequences, np.int64), 1
    if by == "domain":
        names = sorted({name for name in of.domain_S if name is not None})
        group_S, num_groups = np.array([names.index(x) if x is not None else -1 for x in of.domain_S], int), len(names)
    elif by == "position":
        num_groups = num_starts
    cells = num_destinations * (window + 1)
    count = np.zeros((num_groups, num_destinations, window + 1), np.int64)
    step = max(1, CELLS // max(num_tokens * num_destinations, 1))
    for first in range(0, num_sequences if num_starts else 0, step):
        part = slice(first, first + step)
        sum_PSE = window_sums(of.index_STK[part], num_destinations, window)
        whole_PS = np.arange(num_starts)[:, None] + window <= of.length_S[part]
        if by is None:
            count[0] += _histograms(
                sum_PSE.reshape(-1, num_destinations) if whole_PS.all() else sum_PSE[whole_PS], window
            )
            continue
        group_PS = np.broadcast_to(
            np.arange(num_starts)[:, None] if by == "position" else group_S[part], whole_PS.shape
        )
        whole_PS &= group_PS >= 0
        cell_XE = sum_PSE[whole_PS] + np.arange(num_destinations) * (window + 1) + group_PS[whole_PS][:, None] * cells
        count += np.bincount(cell_XE.reshape(-1), minlength=num_groups * cells).reshape(count.shape)
    return count


def window_sums(index_STK: np.ndarray, num_destinations: int, window: int) -> np.ndarray:
    """``[P, S, E]``, int16 where that suffices: how often each destination is chosen in each window."""
    num_sequences, num_tokens, _ = index_STK.shape
    sum_TSE = np.zeros(
        (num_tokens + 1, num_sequences, num_destinations), np.int16 if num_tokens < 1 << 15 else np.int32
    )
    cell_STK = index_STK + num_destinations * np.arange(num_sequences)[:, None, None]
    cell_STK += num_destinations * num_sequences * np.arange(1, num_tokens + 1)[:, None]
    used_STK = index_STK >= 0
    sum_TSE.reshape(-1)[cell_STK.reshape(-1) if used_STK.all() else cell_STK[used_STK]] = 1
    # A cumulative sum, in whole rows.
    for at in range(1, num_tokens + 1):
        sum_TSE[at] += sum_TSE[at - 1]
    return sum_TSE[window:] - sum_TSE[:-window]


def _histograms(sum_XE: np.ndarray, window: int) -> np.ndarray:
    """int64 ``[E, window + 1]``: how often each value stands in each column; of two columns at a time, which halves the counting."""
    num_destinations, size = sum_XE.shape[1], window + 1
    if size > PAIRED or num_destinations % 2:
        cell_XE = sum_XE + np.arange(num_destinations) * size
        return np.bincount(cell_XE.reshape(-1), minlength=num_destinations * size).reshape(-1, size)
    pair_XH = (sum_XE[:, 0::2] * np.int16(size) + sum_XE[:, 1::2]).astype(np.intp)
    pair_XH += np.arange(num_destinations // 2) * size**2
    count_HAB = np.bincount(pair_XH.reshape(-1), minlength=num_destinations // 2 * size**2).reshape(-1, size, size)
    return np.stack([count_HAB.sum(2), count_HAB.sum(1)], 1).reshape(num_destinations, size)


def srp_of_counts(count_GX: np.ndarray) -> Srp:
    """SRP of groups, from ``[G, window + 1]``: how many (expert, window) pairs of the group have 0, 1, ... activations.

    The best segment router switches on what has at least a activations, for the a that maximises F1 (proved in the paper, C.3).
    """
    count_GX = np.asarray(count_GX, np.float64)
    window = count_GX.shape[-1] - 1
    times_X = np.arange(window + 1)

    def from_threshold(values: np.ndarray) -> np.ndarray:
        return values[..., ::-1].cumsum(-1)[..., ::-1]

    match_GX = from_threshold(times_X * count_GX)
    on_GX = window * from_threshold(count_GX)
    active_G1 = match_GX[..., :1]
    f1_GX = 2 * match_GX / np.maximum(1, on_GX + active_G1)
    best_G = f1_GX.argmax(-1)
    on_G = np.take_along_axis(on_GX, best_G[..., None], -1)[..., 0]
    active_G, total_G = active_G1[..., 0], on_GX[..., 0]
    return Srp(
        f1_GX.max(-1),
        np.divide(on_G, active_G, out=np.zeros_like(on_G), where=active_G > 0),
        best_G,
        np.divide(active_G, total_G, out=np.zeros_like(total_G), where=total_G > 0),
    )


def srp(
    source: Source | Iterable[Routes],
    window: int,
    group: Literal["expert", "layer", "model"] = "layer",
    *,
    by: Literal["domain", "position"] | None = None,
) -> Srp:
    """Segment routing best performance at ``window`` tokens (the paper's m: 4, 16, 64, 256), over every window, stride 1.

    Args:
        source: a trace, an array (see `routes`), or what `routes` gives.
        window: m.
        group: the experts that share one threshold. ``expert``: arrays ``[L, E]`` (0 beyond a layer's experts); ``layer``: ``[L]``;
            ``model``: numbers; a group's value is that of its windows together, not a mean of values.
        by: split by ``domain`` of the sequence (sorted names) or ``position`` of the window's start: one leading axis more.

    A window longer than all sequences gives 0, and a warning. Raises DataError where `routes` does.
    """
    counts = [window_counts(layer, window, by=by) for layer in layers_of(source)]
    if not counts:
        raise DataError("there are no routed layers to measure")
    if not any(count.any() for count in counts):
        log.warning("no sequence has %d tokens, so there is no window of that length to measure", window)
    counts = [count if count.size else np.zeros((1, *count.shape[1:]), np.int64) for count in counts]
    if group == "expert":
        widest = max(count.shape[1] for count in counts)
        stacked = [np.pad(count, [(0, 0), (0, widest - count.shape[1]), (0, 0)]) for count in counts]
        count_GX = np.stack(stacked, 1)
    else:
        count_GX = np.stack([count.sum(1) for count in counts], 1)
        count_GX = count_GX.sum(1) if group == "model" else count_GX
    return srp_of_counts(count_GX if by else count_GX[0])


def layers_of(source: Source | Iterable[Routes]) -> Iterable[Routes]:
    """What `routes` gives of a trace or an array; the layers themselves where they are given."""
    return routes(source) if isinstance(source, RoutingTrace | np.ndarray) else source


# SCH and the caches it is compared with


@dataclass(frozen=True)
class HitRates:
    """Hits at every capacity, of each layer (or of the whole model: one entry).

    Attributes:
        hits: of each layer, see `Hits`.
        top_k: K of each layer, None where it varies; of a model their sum.
    """

    hits: list[Hits]
    top_k: list[int | None]

    @property
    def rates(self) -> list[np.ndarray]:
        """``[C]`` of each layer: hits over accesses of all sequences, at capacities 1 to E."""
        return [hits.rate_C for hits in self.hits]

    def at_ratio(self, ratio: float, top_k: int | None = None) -> np.ndarray:
        """``[L]``: at capacity ``ratio`` K (the paper's rho), rounded down, at most E.

        Raises ConfigError where K varies from token to token and no nominal ``top_k`` is given, or below a capacity of 1.
        """
        return np.array([rate_C[at] for rate_C, at in zip(self.rates, self._at(ratio, top_k), strict=True)])

    def interval(self, ratio: float, top_k: int | None = None, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """``[L, 2]``: basic bootstrap interval of 95% of `at_ratio`, over sequences: [2 est - q97.5, 2 est - q2.5]."""
        generator = np.random.default_rng(seed)
        found = []
        for hits, at in zip(self.hits, self._at(ratio, top_k), strict=True):
            known_S = hits.accesses_S > 0
            pick = generator.integers(known_S.sum(), size=(resamples, known_S.sum()))
            drawn = hits.hits_SC[known_S, at][pick].sum(1) / hits.accesses_S[known_S][pick].sum(1)
            found.append(2 * hits.rate_C[at] - np.quantile(drawn, [0.975, 0.025]))
        return np.array(found)

    def _at(self, ratio: float, top_k: int | None) -> list[int]:
        places = []
        for hits, own in zip(self.hits, self.top_k, strict=True):
            size = top_k if top_k is not None else own
            if size is None:
                raise ConfigError(
                    "the number of experts varies from token to token; say what a ratio is of with top_k="
                )
            capacity = int(ratio * size + 1e-9)
            if capacity < 1:
                raise ConfigError(
                    f"ratio {ratio} of {size} experts is less than a cache of one; use {1 / size:.3g} or more"
                )
            places.append(min(capacity, hits.hits_SC.shape[1]) - 1)
        return places


def hit_rates(
    source: Source | Iterable[Routes],
    policy: Policy,
    *,
    window: int | None = None,
    level: Literal["layer", "model"] = "layer",
    cold: Cold = "free",
) -> HitRates:
    """Hits of a cache policy at every capacity, see `anabranch.routing.cache_policy.simulate` (``segment`` and ``plec`` need ``window``).

    ``level="model"`` is one cache for the experts of all layers, in the order in which a token meets them; a slot of a pool that layers
    share is one expert. Every layer must then have routed the same sequences. Raises DataError where it has not. For one cache of each pool
    give `anabranch.routing.pool_routes.pool_routes` of a trace.
    """
    layers = list(layers_of(source))
    if level == "model":
        layers = [_whole_model(layers)]
    hits = [
        simulate(of.index_STK, of.num_destinations, policy, window=window, cold=cold, blocks=of.blocks) for of in layers
    ]
    return HitRates(hits, [of.top_k for of in layers])


def sch(
    source: Source | Iterable[Routes], window: int, *, level: Literal["layer", "model"] = "layer", cold: Cold = "free"
) -> HitRates:
    """Segment cache best hit rate: a cache that evicts what the next ``window`` tokens (m) use least.

    With ``cold="free"``, the paper's, first accesses hit while the cache has free slots; ``"miss"`` is what a real system sees.
    """
    return hit_rates(source, "segment", window=window, level=level, cold=cold)


def _whole_model(layers: list[Routes]) -> Routes:
    """The layers' choices side by side, numbered by what is held in memory: slots of pools."""
    pools = [("layer", of.layer) if of.pool is None else ("pool", of.pool) for of in layers]
    slots: dict[Hashable, int] = {}
    for pool, of in zip(pools, layers, strict=True):
        slots[pool] = max(slots.get(pool, 0), of.num_destinations)
    starts = dict(zip(slots, np.cumsum([0, *slots.values()]), strict=False))
    shapes = {of.index_STK.shape[:2] for of in layers}
    if len(shapes) != 1 or any(not np.array_equal(of.length_S, layers[0].length_S) for of in layers):
        raise DataError(f"layers routed different sequences ({sorted(shapes)}), so they have no common cache")
    keys = [
        np.where(of.index_STK >= 0, of.index_STK + starts[pool], -1) for of, pool in zip(layers, pools, strict=True)
    ]
    known = [of.top_k for of in layers if of.top_k is not None]
    top_k = sum(known) if len(known) == len(layers) else None
    blocks = tuple(of.index_STK.shape[-1] for of in layers)
    index_STK, length_S, domain_S = np.concatenate(keys, -1), layers[0].length_S, layers[0].domain_S
    return Routes(-1, index_STK, length_S, sum(slots.values()), top_k, domain_S, blocks=blocks)


# What follows from them


def near_belady(sch_C: np.ndarray, belady_C: np.ndarray, top_k: int) -> int:
    """The smallest capacity, at least K, at which SCH reaches 0.9 of Belady's hits (E if none)."""
    # Where even Belady hits nothing, nothing is near it.
    good_C = (belady_C > 0) & (sch_C >= GOOD_ENOUGH * belady_C)
    good_C[: top_k - 1] = False
    return int(np.argmax(good_C)) + 1 if good_C.any() else len(sch_C)


def knee(rate_C: np.ndarray) -> int:
    """The capacity of a hit rate curve where it bends most: farthest above the line between its ends; 1 if it is flat."""
    span = rate_C[-1] - rate_C[0]
    if span <= 0:
        return 1
    return int(np.argmax((rate_C - rate_C[0]) / span - np.linspace(0, 1, len(rate_C)))) + 1


def recommended_capacity(sch_C: np.ndarray, belady_C: np.ndarray, top_k: int) -> int:
    """The capacity, at least K, beyond which more of it buys little: the knee of SCH, or where SCH is near Belady if that is larger.

    The paper's advice is about 2 K; this is for one model. The rule is ours.
    """
    return max(near_belady(sch_C, belady_C, top_k), knee(sch_C[top_k - 1 :]) + top_k - 1)


def consistency_group(value: float) -> int:
    """1 (experts are reused a lot) to 4 (hardly), from SRP at 16 tokens; the bounds are ours, read off the paper's table of 20 models.

    Group 1 is worth offloading only where the load is balanced too (`activation_spread`): a model that uses few experts at all is there.
    """
    return 1 + sum(value < bound for bound in GROUPS)


def activation_spread(source: Source | Iterable[Routes]) -> float:
    """The paper's measure of balance: standard deviation, in percent points, of the activation rates of all experts of the model."""
    rates = []
    for of in layers_of(source):
        index_R = of.index_STK[of.index_STK >= 0]
        rates.append(np.bincount(index_R, minlength=of.num_destinations) / max(int(of.length_S.sum()), 1))
    return 100 * float(np.concatenate(rates).std())


def domain_variation(load_ME: np.ndarray) -> np.ndarray:
    """``[E]``: how unevenly an expert is used over domains: coefficient of variation of its share of each domain's choices.

    0 is the same in all; nan for an expert nobody uses.
    """
    load_ME = np.asarray(load_ME, np.float64)
    load_ME = load_ME[load_ME.sum(1) > 0]
    share_ME = load_ME / load_ME.sum(1, keepdims=True)
    mean_E = share_ME.mean(0)
    return np.divide(share_ME.std(0), mean_E, out=np.full(mean_E.shape, np.nan), where=mean_E > 0)


def specialization(trace: RoutingTrace, window: int = 16) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each layer, ``(SRP, domain_variation)`` of its experts, ``[E]`` each: do domain experts make routing consistent?

    The other half of the paper's table is `anabranch.routing.measure.vocabulary_specialization`.
    """
    found = {}
    for of in routes(trace):
        value_E = srp_of_counts(window_counts(of, window)[0]).value
        found[of.layer] = value_E, domain_variation(domain_load(trace, of.layer))
    return found
