"""Windows and caches that are asked for: the same numbers as the measures themselves give."""

import logging

import numpy as np
import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.report.windows import window_facts
from anabranch.routing import TraceBuilder, TraceLayer, consistency
from anabranch.routing.srp_statistics import domain_correlation, srp_interval


def trace_of(index_STLK, num_destinations, domain=None):
    builder = TraceBuilder()
    sequences, tokens, layers, places = index_STLK.shape
    for layer in range(layers):
        builder.add(
            TraceLayer(layer=layer, name=f"layer {layer}", num_destinations=num_destinations, top_k=places),
            index_STLK[:, :, layer].reshape(-1, places),
            np.full((sequences * tokens, places), 1 / places, np.float32),
            item_N=np.repeat(np.arange(sequences), tokens),
            position_N=np.tile(np.arange(tokens), sequences),
            domain=domain,
        )
    return builder.trace()


@pytest.fixture(scope="module")
def index_STLK():
    draw = np.random.default_rng(0)
    return draw.random((6, 40, 2, 8)).argsort(-1)[..., :2]


def test_numbers_are_those_of_the_measures(index_STLK):
    trace = trace_of(index_STLK, 8)
    four, sixteen = window_facts(trace, [4, 16], [1, 2.5])
    for facts, window in ((four, 4), (sixteen, 16)):
        assert facts.window == window
        assert facts.srp == pytest.approx(consistency.srp(trace, window, "model").value)
        assert list(facts.srp_by_layer.values()) == pytest.approx(consistency.srp(trace, window).value.tolist())
        for policy in ("lru", "lfu", "belady", "fixed", "segment", "plec"):
            of = consistency.hit_rates(
                trace, policy, window=window if policy in ("segment", "plec") else None, cold="miss"
            )
            expected = [of.at_ratio(ratio).mean() for ratio in (1, 2.5)]
            assert facts.hits[policy] == pytest.approx(expected), policy
            free = consistency.hit_rates(trace, policy, window=window if policy in ("segment", "plec") else None)
            assert facts.hits_free[policy] == pytest.approx([free.at_ratio(ratio).mean() for ratio in (1, 2.5)]), policy
        assert facts.srp_interval == pytest.approx(srp_interval(trace, window, "model"))
        assert np.array(list(facts.srp_interval_by_layer.values())) == pytest.approx(srp_interval(trace, window))
        assert facts.domains == facts.domain_correlation == []
        ratios = np.arange(1, 4.01, 0.25)
        sch = np.array([consistency.sch(trace, window, cold="miss").at_ratio(ratio).mean() for ratio in ratios])
        best = np.array([consistency.hit_rates(trace, "belady", cold="miss").at_ratio(r).mean() for r in ratios])
        assert facts.near_belady == ratios[np.argmax(sch >= 0.9 * best)]
        lru = consistency.hit_rates(trace, "lru", cold="miss")
        assert facts.lru_there == pytest.approx(lru.at_ratio(facts.near_belady).mean())
        sch = np.array([consistency.sch(trace, window).at_ratio(ratio).mean() for ratio in ratios])
        best = np.array([consistency.hit_rates(trace, "belady").at_ratio(r).mean() for r in ratios])
        assert facts.near_belady_free == ratios[np.argmax(sch >= 0.9 * best)]


def test_windows_that_are_too_long_are_left_out_with_a_warning(index_STLK, caplog):
    with caplog.at_level(logging.WARNING, "anabranch"):
        (facts,) = window_facts(trace_of(index_STLK, 8), [41, 8], [1])
    assert facts.window == 8
    assert caplog.messages == ["a window of 41 tokens is left out: the longest sequence has 40"]


def test_domains_are_correlated_where_there_are_several(index_STLK):
    trace = trace_of(index_STLK, 8, domain=np.repeat(np.array(["a", "b", "a", "b", "c", "c"], object), 40).tolist())
    (facts,) = window_facts(trace, [8], [1])
    names, correlation_MM = domain_correlation(trace, 8)
    assert facts.domains == names == ["a", "b", "c"]
    assert np.array(facts.domain_correlation) == pytest.approx(correlation_MM)


@pytest.mark.parametrize(
    ("windows", "caches", "error", "message"),
    [
        ([41], [2], DataError, "a window is 41 tokens, but the longest sequence has 40; ask for 1 to 40"),
        ([0], [2], ConfigError, "a window is 0 tokens; it must be above 0"),
        ([4], [-1.0], ConfigError, r"a cache is -1\.0 times the active experts; it must be above 0"),
        ([4], [float("nan")], ConfigError, "a cache is nan times the active experts; it must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(index_STLK, windows, caches, error, message):
    with pytest.raises(error, match=message):
        window_facts(trace_of(index_STLK, 8), windows, caches)


def test_layers_without_a_choice_have_no_consistency(index_STLK):
    with pytest.raises(DataError, match="no layer of the trace has a choice"):
        window_facts(trace_of(index_STLK % 2 * 0 + np.arange(2), 2), [4], [1])


def test_a_window_may_be_as_long_as_the_longest_sequence(index_STLK):
    (facts,) = window_facts(trace_of(index_STLK, 8), [40], [1])
    assert facts.window == 40
    assert 0 < facts.srp < 1


def test_layers_that_routed_other_sequences(index_STLK, caplog):
    """A window must fit into a sequence of each layer; and no sequences can be drawn for all of them, so the model has no interval."""
    builder = TraceBuilder()
    for number, (sequences, tokens) in enumerate(((6, 40), (4, 20))):
        builder.add(
            TraceLayer(layer=number, name=f"layer {number}", num_destinations=8, top_k=2),
            index_STLK[:sequences, :tokens, number].reshape(-1, 2),
            np.full((sequences * tokens, 2), 0.5, np.float32),
            item_N=np.repeat(np.arange(sequences), tokens),
            position_N=np.tile(np.arange(tokens), sequences),
        )
    trace = builder.trace()
    with caplog.at_level(logging.WARNING, "anabranch"):
        (facts,) = window_facts(trace, [30, 4], [1])
    assert facts.window == 4
    assert caplog.messages == ["a window of 30 tokens is left out: the longest sequence has 20"]
    assert facts.srp_interval is None
    assert all(interval is not None for interval in facts.srp_interval_by_layer.values())
