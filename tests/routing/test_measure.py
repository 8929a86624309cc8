"""Measures: worked by hand, equal to naive loops, bounded, and equal to what was measured on real models."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anabranch.errors import ConfigError
from anabranch.routing import measure
from anabranch.routing.trace import Decisions
from anabranch.routing.trace_builder import TraceBuilder
from anabranch.routing.trace_schema import TraceLayer
from real_data import needs_data, real_data


def test_balance_of_a_case_worked_by_hand():
    load_LE = [[4, 4, 4, 4], [10, 5, 1, 0], [16, 0, 0, 0]]  # mean 4 each
    assert measure.max_violation(load_LE).tolist() == [0.0, 1.5, 3.0]
    assert measure.load_violation(load_LE)[1].tolist() == [1.5, 0.25, -0.75, -1.0]
    assert measure.idle_fraction(load_LE).tolist() == [0.0, 0.25, 0.75]  # below 0.4
    assert measure.idle_fraction(load_LE, threshold=0.25).tolist() == [0.0, 0.25, 0.75]  # 1 is not below 1
    assert measure.load_entropy(load_LE)[[0, 2]].tolist() == [2.0, 0.0]
    # 10/16 log2(16/10) + 5/16 log2(16/5) + 1/16 log2 16 = 0.4238 + 0.5244 + 0.25
    assert measure.load_entropy(load_LE)[1] == pytest.approx(1.1982, abs=1e-4)
    assert measure.effective_destinations(load_LE)[[0, 2]].tolist() == [4.0, 1.0]
    # (36 + 1 + 9 + 16) / 4 = 15.5; sqrt(15.5) / 4
    assert measure.coefficient_of_variation(load_LE)[1] == pytest.approx(15.5**0.5 / 4)


@pytest.mark.parametrize(
    "name", ["max_violation", "idle_fraction", "load_entropy", "effective_destinations", "coefficient_of_variation"]
)
def test_balance_of_nothing_and_of_one(name):
    function = getattr(measure, name)
    assert np.isnan(function([0, 0, 0]))
    assert function([7]) == (1 if name == "effective_destinations" else 0)
    assert function(torch.tensor([[1, 2], [3, 4]])).shape == (2,)
    assert function(np.zeros((0, 3))).shape == (0,)


loads = arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 6)), elements=st.integers(0, 1000))


@given(loads)
def test_balance_is_bounded_and_blind_to_order_and_scale(load):
    kept = load[load.sum(1) > 0]
    num_destinations = load.shape[1]
    bounds = {
        measure.max_violation: (0, num_destinations - 1),
        measure.idle_fraction: (0, 1 - 1 / num_destinations),
        measure.load_entropy: (0, np.log2(num_destinations)),
        measure.coefficient_of_variation: (0, np.sqrt(num_destinations - 1)),
    }
    for function, (low, high) in bounds.items():
        value = function(kept)
        assert ((value >= low - 1e-9) & (value <= high + 1e-9)).all()
        np.testing.assert_allclose(function(kept[:, ::-1]), value, atol=1e-9)
        np.testing.assert_allclose(function(kept * 8), value, atol=1e-9)
    np.testing.assert_allclose(measure.load_violation(kept).sum(1), 0, atol=1e-9)


indices = st.tuples(st.integers(0, 8), st.integers(1, 3)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(-1, 3))
)


@given(indices)
def test_coactivation_equals_loops(index_NK):
    expected = np.zeros((4, 4), np.int64)
    for row in index_NK.tolist():
        for i in row:
            for j in row:
                if i >= 0 and j >= 0:
                    expected[i, j] += 1
    assert np.array_equal(measure.coactivation(index_NK, 4), expected)


def test_coactivation_between_layers():
    # item 0: {0, 1} then {2}; item 1: {1} then {2}; item 2: {0} then nothing
    count = measure.coactivation([[0, 1], [1, -1], [0, -1]], 2, [[2], [2], [-1]], 3)
    assert count.tolist() == [[0, 0, 1], [0, 0, 2]]
    with pytest.raises(ConfigError, match="of 1 and 2 items cannot be paired"):
        measure.coactivation([[0]], 2, [[0], [1]], 2)


def test_coactivation_lift():
    every_pair = measure.coactivation([[i, j] for i in range(4) for j in range(4) if i != j], 4)
    lift = measure.coactivation_lift(every_pair)
    assert np.isnan(np.diagonal(lift)).all()
    assert (lift[~np.eye(4, dtype=bool)] == 1).all()  # even choice of pairs is chance, whatever K
    twins = measure.coactivation_lift(measure.coactivation([[0, 1], [2, 3]] * 3, 4))
    assert twins[0, 1] == twins[2, 3] == 3.0  # one partner out of three
    assert twins[0, 2] == 0.0
    # Six pairs seen once either way, chance is 1 each: (3 + 3) / (1 + 3) and (0 + 3) / (1 + 3).
    drawn = measure.coactivation_lift(measure.coactivation([[0, 1], [2, 3]] * 3, 4), prior=3.0)
    assert (drawn[0, 1], drawn[0, 2]) == (1.5, 0.75)
    assert np.isnan(measure.coactivation_lift(measure.coactivation([[0], [1]], 2))).all()  # top-1 has no pairs


def decisions(index_NK, item_N=None, position_N=None):
    index_NK = np.asarray(index_NK, np.int32)
    num = len(index_NK)
    return Decisions(
        index_NK,
        np.where(index_NK < 0, 0, 1).astype(np.float32),
        np.zeros(num, np.int64) if item_N is None else np.asarray(item_N, np.int64),
        np.arange(num, dtype=np.int32) if position_N is None else np.asarray(position_N, np.int32),
        np.full(num, -1, np.int32),
        np.full(num, -1, np.int32),
    )


def test_alignment_of_layers_that_route_different_items():
    first = decisions([[0], [1], [2]], item_N=[5, 5, 6], position_N=[0, 1, 0])
    second = decisions([[7], [8]], item_N=[6, 5], position_N=[0, 1])
    index, other = measure.aligned(first, second)
    assert index.tolist() == [[1], [2]]
    assert other.tolist() == [[8], [7]]
    same = decisions([[3], [4], [5]], item_N=[5, 5, 6], position_N=[0, 1, 0])
    assert measure.aligned(first, same)[1].tolist() == [[3], [4], [5]]


def test_reuse_worked_by_hand():
    # Item 0, positions 0..3, stored out of order; item 1 begins anew. Of 2: {0,1} -> {1,2}: 1 of 2, -> {2,-}: 1 of 1, -> {0,3}: 0 of 2.
    case = decisions([[1, 2], [0, 1], [2, -1], [0, 3], [0, 3]], item_N=[0, 0, 0, 0, 1], position_N=[1, 0, 2, 3, 0])
    assert measure.consecutive_reuse(case) == pytest.approx(2 / 5)
    assert measure.reuse_rate([[0, 1], [-1, 2]], [[1, 5], [3, 4]]) == pytest.approx(1 / 3)
    # Whole segments of 2: positions 0-1 use {0,1,1,2}: 3 distinct of 4; 2-3 use {2,0,3}: 3 of 3; item 1 has only half a segment.
    assert measure.segment_reuse(case, 2) == pytest.approx(1 - 6 / 7)
    assert np.isnan(measure.segment_reuse(case, 5))
    assert np.isnan(measure.consecutive_reuse(decisions([[0, 1]])))
    assert np.isnan(measure.reuse_rate(np.empty((0, 2)), np.empty((0, 2))))
    with pytest.raises(ConfigError, match="length is 0; it must be at least 1"):
        measure.segment_reuse(case, 0)


def test_reuse_of_random_choices_is_chance():
    generator = np.random.default_rng(0)
    case = decisions(np.argsort(generator.random((20_000, 16)), axis=1)[:, :4])
    assert measure.consecutive_reuse(case) == pytest.approx(measure.chance_reuse(4, 16), abs=0.01)
    assert measure.segment_reuse(case, 8) == pytest.approx(measure.chance_reuse(4, 16, 8, segment=True), abs=0.01)
    assert measure.chance_reuse(4, 16) == 0.25
    assert measure.chance_reuse(4, 16, 1, segment=True) == 0.0


def test_routing_entropy():
    score_NE = torch.tensor(
        [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    assert measure.routing_entropy(score_NE)[:3].tolist() == [2.0, 0.0, 1.0]
    assert np.isnan(measure.routing_entropy(score_NE)[3])


def test_specialisation_worked_by_hand():
    load_ME = [[10, 0], [0, 10]]  # one destination each: knowing it is knowing the domain, 1 bit
    assert measure.mutual_information(load_ME) == pytest.approx(1.0)
    assert measure.domain_distance(load_ME).tolist() == [0.5, 0.5]
    assert measure.total_variation(load_ME[0], load_ME[1]) == 1.0
    assert measure.mutual_information([[2, 4], [1, 2]]) == pytest.approx(0, abs=1e-12)
    assert measure.domain_distance([[2, 4], [1, 2]]) == pytest.approx([0, 0])
    # Unequal domains: overall is (12, 4) / 16; the first domain (12, 0) is 1/4 away, the second (0, 4) 3/4.
    assert measure.domain_distance([[12, 0], [0, 4]]).tolist() == [0.25, 0.75]
    assert np.isnan(measure.mutual_information([[0, 0]]))


def test_chance_level_of_mutual_information():
    generator = np.random.default_rng(0)
    drawn = [generator.multinomial(500, np.full(16, 1 / 16), size=4) for _ in range(200)]
    mean = np.mean([measure.mutual_information(load) for load in drawn])
    assert mean == pytest.approx(measure.mutual_information_bias(drawn[0]), rel=0.05)
    assert measure.mutual_information_bias([[1, 0], [3, 0]]) == 0
    assert measure.mutual_information_bias([[1, 3], [0, 0]]) == 0
    assert measure.mutual_information_bias([[1, 2], [3, 2]]) == pytest.approx(1 / (2 * 8 * np.log(2)))


def test_no_entropy_is_zero_and_not_minus_zero():
    assert [str(float(value)) for value in (measure.load_entropy([5, 0]), measure.load_entropy([0, 1, 0]))] == [
        "0.0"
    ] * 2


def test_vocabulary_specialisation():
    # Id 5 goes to 0 always, id 6 to 0 in one of two; id 7 is rare, -1 unknown.
    token_N = [5, 5, 6, 6, 7, -1]
    index_NK = [[0, 1], [0, 2], [0, -1], [1, 2], [2, 1], [2, 1]]
    found = measure.vocabulary_specialization(token_N, index_NK, 4, min_count=2, top=1)
    assert found.tolist() == [1.0, 0.5, 0.5, 0.0]
    both = measure.vocabulary_specialization(token_N, index_NK, 4, min_count=2, top=9)
    assert both.tolist() == [0.75, 0.5, 0.5, 0.0]
    assert np.isnan(measure.vocabulary_specialization(token_N, index_NK, 4)).all()


def pooled_trace():
    builder = TraceBuilder()
    for number, index_NK in enumerate([[[0, 1], [0, 2]], [[3, 0], [3, 1]]]):
        layer = TraceLayer(
            layer=number, name=f"r{number}", num_destinations=4, top_k=2, pool="group0", own_start=2 * number
        )
        for n, domain in enumerate(["code", "books"]):
            builder.add(layer, index_NK[n : n + 1], [[0.5, 0.5]], item_N=[n], domain=domain)
    return builder.trace()


def test_pool_and_domain_loads_of_a_trace():
    trace = pooled_trace()
    assert measure.pool_load(trace, "group0").tolist() == [3, 2, 1, 2]
    assert measure.domain_load(trace, 0).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]  # books, code
    assert measure.max_violation(measure.pool_load(trace, "group0")) == 0.5
    assert measure.foreign_share(trace, 0) == 0.25  # layer 0 owns slots 0 and 1
    assert measure.foreign_share(trace, 1) == 0.5
    with pytest.raises(ConfigError, match="no pool 'x'; it has group0"):
        measure.pool_load(trace, "x")


def test_drop_ratio():
    assert measure.drop_ratio([[0, -1], [-1, -1]]) == 0.75
    assert np.isnan(measure.drop_ratio(np.empty((0, 2))))


COUNTS = "moe_routing/expert_counts.npz"


@needs_data(COUNTS)
class TestRealModels:
    """Expert counts of OLMoE-1B-7B and Mixtral-8x7B (allenai/OLMoE) at three depths, about 205,000 tokens a domain."""

    def counts(self, model, domain):
        with np.load(real_data(COUNTS)) as data:
            return data[f"{model}/{domain}/counts"]

    @pytest.mark.parametrize(
        ("domain", "expected"),
        [
            ("c4", [2.0, 1.7, 1.5]),
            ("arxiv", [6.8, 5.3, 6.5]),
            ("github", [4.0, 5.2, 3.5]),
            ("wikipedia", [5.2, 5.8, 3.7]),
        ],
    )
    def test_max_violation(self, domain, expected):
        assert measure.max_violation(self.counts("olmoe_1b_7b", domain)) == pytest.approx(expected, abs=0.051)

    def test_idle_experts_of_the_last_layer_on_code(self):
        assert measure.idle_fraction(self.counts("olmoe_1b_7b", "github"))[2] * 64 == 12

    @pytest.mark.parametrize(
        ("model", "expected"), [("olmoe_1b_7b", [0.29, 0.60, 0.70]), ("mixtral_8x7b", [0.06, 0.07, 0.11])]
    )
    def test_distance_of_code_and_books(self, model, expected):
        distance = measure.total_variation(self.counts(model, "github"), self.counts(model, "book"))
        assert distance == pytest.approx(expected, abs=0.0051)
