"""SRP and SCH: equal to the definitions by brute force, and to values that follow from chance."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention
from anabranch.routing import Router, TopK, TraceBuilder, TraceLayer, measure, record_routing
from anabranch.routing import consistency as lrc
from real_data import needs_data, real_data


def drawn(seed, num_sequences=2, num_tokens=12, num_destinations=6, top_k=2, num_layers=1):
    generator = np.random.default_rng(seed)
    order = generator.random((num_sequences, num_tokens, num_layers, num_destinations)).argsort(-1)
    return order[..., :top_k]


def naive_counts(chosen_STE, lengths, window):
    """The activations of every (expert, window) pair, by counting."""
    pairs = []
    for chosen_TE, length in zip(chosen_STE, lengths, strict=True):
        pairs.extend(chosen_TE[start : start + window].sum(0) for start in range(length - window + 1))
    return np.array(pairs).reshape(-1, chosen_STE.shape[-1])


def naive_srp(pairs, window):
    """The best F1 over every way to switch (expert, window) pairs on and off."""
    pairs = np.asarray(pairs).reshape(-1)
    active, best = pairs.sum(), 0.0
    for on in itertools.product([False, True], repeat=len(pairs)):
        match, switched = pairs[list(on)].sum(), window * sum(on)
        if switched + active:
            best = max(best, 2 * match / (switched + active))
    return best


def one_hot(index_STLK, num_destinations):
    return (index_STLK[..., None] == np.arange(num_destinations)).any(-2)


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30)
def test_the_best_threshold_is_the_best_of_all_segment_routers(seed, window, top_k):
    chosen = one_hot(drawn(seed, 1, window + 2, 3, top_k), 3)
    pairs = naive_counts(chosen[:, :, 0], [window + 2], window)
    assert pairs.size == 9  # 512 routers
    found = lrc.srp(chosen, window)
    assert found.value[0] == pytest.approx(naive_srp(pairs, window))
    by_expert = lrc.srp(chosen, window, "expert")
    assert by_expert.value[0] == pytest.approx([naive_srp(pairs[:, e], window) for e in range(3)])
    # The optimum is a fixed point: a* = ceil(m / 2 SRP) is as good a threshold as the one found.
    on = pairs >= np.ceil(window * found.value[0] / 2 - 1e-9)
    assert 2 * pairs[on].sum() / (window * on.sum() + pairs.sum()) == pytest.approx(found.value[0])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_counts_equal_counting_with_sequences_of_different_lengths(window):
    index, lengths = drawn(0, 4, 9, 5, 2, 3), [9, 4, 1, 7]
    for layer, of in enumerate(lrc.routes(index, num_destinations=5, lengths=lengths)):
        pairs = naive_counts(one_hot(index, 5)[:, :, layer], lengths, window)
        expected = [np.bincount(pairs[:, e], minlength=window + 1).tolist() for e in range(5)]
        assert lrc.window_counts(of, window)[0].tolist() == expected


def test_counts_in_parts(monkeypatch):
    (of,) = lrc.routes(drawn(0, 9, 20))
    whole = lrc.window_counts(of, 4)
    monkeypatch.setattr("anabranch.routing.consistency.CELLS", 240)
    assert np.array_equal(lrc.window_counts(of, 4), whole)


def test_a_case_worked_by_hand():
    # Expert 0 in tokens 0 1 2, expert 1 in token 3; windows of 2: 0: 2 2 1, 1: 0 0 1.
    index = np.array([0, 0, 0, 1]).reshape(1, 4, 1, 1)
    found = lrc.srp(index, 2)
    # at least 2: match 4 of 6, on 4: 8/10; at least 1: match 6, on 8: 12/14
    assert found.value.tolist() == [pytest.approx(12 / 14)]
    assert (found.threshold[0], found.size_ratio[0], found.activation_rate[0]) == (1, pytest.approx(8 / 6), 0.5)
    by_expert = lrc.srp(index, 2, "expert")
    assert by_expert.value[0] == pytest.approx([10 / 11, 2 / 3])


def test_a_constant_route_is_perfectly_consistent_and_nothing_is_zero():
    constant = np.tile(np.array([1, 3]), (2, 30, 1, 1))
    for window in (1, 4, 16):
        found = lrc.srp(constant, window)
        assert (found.value[0], found.size_ratio[0]) == (1.0, 1.0)
    empty = lrc.srp(np.full((1, 8, 1, 2), -1), 4)
    assert (empty.value[0], empty.size_ratio[0]) == (0.0, 0.0)


def test_independent_routes_tend_to_always_on():
    """F1 of always on is 2q / (1 + q): the limit of long windows, and below no router at any."""
    chosen = np.random.default_rng(0).random((40, 512, 1, 8)) < 0.25
    limit = 2 * 0.25 / 1.25
    values = [lrc.srp(chosen, window).value[0] for window in (4, 64, 256)]
    assert values[-1] == pytest.approx(limit, abs=0.01)
    assert values[0] > values[1] > values[2] >= 2 * chosen.mean() / (1 + chosen.mean()) - 1e-3
    assert lrc.srp(chosen, 256).threshold[0] < 64  # all on, but for the rarest windows


def test_a_group_pools_its_windows():
    """The model's SRP is that of all windows together; the mean over layers is another number."""
    index = np.concatenate([drawn(0, 3, 40, 8, 1), np.zeros((3, 40, 1, 1), int)], 2)
    layers = list(lrc.routes(index, num_destinations=8))
    counts = sum(lrc.window_counts(of, 4)[0].sum(0) for of in layers)
    model = lrc.srp(layers, 4, "model").value
    assert model == pytest.approx(lrc.srp_of_counts(counts).value)
    assert abs(model - lrc.srp(layers, 4).value.mean()) > 0.002


