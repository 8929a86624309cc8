"""What a trace says about offloading: how consistent routing is from token to token, and how large a cache of experts pays."""
# Shapes: L layers, C capacities

from dataclasses import dataclass

import numpy as np

from anabranch.routing import consistency as lrc
from anabranch.routing.cache_policy import LOOKING, Cold, Policy, simulate
from anabranch.routing.trace import RoutingTrace

WINDOWS = (4, 16, 64)  # tokens
MAIN = 16  # the one that is compared between models
SEQUENCES = 64  # pieces of each layer that caches are simulated on; SRP takes all
CACHES: dict[Policy, str] = {
    "lru": "LRU",
    "lfu": "LFU",
    "segment": "SCH: knows the next 16 tokens",
    "belady": "Belady: knows all",
}


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """Local routing consistency (arXiv 2505.16056) of the layers that have a choice; first accesses are misses.

    Attributes:
        srp: of the whole model, by window in tokens; ``srp_by_layer`` by layer at 16 tokens.
        always_on: F1 of a router that keeps all experts on, below which no SRP is.
        group: 1 (experts are reused a lot) to 4 (hardly).
        activation_spread: standard deviation of activation rates, percent points.
        ratios: cache size over active experts; ``hits``: hit rate at each, mean over layers, by policy.
        recommended_ratio: the size beyond which more buys little, see `consistency.recommended_capacity`.
        recommended_capacity: experts of each layer that this is, by layer.
        lru, sch: hits at that size.
    """

    srp: dict[int, float]
    srp_by_layer: dict[int, float]
    always_on: float
    group: int
    activation_spread: float
    ratios: list[float]
    hits: dict[str, list[float]]
    recommended_ratio: float
    recommended_capacity: dict[int, int]
    lru: float
    sch: float


def cache_facts(trace: RoutingTrace) -> CacheFacts | None:
    """The facts, or None where no layer has a choice or no sequence has 16 tokens."""
    layers, top_k = layers_with_choice(trace)
    layers = [of for of in layers if of.length_S.max(initial=0) >= MAIN]
    if not layers:
        return None
    windows = [window for window in WINDOWS if any(of.length_S.max() >= window for of in layers)]
    of_model = {window: lrc.srp(layers, window, "model") for window in windows}
    rate = float(of_model[MAIN].activation_rate)
    largest = min(of.num_destinations / top_k[of.layer] for of in layers)
    ratios = np.unique(np.append(np.arange(1, min(largest, 8), 0.25), min(largest, 8)))
    hits: dict[str, list[float]] = {policy: mean_hits(layers, top_k, policy, ratios, MAIN) for policy in CACHES}
    best = lrc.recommended_capacity(np.array(hits["segment"]), np.array(hits["belady"]), 1) - 1  # places of `ratios`
    value = float(of_model[MAIN].value)
    return CacheFacts(
        srp={window: float(found.value) for window, found in of_model.items()},
        srp_by_layer=dict(zip((of.layer for of in layers), lrc.srp(layers, MAIN).value.tolist(), strict=True)),
        always_on=2 * rate / (1 + rate),
        group=lrc.consistency_group(value),
        activation_spread=lrc.activation_spread(layers),
        ratios=ratios.tolist(),
        hits=hits,
        recommended_ratio=float(ratios[best]),
        recommended_capacity={of.layer: int(ratios[best] * top_k[of.layer] + 1e-9) for of in layers},
        lru=hits["lru"][best],
        sch=hits["segment"][best],
    )


def layers_with_choice(trace: RoutingTrace) -> tuple[list[lrc.Routes], dict[int, int]]:
    """The layers that do not take all their destinations, and K of every layer."""
    top_k = {layer.layer: layer.top_k for layer in trace.layers}
    return [of for of in lrc.routes(trace) if top_k[of.layer] < of.num_destinations], top_k


def mean_hits(
    layers: list[lrc.Routes],
    top_k: dict[int, int],
    policy: Policy,
    ratios: np.ndarray,
    window: int | None = None,
    cold: Cold = "miss",
) -> list[float]:
    """Mean over layers of the hit rate at each ratio, on sequences spread over the trace; ``window`` is of policies that have one."""
    rates_LX = []
    for of in layers:
        pick_S = np.unique(np.linspace(0, len(of.length_S) - 1, min(SEQUENCES, len(of.length_S))).astype(int))
        index_STK = of.index_STK[pick_S]
        found = simulate(
            index_STK, of.num_destinations, policy, window=window if policy in LOOKING else None, cold=cold
        )
        capacity_X = np.clip((ratios * top_k[of.layer] + 1e-9).astype(int), 1, of.num_destinations)
        rates_LX.append(found.rate_C[capacity_X - 1])
    return np.mean(rates_LX, axis=0).tolist()
