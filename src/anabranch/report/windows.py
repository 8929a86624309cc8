"""Local routing consistency and caches of experts at windows and sizes that are asked for, by both rules for first accesses."""
# Shapes: L layers, X ratios, M domains

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import ConfigError, DataError
from anabranch.report.caching import LARGEST, Caches, layers_with_choice
from anabranch.routing import consistency as lrc
from anabranch.routing.cache_policy import POLICIES, Cold, Policy
from anabranch.routing.srp_statistics import domain_correlation, srp_interval
from anabranch.routing.trace import RoutingTrace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WindowFacts:
    """What `window_facts` found at one window.

    Attributes:
        window: m, in tokens.
        srp: of the whole model, and ``srp_interval``, 95% by bootstrap over sequences; None where there are too few.
        srp_by_layer: by layer, and ``srp_interval_by_layer``.
        size_ratio: rho hat, expert-tokens that the best segment router switches on, over those that the model activates.
        group: 1 (experts are reused a lot) to 4 (hardly); the bounds are those of 16 tokens.
        domains: names; ``domain_correlation`` of the SRP of experts between each two, None where it has no value. Empty for one domain.
        caches: experts that a cache holds, over active ones; layers that share experts have a cache together.
        hits: hit rate at each of ``caches``, mean over caches, by policy; ``segment`` is SCH, ``plec`` sees the window. First accesses are
            misses, as a real system sees them, but ``fixed`` is filled before a sequence begins.
        hits_free: the same by the paper's rule: a first access is a hit while the cache has slots never used.
        near_belady: the smallest ratio, in quarters, at which SCH is 90% of Belady's hits, and ``lru_there``, what LRU hits at it; None
            where none up to 8 is. The smallest there is holds what one layer asks for at once. ``near_belady_free`` by the paper's rule.
    """

    window: int
    srp: float
    srp_interval: tuple[float, float] | None
    srp_by_layer: dict[int, float]
    srp_interval_by_layer: dict[int, tuple[float, float] | None]
    size_ratio: float
    group: int
    domains: list[str]
    domain_correlation: list[list[float | None]]
    caches: list[float]
    hits: dict[str, list[float]]
    hits_free: dict[str, list[float]]
    near_belady: float | None
    lru_there: float | None
    near_belady_free: float | None


def window_facts(trace: RoutingTrace, windows: Sequence[int], caches: Sequence[float]) -> list[WindowFacts]:
    """SRP and hits of caches of the layers that have a choice, at each of ``windows`` (tokens) and ``caches`` (over active experts).

    A window that is longer than all sequences is left out, with a warning.

    Raises ConfigError for a window or a cache that is not above 0, DataError where no layer has a choice or all windows are too long.
    """
    check_caches(caches)
    layers = layers_with_choice(trace)
    if not layers:
        raise DataError(
            "no layer of the trace has a choice between destinations, so there is no consistency to measure"
        )
    longest = min(int(of.length_S.max(initial=0)) for of in layers)
    check_windows(windows, longest)
    kept = [window for window in windows if window <= longest]
    for window in windows:
        if window > longest:
            log.warning("a window of %d tokens is left out: the longest sequence has %d", window, longest)
    served = Caches(trace, [of.layer for of in layers])
    asked = np.concatenate([np.asarray(caches, float), served.ratios(LARGEST)])
    plain: tuple[Policy, ...] = ("lru", "lfu", "belady", "fixed")
    rules: tuple[Cold, ...] = ("miss", "free")
    held = {cold: {policy: served.hits(policy, asked, cold=cold) for policy in plain} for cold in rules}
    return [_at(layers, served, window, list(caches), asked, held) for window in kept]


def check_windows(windows: Sequence[int], longest: int) -> None:
    """Raise ConfigError for a window that is not above 0, DataError if all are longer than the ``longest`` sequence (tokens)."""
    wrong = [window for window in windows if not 0 < window < np.inf]
    if wrong:
        raise ConfigError(f"a window is {wrong[0]} tokens; it must be above 0")
    if windows and min(windows) > longest:
        raise DataError(
            f"a window is {windows[0]} tokens, but the longest sequence has {longest}; ask for 1 to {longest}"
        )


def check_caches(caches: Sequence[float]) -> None:
    """Raise ConfigError for a cache, times the active experts, that is not above 0."""
    wrong = [cache for cache in caches if not 0 < cache < np.inf]
    if wrong:
        raise ConfigError(f"a cache is {wrong[0]} times the active experts; it must be above 0")


def _at(
    layers: list[lrc.Routes],
    served: Caches,
    window: int,
    caches: list[float],
    asked: np.ndarray,
    held: dict[Cold, dict[Policy, list[float]]],
) -> WindowFacts:
    looking: tuple[Policy, ...] = ("segment", "plec")
    rates = {
        cold: hits | {policy: served.hits(policy, asked, window, cold) for policy in looking}
        for cold, hits in held.items()
    }
    count = len(caches)
    near = {cold: _near_belady(hits, count) for cold, hits in rates.items()}
    of_model = lrc.srp(layers, window, "model")
    numbers = [of.layer for of in layers]
    domains, correlation_MM = domain_correlation(layers, window)
    is_split = len(domains) > 1
    return WindowFacts(
        window=window,
        srp=float(of_model.value),
        srp_interval=_pair(srp_interval(layers, window, "model")) if _same_sequences(layers) else None,
        srp_by_layer=dict(zip(numbers, lrc.srp(layers, window).value.tolist(), strict=True)),
        srp_interval_by_layer=dict(zip(numbers, map(_pair, srp_interval(layers, window)), strict=True)),
        size_ratio=float(of_model.size_ratio),
        group=lrc.consistency_group(float(of_model.value)),
        domains=domains if is_split else [],
        domain_correlation=[[_number(value) for value in row] for row in correlation_MM] if is_split else [],
        caches=caches,
        hits={policy: rates["miss"][policy][:count] for policy in POLICIES},
        hits_free={policy: rates["free"][policy][:count] for policy in POLICIES},
        near_belady=None if near["miss"] is None else float(asked[near["miss"]]),
        lru_there=None if near["miss"] is None else rates["miss"]["lru"][near["miss"]],
        near_belady_free=None if near["free"] is None else float(asked[near["free"]]),
    )


def _near_belady(hits: dict[Policy, list[float]], first: int) -> int | None:
    """Place of the first ratio, from ``first`` on, at which SCH is near Belady's hits."""
    sch, belady = (np.array(hits[policy][first:]) for policy in ("segment", "belady"))
    near = np.flatnonzero((belady > 0) & (sch >= lrc.GOOD_ENOUGH * belady))
    return first + int(near[0]) if len(near) else None


def _same_sequences(layers: list[lrc.Routes]) -> bool:
    return len({len(of.length_S) for of in layers}) == 1


def _pair(interval: np.ndarray) -> tuple[float, float] | None:
    return None if np.isnan(interval).any() else (float(interval[0]), float(interval[1]))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
