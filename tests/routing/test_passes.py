"""Passes of one layer in a trace: which layers they are, and how one follows another."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.experts import chain
from anabranch.routing import TraceBuilder, TraceLayer, measure, passes
from anabranch.routing.passes import PassFacts, between_passes, passes_of_layers


def traced(*layers, num_items=3, num_destinations=4):
    """A trace of layers (pool, own_start), where every item goes to expert 0."""
    builder = TraceBuilder()
    for number, (pool, own_start) in enumerate(layers):
        layer = TraceLayer(
            layer=number, name=f"r{number}", num_destinations=num_destinations, top_k=1, pool=pool, own_start=own_start
        )
        builder.add(layer, [[0]] * num_items, [[1.0]] * num_items, item_N=range(num_items))
    return builder.trace()


@pytest.mark.parametrize(
    ("layers", "passes"),
    [
        ([("", 0), ("", 0)], []),  # each its own pool
        ([("group", 0), ("group", 2)], []),  # neighbours that share a pool
        ([("layer_0", 0), ("layer_0", 0), ("layer_1", 0), ("layer_1", 0)], [[0, 1], [2, 3]]),
        ([("group", 0), ("group", 0), ("group", 2), ("group", 2)], [[0, 1], [2, 3]]),
        ([("", 0), ("layer_1", 0), ("layer_1", 0), ("layer_1", 0)], [[1, 2, 3]]),
    ],
)
def test_passes_are_known_by_the_slots_that_they_own(layers, passes):
    trace = traced(*layers)
    assert [[layer.layer for layer in found] for found in passes_of_layers(trace)] == passes
    pairs = [(first, second) for found in passes for first, second in itertools.pairwise(found)]
    assert [(facts.first_layer, facts.second_layer) for facts in between_passes(trace)] == pairs


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 9))
def test_facts_equal_loops(top_k, other_k, num_items, seed):
    generator, num_destinations = np.random.default_rng(seed), 4
    chosen = [
        np.stack([generator.permutation(num_destinations)[:count] for _ in range(num_items)])
        for count in (top_k, other_k)
    ]
    builder = TraceBuilder()
    for number, index_NK in enumerate(chosen):
        layer = TraceLayer(
            layer=number, name=f"pass{number}", num_destinations=num_destinations, top_k=index_NK.shape[1], pool="p"
        )
        builder.add(layer, index_NK, np.ones(index_NK.shape), item_N=np.arange(num_items))
    (facts,) = between_passes(builder.trace())
    count_EE = np.zeros((num_destinations, num_destinations), int)
    for before_K, after_K in zip(*chosen, strict=True):
        for i in before_K:
            for j in after_K:
                count_EE[i, j] += 1
    assert np.array_equal(facts.coactivation_EE, count_EE)
    assert facts.to_dict()["coactivation_EE"] == count_EE.tolist()
    even_EE = np.outer(count_EE.sum(1), count_EE.sum(0)) / count_EE.sum()
    assert facts.lift_EE == pytest.approx((count_EE + 1) / (even_EE + 1))
    assert facts.information_bits == pytest.approx(measure.mutual_information(count_EE), abs=1e-12)
    assert facts.noise_bits == pytest.approx(measure.mutual_information_bias(count_EE))
    again = [len(set(before) & set(after)) for before, after in zip(*chosen, strict=True)]
    assert facts.reuse == pytest.approx(sum(again) / chosen[1].size)
    assert facts.chance == other_k / num_destinations
    pairs = {
        (frozenset(before), frozenset(after)) for before, after in zip(*map(np.ndarray.tolist, chosen), strict=True)
    }
    assert facts.combinations_seen == len(pairs)


def test_memory_and_facts_follow_the_rows_and_not_the_experts():
    """Two passes over 2^16 experts: a table of all pairs would have 32 GB."""
    experts = 2**16
    builder = TraceBuilder()
    for number, index in ((0, [[7], [7], [65535], [-1]]), (1, [[9], [9], [0], [9]])):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=experts, top_k=1, pool="p")
        builder.add(layer, index, [[1.0]] * 4, item_N=range(4))
    trace = builder.trace()
    tracemalloc.start()
    (facts,) = between_passes(trace)
    found = facts.to_dict()
    shown = facts.lift_between(*facts.busiest(3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * experts
    assert facts.pair_P3.tolist() == [[7, 9, 2], [65535, 0, 1]]
    assert found["top_pairs"] == [[7, 9, 2, 3 / (4 / 3 + 1)], [65535, 0, 1, 2 / (1 / 3 + 1)]]
    assert "coactivation_EE" not in found
    assert len(json.dumps(found)) < 1000
    assert [ids.tolist() for ids in facts.busiest(3)] == [[0, 7, 9], [0, 7, 9]]
    # From 7 to 9; all else among them was not seen, and is at chance or, where both are chosen, below.
    assert shown == pytest.approx(np.array([[1, 1, 1], [1 / (2 / 3 + 1), 1, 3 / (4 / 3 + 1)], [1, 1, 1]]))


@pytest.mark.parametrize("num_destinations", [256, 257])
def test_a_layer_without_a_pair_has_no_information(num_destinations):
    builder = TraceBuilder()
    for number in range(2):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=num_destinations, top_k=1, pool="p")
        builder.add(layer, [[0]], [[1.0]], item_N=[number])
    (facts,) = between_passes(builder.trace())
    assert np.isnan([facts.information_bits, facts.noise_bits]).all()
    assert not facts.coactivation_EE.any()
    assert facts.to_dict().get("top_pairs", []) == []


def test_lift_and_information_by_hand():
    """Two tokens in three go from 0 to 1, the third from 2 to 3: what the first pass chose says all about the next."""
    builder = TraceBuilder()
    for number, index in ((0, [[0], [0], [2]]), (1, [[1], [1], [3]])):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=4, top_k=1, pool="p")
        builder.add(layer, index, [[1.0]] * 3, item_N=[0, 1, 2])
    (facts,) = between_passes(builder.trace())
    assert facts.reuse == 0
    assert facts.combinations_seen == 2
    assert facts.information_bits == pytest.approx(np.log2(3) - 2 / 3)  # the entropy of (2/3, 1/3)
    assert facts.lift_EE[0, 1] == pytest.approx((2 + 1) / (4 / 3 + 1))
    assert facts.lift_EE[0, 3] == pytest.approx(1 / (2 / 3 + 1))
    assert facts.lift_EE[1, 1] == 1


def test_independent_choices_have_no_information_and_never_less():
    """Of (1/4, 3/4) and (1/4, 3/4): the entropies, rounded, leave a little below zero."""
    first, second = zip(
        *[(i, j) for i, j in itertools.product(range(2), range(2)) for _ in range(3**i * 3**j)], strict=True
    )
    builder = TraceBuilder()
    for number, index in enumerate((first, second)):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=2, top_k=1, pool="p")
        builder.add(layer, [[one] for one in index], [[1.0]] * 16, item_N=range(16))
    (facts,) = between_passes(builder.trace())
    bits = measure.load_entropy([4, 12]) * 2 - measure.load_entropy([1, 3, 3, 9])
    assert bits < 0
    assert facts.information_bits == 0


def test_the_module_of_chain_warns_where_they_are_now():
    for name in ("between_passes", "PassFacts"):
        with pytest.warns(
            DeprecationWarning, match=rf"^{name} of anabranch.experts.chain is in anabranch.routing.passes"
        ):
            assert getattr(chain, name) is getattr(passes, name)
    with pytest.raises(AttributeError, match=r"module 'anabranch\.experts\.chain' has no attribute 'between_layers'"):
        chain.between_layers  # noqa: B018


def test_passes_that_chose_nothing_are_at_chance():
    facts = PassFacts(
        first="a",
        second="b",
        first_layer=0,
        second_layer=1,
        num_first=3,
        num_second=3,
        pair_P3=np.zeros((0, 3), np.int64),
        reuse=0.0,
        chance=0.0,
        combinations_seen=0,
        information_bits=0.0,
        noise_bits=0.0,
    )
    assert facts.lift_EE.tolist() == [[1.0] * 3] * 3