def test_split_by_position_and_domain():
    trace = recorded(drawn(1, 4, 10, 4, 2), domains=["b", "a", "b", None])
    by_position = lrc.srp(trace, 3, by="position").value
    assert by_position.shape == (8, 1)
    (of,) = lrc.routes(trace)
    assert lrc.window_counts(of, 3, by="position").sum(0).tolist() == lrc.window_counts(of, 3)[0].tolist()
    alone = lrc.srp(recorded(drawn(1, 4, 10, 4, 2)[[1]]), 3).value
    assert lrc.srp(trace, 3, by="domain").value[0] == pytest.approx(alone)  # "a"
    assert lrc.srp(trace, 3, by="domain").value.shape == (2, 1)
    assert lrc.srp(trace, 3, "expert", by="domain").value.shape == (2, 1, 4)


def recorded(index_STLK, domains=None, shuffle=False, tokens=None):
    """A trace of these choices, E one more than the largest."""
    builder = TraceBuilder()
    num_sequences, num_tokens, num_layers, top_k = index_STLK.shape
    for number in range(num_layers):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=int(index_STLK.max()) + 1, top_k=top_k)
        order = list(np.ndindex(num_sequences, num_tokens))
        if shuffle:
            np.random.default_rng(0).shuffle(order)
        for s, t in order:
            builder.add(
                layer,
                index_STLK[s, t, number][None],
                np.ones((1, top_k)),
                item_N=[s],
                position_N=[t],
                domain=None if domains is None else domains[s],
            )
    return builder.trace()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_trace_an_array_and_a_mask_say_the_same(shuffle):
    index = drawn(3, 3, 11, 5, 2, 2)
    index[0, 0, 0, 0] = 4  # so that the largest index occurs
    index[0, 0, 0, 1] = 1
    found = [lrc.srp(source, 4).value for source in (index, one_hot(index, 5), recorded(index, shuffle=shuffle))]
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])
    rates = [lrc.sch(source, 4).rates[1] for source in (index, recorded(index, shuffle=shuffle))]
    assert rates[0] == pytest.approx(rates[1])


def test_long_sequences_are_cut():
    index = drawn(0, 1, 25, 4, 1)
    lengths = [of.length_S.tolist() for of in lrc.routes(index, length=10)]
    assert lengths == [[10, 10, 5]]
    traced = [of.length_S.tolist() for of in lrc.routes(recorded(index), length=10)]
    assert traced == lengths
    (cut,) = lrc.routes(index, length=10)
    (from_trace,) = lrc.routes(recorded(index), length=10)
    assert np.array_equal(cut.index_STK, from_trace.index_STK)
    assert [of.length_S.tolist() for of in lrc.routes(index, length=None)] == [[25]]


def test_windows_longer_than_all_sequences_warn(caplog):
    with caplog.at_level(logging.WARNING, logger="anabranch"):
        found = lrc.srp(drawn(0, 2, 8), 16)
    assert found.value.tolist() == [0.0]
    assert "no sequence has 16 tokens" in caplog.text
    assert lrc.srp(drawn(0, 2, 8), 16, by="position").value.shape == (1, 1)


# -- SCH


def test_sch_reads_capacities_as_multiples_of_k():
    found = lrc.sch(drawn(0, 3, 30, 8, 2, 2), 4)
    assert found.top_k == [2, 2]
    assert found.at_ratio(2.0) == pytest.approx([rate_C[3] for rate_C in found.rates])
    assert found.at_ratio(1.5) == pytest.approx([rate_C[2] for rate_C in found.rates])
    assert found.at_ratio(99.0).tolist() == [1.0, 1.0]
    low, high = found.interval(2.0).T
    assert (low <= found.at_ratio(2.0)).all()
    assert (found.at_ratio(2.0) <= high).all()


