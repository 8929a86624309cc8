"""How the passes of a layer that routes several times follow each other, from a trace.

    for facts in between_passes(trace):
        print(facts.first, facts.reuse, "by chance", facts.chance)

Passes of one layer choose from one pool and own the same slots of it; neighbours that share a pool own different ones.
"""
# Shapes: N items, K choices per item, E destinations of a pool

import itertools
from dataclasses import dataclass

import numpy as np

from anabranch.routing.measure import (
    aligned,
    chance_reuse,
    coactivation,
    mutual_information,
    mutual_information_bias,
    reuse_rate,
)
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import TraceLayer


@dataclass(frozen=True)
class PassFacts:
    """How one pass follows another in a recorded layer.

    Attributes:
        first, second: their names in the trace.
        first_layer, second_layer: their numbers.
        coactivation_EE: int64, tokens that chose i in the first and j in the second.
        reuse: share of the second's choices that were choices of the first (hits of a cache that holds what the pass before used).
        chance: the same where choices are independent, K / E.
        combinations_seen: different pairs of sets of experts that tokens took.
        information_bits: how much a choice of the first tells about one of the second; ``noise_bits`` is what luck would show.
    """

    first: str
    second: str
    first_layer: int
    second_layer: int
    coactivation_EE: np.ndarray
    reuse: float
    chance: float
    combinations_seen: int
    information_bits: float
    noise_bits: float

    @property
    def lift_EE(self) -> np.ndarray:
        """``[E, E]``: co-activation over what the loads of the two passes alone would give; 1 is chance, pairs seen rarely are near 1."""
        count_EE = self.coactivation_EE.astype(np.float64)
        even_EE = np.outer(count_EE.sum(1), count_EE.sum(0)) / max(count_EE.sum(), 1)
        # One pair more each way draws what rests on few pairs towards 1.
        return (count_EE + 1) / (even_EE + 1)


def passes_of_layers(trace: RoutingTrace) -> list[list[TraceLayer]]:
    """The layers of ``trace`` that are passes of one layer of the model, in order; layers of a single pass are left out."""
    found: dict[tuple[str, int], list[TraceLayer]] = {}
    for layer in trace.layers:
        found.setdefault((layer.pool, layer.own_start), []).append(layer)
    return [passes for passes in found.values() if len(passes) > 1]


def between_passes(trace: RoutingTrace) -> list[PassFacts]:
    """Consecutive passes of every layer that routes several times, in the order of the layers."""
    return [_facts(trace, *pair) for passes in passes_of_layers(trace) for pair in itertools.pairwise(passes)]


def _facts(trace: RoutingTrace, first: TraceLayer, second: TraceLayer) -> PassFacts:
    before_NK, after_NK = aligned(trace.decisions(first.layer), trace.decisions(second.layer))
    chosen_NX = np.concatenate([np.sort(before_NK, axis=1), np.sort(after_NK, axis=1)], axis=1)
    count_EE = coactivation(before_NK, first.num_destinations, after_NK, second.num_destinations)
    return PassFacts(
        first=first.name,
        second=second.name,
        first_layer=first.layer,
        second_layer=second.layer,
        coactivation_EE=count_EE,
        reuse=reuse_rate(after_NK, before_NK),
        chance=chance_reuse(second.top_k, second.num_destinations),
        combinations_seen=len(np.unique(chosen_NX, axis=0)),
        information_bits=mutual_information(count_EE),
        noise_bits=mutual_information_bias(count_EE),
    )
