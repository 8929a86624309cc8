"""Local routing consistency and caches of experts at windows and sizes that are asked for; first accesses are misses."""
# Shapes: L layers, X ratios

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import ConfigError, DataError
from anabranch.report.caching import layers_with_choice, mean_hits
from anabranch.routing import consistency as lrc
from anabranch.routing.cache_policy import POLICIES, Policy
from anabranch.routing.trace import RoutingTrace

_RATIOS = np.arange(1, 8.01, 0.25)


@dataclass(frozen=True, kw_only=True)
class WindowFacts:
    """What `window_facts` found at one window.

    Attributes:
        window: m, in tokens.
        srp: of the whole model; ``srp_by_layer`` by layer.
        size_ratio: rho hat, expert-tokens that the best segment router switches on, over those that the model activates.
        group: 1 (experts are reused a lot) to 4 (hardly); the bounds are those of 16 tokens.
        caches: experts of a layer that a cache holds, over active ones.
        hits: hit rate at each of ``caches``, mean over layers, by policy; ``segment`` is SCH, ``plec`` sees the window.
        near_belady: the smallest ratio, in quarters, at which SCH is 90% of Belady's hits; None where none up to 8 is.
    """

    window: int
    srp: float
    srp_by_layer: dict[int, float]
    size_ratio: float
    group: int
    caches: list[float]
    hits: dict[str, list[float]]
    near_belady: float | None


def window_facts(trace: RoutingTrace, windows: Sequence[int], caches: Sequence[float]) -> list[WindowFacts]:
    """SRP and hits of caches of the layers that have a choice, at each of ``windows`` (tokens) and ``caches`` (over active experts).

    Raises ConfigError for a window or a cache that is not above 0, DataError where no layer has a choice or a window is longer than all
    sequences.
    """
    for name, values in (("--window", windows), ("--cache", caches)):
        wrong = [value for value in values if not 0 < value < np.inf]
        if wrong:
            raise ConfigError(f"{name} is {wrong[0]}; it must be above 0")
    layers, top_k = layers_with_choice(trace)
    if not layers:
        raise DataError(
            "no layer of the trace has a choice between destinations, so there is no consistency to measure"
        )
    longest = min(int(of.length_S.max(initial=0)) for of in layers)
    too_long = [window for window in windows if window > longest]
    if too_long:
        raise DataError(f"--window is {too_long[0]}, but the longest sequence has {longest} tokens; use 1 to {longest}")
    widest = max(of.num_destinations / top_k[of.layer] for of in layers)
    every = _RATIOS[_RATIOS <= max(widest, 1)]
    asked = np.concatenate([np.asarray(caches, float), every])
    plain: tuple[Policy, ...] = ("lru", "lfu", "belady", "fixed")
    held = {policy: mean_hits(layers, top_k, policy, asked) for policy in plain}
    return [_at(layers, top_k, window, list(caches), asked, held) for window in windows]


def _at(
    layers: list[lrc.Routes],
    top_k: dict[int, int],
    window: int,
    caches: list[float],
    asked: np.ndarray,
    held: dict[Policy, list[float]],
) -> WindowFacts:
    looking: tuple[Policy, ...] = ("segment", "plec")
    rates = held | {policy: mean_hits(layers, top_k, policy, asked, window) for policy in looking}
    count = len(caches)
    sch, belady = (np.array(rates[policy][count:]) for policy in ("segment", "belady"))
    near = np.flatnonzero(sch >= lrc.GOOD_ENOUGH * belady)
    of_model = lrc.srp(layers, window, "model")
    by_layer = lrc.srp(layers, window).value.tolist()
    return WindowFacts(
        window=window,
        srp=float(of_model.value),
        srp_by_layer=dict(zip((of.layer for of in layers), by_layer, strict=True)),
        size_ratio=float(of_model.size_ratio),
        group=lrc.consistency_group(float(of_model.value)),
        caches=caches,
        hits={policy: rates[policy][:count] for policy in POLICIES},
        near_belady=float(asked[count + near[0]]) if len(near) else None,
    )
