"""Intervals and correlations of SRP beside naive loops over sequences, windows and experts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError
from anabranch.routing import TraceBuilder, TraceLayer, consistency
from anabranch.routing.srp_statistics import domain_correlation, sequence_counts, srp_interval


def drawn(seed, sequences=5, tokens=12, layers=2, experts=6, top_k=2):
    draw = np.random.default_rng(seed)
    return draw.random((sequences, tokens, layers, experts)).argsort(-1)[..., :top_k]


def naive_counts(index_TK, experts, window):
    """How many (expert, window) pairs of one sequence have 0, 1, ... activations."""
    count = [0] * (window + 1)
    for start in range(len(index_TK) - window + 1):
        for expert in range(experts):
            count[sum(expert in places for places in index_TK[start : start + window].tolist())] += 1
    return count


def naive_srp(count):
    """F1 of the best threshold."""
    window, best = len(count) - 1, 0.0
    active = sum(times * number for times, number in enumerate(count))
    for least in range(window + 1):
        match = sum(times * count[times] for times in range(least, window + 1))
        on = window * sum(count[least:])
        best = max(best, 2 * match / max(1, on + active))
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_counts_of_sequences_are_those_of_a_naive_loop_and_add_up_to_all(seed, window, lengths):
    (of,) = consistency.routes(drawn(seed, 3, 9, 1), num_destinations=6, lengths=lengths)
    expected = [naive_counts(of.index_STK[at, :length], 6, window) for at, length in enumerate(lengths)]
    found = sequence_counts(of, window)
    assert found.tolist() == expected
    assert found.sum(0).tolist() == consistency.window_counts(of, window)[0].sum(0).tolist()


def test_many_sequences_are_counted_in_parts(monkeypatch):
    (of,) = consistency.routes(drawn(0, 7, 9, 1), num_destinations=6)
    whole = sequence_counts(of, 4)
    monkeypatch.setattr("anabranch.routing.srp_statistics.CELLS", 9 * 6 * 2)
    assert sequence_counts(of, 4).tolist() == whole.tolist()


@pytest.mark.parametrize("window", [2, 4])
def test_intervals_are_those_of_sequences_drawn_one_by_one(window):
    index = drawn(3, 6)
    index[0] = [0, 1]  # one sequence that never changes, so that drawing matters
    layers = list(consistency.routes(index, num_destinations=6))
    counts = [[naive_counts(of.index_STK[at], 6, window) for at in range(6)] for of in layers]
    times = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=200)

    def interval(count_SW):
        count_SW = np.array(count_SW)
        estimate = naive_srp(count_SW.sum(0).tolist())
        values = [naive_srp((weight[:, None] * count_SW).sum(0).tolist()) for weight in times]
        return [2 * estimate - np.quantile(values, 0.975), 2 * estimate - np.quantile(values, 0.025)]

    by_layer = srp_interval(layers, window, resamples=200, seed=5)
    assert by_layer == pytest.approx(np.array([interval(count) for count in counts]))
    of_model = srp_interval(layers, window, "model", resamples=200, seed=5)
    assert of_model == pytest.approx(interval(np.sum(counts, 0)))
    assert of_model[0] <= consistency.srp(layers, window, "model").value <= of_model[1]


def test_draws_are_made_in_parts(monkeypatch):
    index = drawn(1)
    whole = srp_interval(index, 3, resamples=50)
    monkeypatch.setattr("anabranch.routing.srp_statistics.DRAWS", 35)
    assert srp_interval(index, 3, resamples=50) == pytest.approx(whole)


def test_an_interval_covers_the_true_value_about_as_often_as_it_says():
    """Sequences of one of two kinds: the SRP of many is known, and 95% intervals of forty should hold it."""
    index_STLK = np.concatenate([np.broadcast_to([0, 1], (2000, 12, 1, 2)), drawn(0, 2000, layers=1)])
    truth = float(consistency.srp(index_STLK, 4, "model").value)
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        low, high = srp_interval(index_STLK[draw.integers(4000, size=40)], 4, "model", resamples=200)
        hits += low <= truth <= high
    assert 0.85 <= hits / 60 <= 1


def test_there_is_no_interval_of_one_sequence_nor_of_layers_that_saw_others():
    assert np.isnan(srp_interval(drawn(0, 1), 4)).all()
    assert np.isnan(srp_interval(drawn(0), 13)).all()
    first, _ = consistency.routes(drawn(0), num_destinations=6)
    (shorter,) = consistency.routes(drawn(0, 4, layers=1), num_destinations=6)
    with pytest.raises(DataError, match="different sequences"):
        srp_interval([first, shorter], 4, "model")
    with pytest.raises(DataError, match="no routed layers"):
        srp_interval([], 4)


def with_domains(index_STLK, names):
    builder = TraceBuilder()
    sequences, tokens, layers, places = index_STLK.shape
    for layer in range(layers):
        builder.add(
            TraceLayer(layer=layer, name=f"layer {layer}", num_destinations=6, top_k=places),
            index_STLK[:, :, layer].reshape(-1, places),
            np.full((sequences * tokens, places), 0.5),
            item_N=np.repeat(np.arange(sequences), tokens),
            position_N=np.tile(np.arange(tokens), sequences),
            domain=np.repeat(np.array(names, object), tokens).tolist(),
        )
    return builder.trace()


def test_correlation_between_domains_is_that_of_the_srp_of_their_experts():
    index_STLK, names = drawn(4, 6, 20), ["b", "a", "b", None, "a", "c"]
    index_STLK[1:3, :, 0, 0] = 0  # an expert that two domains hold on to
    index_STLK[1:3, :, 0, 1] = 1 + np.arange(20) % 5
    found_names, found_MM = domain_correlation(with_domains(index_STLK, names), 4)
    assert found_names == ["a", "b", "c"]
    srps = {}
    for name in found_names:
        rows = [at for at, other in enumerate(names) if other == name]
        srps[name] = []
        for layer in range(2):
            for expert in range(6):
                count = [0] * 5
                for at in rows:
                    hit = (index_STLK[at, :, layer] == expert).any(-1)
                    for start in range(17):
                        count[int(hit[start : start + 4].sum())] += 1
                srps[name].append(naive_srp(count))
    expected = [[np.corrcoef(srps[one], srps[two])[0, 1] for two in found_names] for one in found_names]
    assert found_MM == pytest.approx(np.array(expected))


def test_a_domain_whose_experts_are_all_alike_has_no_correlation():
    names, found_MM = domain_correlation(with_domains(drawn(0, 2, 8), ["a", "b"]), 9)
    assert names == ["a", "b"]
    assert all(math.isnan(value) for value in found_MM.reshape(-1))
    assert domain_correlation(drawn(0), 4)[1].shape == (0, 0)


def test_many_sequences_are_never_in_memory_at_once(monkeypatch):
    """Two sequences at a time are counted, and seven resamples drawn."""
    (of,) = consistency.routes(drawn(0, 5, 9, 1), num_destinations=6)
    module, sizes, drawn_sizes = "anabranch.routing.srp_statistics", [], []

    def sums(index_STK, *args):
        sizes.append(len(index_STK))
        return consistency.window_sums(index_STK, *args)

    def srps(count):
        if np.ndim(count) == 2:
            drawn_sizes.append(len(count))
        return consistency.srp_of_counts(count)

    monkeypatch.setattr(f"{module}.window_sums", sums)
    monkeypatch.setattr(f"{module}.CELLS", 9 * 6 * 2)
    sequence_counts(of, 4)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(f"{module}.srp_of_counts", srps)
    monkeypatch.setattr(f"{module}.DRAWS", 7 * 5)
    srp_interval([of], 4, resamples=20)
    assert drawn_sizes == [7, 7, 6]


def test_two_sequences_have_an_interval():
    assert np.isfinite(srp_interval(drawn(0, 2), 4)).all()


def test_the_layers_of_a_domain_stand_beside_each_other():
    """Three layers of which each alone, or the last two, would say another thing than all."""
    index_STLK = drawn(7, 2, 16, layers=3)
    index_STLK[:, :, 1, 0], index_STLK[:, :, 1, 1] = 0, 1 + np.arange(16) % 5
    index_STLK[0, :, 2, 0], index_STLK[0, :, 2, 1] = 2, 3 + np.arange(16) % 3
    index_STLK[1, :, 2, 0], index_STLK[1, :, 2, 1] = 3, np.arange(16) % 3
    _, found_MM = domain_correlation(with_domains(index_STLK, ["a", "b"]), 4)
    srps = [
        [
            value
            for layer in range(3)
            for value in consistency.srp_of_counts(
                np.array(
                    [
                        np.bincount(
                            [
                                int((index_STLK[at, start : start + 4, layer] == expert).any(-1).sum())
                                for start in range(13)
                            ],
                            minlength=5,
                        )
                        for expert in range(6)
                    ]
                )
            ).value
        ]
        for at in range(2)
    ]
    assert found_MM[0, 1] == pytest.approx(np.corrcoef(*srps)[0, 1])