def test_the_bootstrap_turns_its_quantiles_around():
    hits = lrc.Hits(np.array([[1], [3], [9]]), np.array([10, 10, 10]))
    rates = lrc.HitRates([hits], [1])
    generator = np.random.default_rng(0)
    drawn_rates = np.array([1, 3, 9])[generator.integers(3, size=(1000, 3))].mean(1) / 10
    low, high = rates.interval(1.0)[0]
    assert low == pytest.approx(2 * 13 / 30 - np.quantile(drawn_rates, 0.975))
    assert high == pytest.approx(2 * 13 / 30 - np.quantile(drawn_rates, 0.025))


def test_the_cache_of_a_whole_model_has_keys_of_its_own_for_each_layer():
    index = drawn(0, 2, 20, 4, 1, 2)
    joined = np.stack([index[:, :, 0, 0], index[:, :, 1, 0] + 4], -1)[:, :, None]
    of_model = lrc.sch(list(lrc.routes(index, num_destinations=4)), 4, level="model")
    assert of_model.rates[0] == pytest.approx(lrc.sch(list(lrc.routes(joined, num_destinations=8)), 4).rates[0])
    assert of_model.top_k == [2]
    first, second = lrc.routes(index, num_destinations=4)
    short = next(lrc.routes(index[:1], num_destinations=4))
    with pytest.raises(DataError, match="layers routed different sequences"):
        lrc.sch([first, short], 4, level="model")
    shorter = dataclasses.replace(second, length_S=second.length_S - [0, 1])  # of the same shape
    with pytest.raises(DataError, match="layers routed different sequences"):
        lrc.sch([first, shorter], 4, level="model")
    assert second.layer == 1


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady", "segment", "plec"])
def test_layers_that_share_a_pool_share_what_is_held(policy):
    """Two layers that pick one slot: the second always finds what the first has loaded, of one pool."""
    window = 4 if policy in ("segment", "plec") else None
    slots = np.repeat(drawn(0, 2, 60, 11, 1), 2, axis=2)
    of_pool = lrc.hit_rates(lrc.routes(slots, pools=["a", "a"]), policy, window=window, level="model", cold="miss")
    assert of_pool.hits[0].hits_SC.shape[1] == 11
    assert of_pool.rates[0][0] >= 0.5
    alone = lrc.hit_rates(slots[:, :, :1], policy, window=window, cold="miss")
    assert of_pool.hits[0].hits_SC[:, 0].tolist() == (60 + alone.hits[0].hits_SC[:, 0]).tolist()
    apart = lrc.hit_rates(lrc.routes(slots), policy, window=window, level="model", cold="miss")
    assert apart.hits[0].hits_SC.shape[1] == 22
    assert apart.rates[0][0] < 0.12  # that of the last layer, where the token before has left it
    with pytest.raises(DataError, match="there are 1 pools for 2 layers"):
        next(lrc.routes(slots, pools=["a"]))


def test_a_trace_of_a_model_tells_which_layers_share_a_pool():
    layer = ReXMoE.Config(num_experts=4, hidden_dim=8, reuse=2, router=Router.Config(select=TopK.Config(top_k=1)))
    attention = SelfAttention.Config(num_heads=2)
    model = Decoder.Config(vocab_size=31, dim=16, num_layers=4, attention=attention, feed_forward=layer).build(seed=0)
    with torch.no_grad(), record_routing(model.eval()) as recorder:
        model(torch.randint(31, (3, 20)))
    trace = recorder.trace()
    pools = [of.pool for of in lrc.routes(trace)]
    assert pools[0] == pools[1] != pools[2] == pools[3]
    found = lrc.sch(trace, 4, level="model", cold="miss")
    index = np.stack([of.index_STK for of in lrc.routes(trace)], 2)
    wanted = lrc.sch(lrc.routes(index, num_destinations=8, pools=[0, 0, 1, 1]), 4, level="model", cold="miss")
    assert found.rates[0].tolist() == wanted.rates[0].tolist()
    assert len(found.rates[0]) == 16  # slots there are, not destinations of layers


