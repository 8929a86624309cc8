"""What a trace says about offloading: how consistent routing is from token to token, and how large a cache of experts pays."""
# Shapes: X ratios

from dataclasses import dataclass, replace

import numpy as np

from anabranch.routing import consistency as lrc
from anabranch.routing.cache_policy import LOOKING, Cold, Policy, simulate
from anabranch.routing.pool_routes import pool_routes
from anabranch.routing.trace import RoutingTrace

WINDOWS = (4, 16, 64)  # tokens
MAIN = 16  # the one that is compared between models
SEQUENCES = 64  # pieces of each pool that caches are simulated on; SRP takes all
LARGEST = 8  # times the active experts
CACHES: dict[Policy, str] = {
    "lru": "LRU",
    "lfu": "LFU",
    "segment": "SCH: knows the next 16 tokens",
    "belady": "Belady: knows all",
}


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """Local routing consistency (arXiv 2505.16056) of the layers that have a choice; first accesses are misses.

    An expert is held once: layers of one pool, and passes of one layer, have a cache together. Its active experts are those of all of them.

    Attributes:
        srp: of the whole model, by window in tokens; ``srp_by_layer`` by layer at 16 tokens.
        always_on: F1 of a router that keeps all experts on, below which no SRP is.
        group: 1 (experts are reused a lot) to 4 (hardly).
        activation_spread: standard deviation of activation rates, percent points.
        shared: the layers of each cache that serves several, by pool.
        ratios: cache size over active experts, those at which some cache holds more; ``hits``: hit rate at each, mean over
            caches, by policy.
        recommended_ratio: the size beyond which more buys little, see `consistency.recommended_capacity`.
        recommended_capacity: experts that this is of the cache of a layer, by layer; layers of `shared` have one together.
        is_everything: whether that is all experts there are, so that no smaller cache is recommended.
        lru, sch: hits at that size.
    """

    srp: dict[int, float]
    srp_by_layer: dict[int, float]
    always_on: float
    group: int
    activation_spread: float
    shared: dict[str, list[int]]
    ratios: list[float]
    hits: dict[str, list[float]]
    recommended_ratio: float
    recommended_capacity: dict[int, int]
    is_everything: bool
    lru: float
    sch: float


def cache_facts(trace: RoutingTrace) -> CacheFacts | None:
    """The facts, or None where no layer has a choice or no sequence has 16 tokens."""
    layers = [of for of in layers_with_choice(trace) if of.length_S.max(initial=0) >= MAIN]
    if not layers:
        return None
    windows = [window for window in WINDOWS if any(of.length_S.max() >= window for of in layers)]
    of_model = {window: lrc.srp(layers, window, "model") for window in windows}
    rate = float(of_model[MAIN].activation_rate)
    caches = Caches(trace, [of.layer for of in layers])
    ratios = caches.ratios(LARGEST)
    hits: dict[str, list[float]] = {policy: caches.hits(policy, ratios, MAIN) for policy in CACHES}
    best = lrc.recommended_capacity(np.array(hits["segment"]), np.array(hits["belady"]), 1) - 1  # places of `ratios`
    capacities = caches.capacities(ratios[best])
    value = float(of_model[MAIN].value)
    return CacheFacts(
        srp={window: float(found.value) for window, found in of_model.items()},
        srp_by_layer=dict(zip((of.layer for of in layers), lrc.srp(layers, MAIN).value.tolist(), strict=True)),
        always_on=2 * rate / (1 + rate),
        group=lrc.consistency_group(value),
        activation_spread=lrc.activation_spread(layers),
        shared=caches.shared,
        ratios=ratios.tolist(),
        hits=hits,
        recommended_ratio=float(ratios[best]),
        recommended_capacity={of.layer: capacities[trace.layer(of.layer).pool] for of in layers},
        is_everything=all(capacities[str(of.pool)] == of.num_destinations for of in caches.routes),
        lru=hits["lru"][best],
        sch=hits["segment"][best],
    )


def layers_with_choice(trace: RoutingTrace) -> list[lrc.Routes]:
    """The layers that do not take all their destinations."""
    top_k = {layer.layer: layer.top_k for layer in trace.layers}
    return [of for of in lrc.routes(trace) if top_k[of.layer] < of.num_destinations]


class Caches:
    """The caches of a model: one for each pool of experts that some of ``layers``, numbers, choose from.

    Attributes:
        routes: what each is asked for, on sequences spread over the trace.
        shared: the layers of each that serves several, by pool.
    """

    def __init__(self, trace: RoutingTrace, layers: list[int]) -> None:
        self.routes = [_spread(of) for of in pool_routes(trace, layers)]
        members = {name: [one.layer for one in pool if one.layer in layers] for name, pool in trace.pools.items()}
        self.shared = {name: numbers for name, numbers in members.items() if len(numbers) > 1}

    def ratios(self, largest: float) -> np.ndarray:
        """Sizes in quarters of the active experts, up to ``largest`` or all experts, at which some cache holds more than before.

        The smallest holds what one layer asks for at once.
        """
        last = min(largest, max(of.num_destinations / _active(of) for of in self.routes))
        first = min(last, max(max(of.blocks or (_active(of),)) / _active(of) for of in self.routes))
        every = np.unique([first, *np.arange(0.25, last, 0.25), last])
        size_XC = np.array([list(self.capacities(ratio).values()) for ratio in every[every >= first]])
        is_new_X = np.ones(len(size_XC), bool)
        is_new_X[1:] = (np.diff(size_XC, axis=0) > 0).any(1)
        return every[every >= first][is_new_X]

    def capacities(self, ratio: float) -> dict[str, int]:
        """Experts that each cache holds at ``ratio`` times its active ones, by pool: at least one, at most all."""
        return {
            str(of.pool): int(np.clip(int(ratio * _active(of) + 1e-9), 1, of.num_destinations)) for of in self.routes
        }

    def hits(self, policy: Policy, ratios: np.ndarray, window: int | None = None, cold: Cold = "miss") -> list[float]:
        """Mean over caches of the hit rate at each ratio; ``window``, in tokens, is of policies that have one."""
        ahead = window if policy in LOOKING else None
        rates_X = np.zeros(len(ratios))
        for of in self.routes:
            found = simulate(
                of.index_STK, of.num_destinations, policy, window=ahead, cold=cold, blocks=of.blocks
            ).rate_C
            rates_X += found[[self.capacities(ratio)[str(of.pool)] - 1 for ratio in ratios]]
        return (rates_X / len(self.routes)).tolist()


def _active(of: lrc.Routes) -> int:
    """Experts that a token may use of a pool, over all its layers."""
    assert of.top_k is not None
    return of.top_k


def _spread(of: lrc.Routes) -> lrc.Routes:
    pick_S = np.unique(np.linspace(0, len(of.length_S) - 1, min(SEQUENCES, len(of.length_S))).astype(int))
    return replace(of, index_STK=of.index_STK[pick_S], length_S=of.length_S[pick_S], domain_S=of.domain_S[pick_S])
