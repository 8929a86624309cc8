"""How the passes of a layer that routes several times follow each other, from a trace.

    for facts in between_passes(trace):
        print(facts.first, facts.reuse, "by chance", facts.chance)

Passes of one layer choose from one pool and own the same slots of it; neighbours that share a pool own different ones.
"""
# Shapes: N items, K choices per item, E destinations of a pool, P pairs of destinations that occur, A and B destinations that are asked for

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from anabranch.routing.measure import (
    aligned,
    chance_reuse,
    load_entropy,
    reuse_rate,
)
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import TraceLayer

# Experts up to which a table or a picture has every pair; above it, the pairs or the experts that occur most.
MOST_SHOWN = 256


@dataclass(frozen=True)
class PassFacts:
    """How one pass follows another in a recorded layer.

    Attributes:
        first, second: their names in the trace.
        first_layer, second_layer: their numbers.
        num_first, num_second: destinations of the first pass and of the second.
        pair_P3: int64, (i, j, tokens that chose i in the first and j in the second), those alone that occur, in order.
        reuse: share of the second's choices that were choices of the first (hits of a cache that holds what the pass before used).
        chance: the same where choices are independent, K / E.
        combinations_seen: different pairs of sets of experts that tokens took.
        information_bits: how much a choice of the first tells about one of the second; ``noise_bits`` is what luck would show.
    """

    first: str
    second: str
    first_layer: int
    second_layer: int
    num_first: int
    num_second: int
    pair_P3: np.ndarray
    reuse: float
    chance: float
    combinations_seen: int
    information_bits: float
    noise_bits: float

    @property
    def coactivation_EE(self) -> np.ndarray:
        """int64 ``[E, E]``: tokens that chose i in the first and j in the second. Memory grows with E squared."""
        return self._count(np.arange(self.num_first), np.arange(self.num_second))

    @property
    def lift_EE(self) -> np.ndarray:
        """``[E, E]``: co-activation over what the loads of the two passes alone would give; 1 is chance, pairs seen rarely are near 1."""
        return self.lift_between(np.arange(self.num_first), np.arange(self.num_second))

    def lift_between(self, first_A: np.ndarray, second_B: np.ndarray) -> np.ndarray:
        """``[A, B]``: `lift_EE` of some destinations, ascending, of each pass."""
        before_A, after_B = _at(self._load(0), first_A), _at(self._load(1), second_B)
        return self._lift(self._count(first_A, second_B), np.outer(before_A, after_B))

    def busiest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The destinations of each pass among the ``count`` that the two together choose most, ascending; all where there are no more."""
        most = max(self.num_first, self.num_second)
        if most <= count:
            return np.arange(self.num_first), np.arange(self.num_second)
        number_X = self.pair_P3[:, :2].T.reshape(-1)
        number_A, load_A = _summed(number_X, np.tile(self.pair_P3[:, 2], 2))
        kept_A = np.sort(number_A[np.argsort(-load_A, kind="stable")[:count]])
        return kept_A[kept_A < self.num_first], kept_A[kept_A < self.num_second]

    def to_dict(self) -> dict[str, Any]:
        """The facts by name, with ``coactivation_EE``; above `MOST_SHOWN` destinations ``top_pairs`` in its place, the most frequent first.

        A pair is (i, j, tokens, lift).
        """
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "pair_P3"}
        if max(self.num_first, self.num_second) <= MOST_SHOWN:
            return found | {"coactivation_EE": self.coactivation_EE.tolist()}
        top_P3 = self.pair_P3[np.argsort(-self.pair_P3[:, 2], kind="stable")[:MOST_SHOWN]]
        even_P = _at(self._load(0), top_P3[:, 0]) * _at(self._load(1), top_P3[:, 1])
        lift_P = self._lift(top_P3[:, 2], even_P).tolist()
        return found | {"top_pairs": [[*pair, lift] for pair, lift in zip(top_P3.tolist(), lift_P, strict=True)]}

    def _count(self, first_A: np.ndarray, second_B: np.ndarray) -> np.ndarray:
        count_AB = np.zeros((len(first_A), len(second_B)), np.int64)
        before_P, after_P, tokens_P = self.pair_P3.T
        shown_P = np.isin(before_P, first_A) & np.isin(after_P, second_B)
        place_P = np.searchsorted(first_A, before_P[shown_P]), np.searchsorted(second_B, after_P[shown_P])
        count_AB[place_P] = tokens_P[shown_P]
        return count_AB

    def _load(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """(destinations of the first pass or the second that were chosen, how often each was, in pairs)."""
        return _summed(self.pair_P3[:, place], self.pair_P3[:, 2])

    def _lift(self, count: np.ndarray, loads: np.ndarray) -> np.ndarray:
        """Of counts of pairs and the products of the two loads."""
        even = loads / max(int(self.pair_P3[:, 2].sum()), 1)
        # One pair more each way draws what rests on few pairs towards 1.
        return (count + 1) / (even + 1)


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
    pair_P3 = _pairs(before_NK, after_NK, second.num_destinations)
    load_A, load_B = (_summed(pair_P3[:, place], pair_P3[:, 2])[1] for place in (0, 1))
    information_bits, noise_bits = _information(pair_P3[:, 2], load_A, load_B)
    return PassFacts(
        first=first.name,
        second=second.name,
        first_layer=first.layer,
        second_layer=second.layer,
        num_first=first.num_destinations,
        num_second=second.num_destinations,
        pair_P3=pair_P3,
        reuse=reuse_rate(after_NK, before_NK),
        chance=chance_reuse(second.top_k, second.num_destinations),
        combinations_seen=len(np.unique(chosen_NX, axis=0)),
        information_bits=information_bits,
        noise_bits=noise_bits,
    )


def _pairs(before_NK: np.ndarray, after_NK: np.ndarray, width: int) -> np.ndarray:
    """`PassFacts.pair_P3` of choices, of which those of ``after_NK`` are below ``width``. Memory is that of the choices and the pairs."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for before_N in before_NK.T.astype(np.int64):
        used_NK = (before_N >= 0)[:, None] & (after_NK >= 0)
        found.append(np.unique((before_N[:, None] * width + after_NK)[used_NK], return_counts=True))
    number_P, tokens_P = _summed(*(np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True)))
    return np.stack([number_P // width, number_P % width, tokens_P], axis=1)


def _summed(number_X: np.ndarray, count_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the different numbers, ascending; the sum of the counts of each)."""
    number_A, place_X = np.unique(number_X, return_inverse=True)
    sum_A = np.zeros(len(number_A), np.int64)
    np.add.at(sum_A, place_X, count_X)
    return number_A, sum_A


def _at(known: tuple[np.ndarray, np.ndarray], asked_A: np.ndarray) -> np.ndarray:
    """float64 ``[A]``: the sums of `_summed` at numbers that are asked for; 0 where there is none."""
    number_X, sum_X = known
    if not len(number_X):
        return np.zeros(len(asked_A))
    place_A = np.minimum(np.searchsorted(number_X, asked_A), len(number_X) - 1)
    return np.where(number_X[place_A] == asked_A, sum_X[place_A], 0).astype(np.float64)


def _information(tokens_P: np.ndarray, load_A: np.ndarray, load_B: np.ndarray) -> tuple[float, float]:
    """`measure.mutual_information` and `measure.mutual_information_bias` of the pairs that occur; nan where there are none."""
    if not len(tokens_P):
        return float("nan"), float("nan")
    bits = float(load_entropy(load_A) + load_entropy(load_B) - load_entropy(tokens_P))
    noise = (len(load_A) - 1) * (len(load_B) - 1) / (2 * int(tokens_P.sum()) * np.log(2))
    return max(0.0, bits), float(noise)