def test_a_ratio_needs_a_k():
    index = drawn(0, 2, 20, 6, 2)
    index[0, 3, 0, 1] = -1
    found = lrc.sch(index, 4)
    with pytest.raises(ConfigError, match="varies from token to token; say what a ratio is of with top_k="):
        found.at_ratio(2.0)
    assert found.at_ratio(2.0, top_k=2) == pytest.approx([found.rates[0][3]])
    with pytest.raises(ConfigError, match=r"ratio 0.1 of 2 experts is less than a cache of one; use 0.5 or more"):
        lrc.sch(drawn(0), 4).at_ratio(0.1)


def test_recommended_capacity_and_knee():
    belady = np.array([0.2, 0.5, 0.8, 0.9, 1.0])
    assert lrc.near_belady(np.array([0.19, 0.4, 0.75, 0.9, 1.0]), belady, 2) == 3  # 0.19 is near, but below K
    assert lrc.near_belady(belady, belady, 2) == 2
    assert lrc.near_belady(0.5 * belady, belady, 2) == 5
    assert (
        lrc.near_belady(np.array([0.0, 0.0, 0.5]), np.array([0.0, 0.0, 0.5]), 1) == 3
    )  # a cache that hits nothing is near nothing
    assert lrc.knee(np.array([0.0, 0.7, 0.8, 0.9, 1.0])) == 2
    assert lrc.knee(np.array([0.5, 0.5])) == 1
    assert lrc.recommended_capacity(belady, belady, 2) == 3  # 0.5 0.8 0.9 1.0 bends at 0.8
    assert lrc.recommended_capacity(0.5 * belady, belady, 2) == 5


def test_groups_of_models_by_the_papers_numbers():
    table = {0.541: 1, 0.509: 1, 0.494: 2, 0.453: 2, 0.386: 3, 0.367: 3, 0.307: 4, 0.193: 4}
    assert {value: lrc.consistency_group(value) for value in table} == table


def test_spread_and_variation_worked_by_hand():
    # 4 tokens: expert 0 in all, 1 in none, 2 and 3 in two each (K = 2): rates 1, 0, 1/2, 1/2
    index = np.array([[0, 2], [0, 2], [0, 3], [0, 3]])[None, :, None]
    assert lrc.activation_spread(index) == pytest.approx(100 * np.std([1, 0, 0.5, 0.5]))
    variation = lrc.domain_variation(np.array([[8, 2, 0], [40, 10, 0], [0, 0, 0]]))
    assert variation[:2] == pytest.approx([0, 0])  # a domain with more text is not another domain
    assert np.isnan(variation[2])
    assert lrc.domain_variation(np.array([[4, 0], [0, 4]])) == pytest.approx([1, 1])


def test_domain_experts_are_consistent_ones():
    """Experts 0-3 belong to a domain each and 4-7 are picked at random: the first vary by domain, and are consistent."""
    generator = np.random.default_rng(0)
    index = np.stack([np.repeat(np.arange(4), 64).reshape(4, 64), generator.integers(4, 8, (4, 64))], -1)[:, :, None]
    trace = recorded(index, domains=list("abcd"))
    ((value_E, variation_E),) = lrc.specialization(trace).values()
    assert (value_E[:4] == 1).all()
    assert value_E[4:].max() < 0.6
    assert variation_E[:4].min() > 3 * variation_E[4:].max()
    assert measure.domain_load(trace, 0).sum() == 512


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lrc.srp(np.zeros((2, 3, 1), int), 2), DataError, r"\[sequences, tokens, layers, experts or choices\]"),
        (lambda: lrc.srp(drawn(0), 0), ConfigError, "the window is 0 tokens; it must be at least 1"),
        (lambda: lrc.srp(np.array([[[[0, 1]], [[2, 2]]]]), 1), DataError, "token 1 of sequence 0 names destination 2"),
        (lambda: lrc.srp([], 1), DataError, "no routed layers"),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()


COUNTS = "moe_routing/expert_counts.npz"


@needs_data(COUNTS)
class TestRealModels:
    """OLMoE-1B-7B and Mixtral-8x7B: domain specialisation grows with depth in the first and stays flat in the second."""

    def variation(self, model):
        domains = ["arxiv", "book", "c4", "github", "wikipedia"]
        with np.load(real_data(COUNTS)) as data:
            load_DLE = np.stack([data[f"{model}/{domain}/counts"] for domain in domains])
        return [float(np.nanmean(lrc.domain_variation(load_DLE[:, layer]))) for layer in range(3)]

    def test_olmoe_specialises_with_depth_and_mixtral_hardly(self):
        olmoe, mixtral = self.variation("olmoe_1b_7b"), self.variation("mixtral_8x7b")
        assert olmoe[0] < olmoe[1] < olmoe[2]
        assert min(olmoe) > max(mixtral)
        assert olmoe[2] - olmoe[0] > 5 * (mixtral[2] - mixtral[0])
