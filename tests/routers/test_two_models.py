import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.referee import recovery, recovery_in_bins

WEAK, STRONG, SCORES = [1, 0, 0, 1], [1, 1, 1, 0], [0.1, 0.9, 0.8, 0.2]


def made(seed, num=200):
    generator = np.random.default_rng(seed)
    weak, strong = (generator.random(num) < 0.5).astype(float), (generator.random(num) < 0.8).astype(float)
    return generator, weak, strong


def test_four_items_by_hand():
    found = recovery(SCORES, WEAK, STRONG)
    np.testing.assert_allclose(found.quality_C, [0.5, 0.75, 1, 0.75, 0.75])
    np.testing.assert_allclose(found.pgr_C, [0, 1, 2, 1, 1])
    assert found.apgr == pytest.approx(1.125)
    assert [found.cpt(target) for target in (0.2, 1.0, 1.5, 2.5)] == [0.25, 0.25, 0.5, None]


def test_constant_scores_are_a_random_order_on_average():
    found = recovery(np.zeros(4), WEAK, STRONG)
    np.testing.assert_allclose(found.pgr_C, [0, 0.25, 0.5, 0.75, 1])
    assert found.apgr == pytest.approx(0.5)


def test_ties_are_the_mean_over_all_orders_within_them():
    from itertools import permutations

    generator = np.random.default_rng(0)
    score, weak, strong = np.array([2, 1, 1, 1, 0]), generator.random(5), generator.random(5) + 0.5
    paths = []
    for order in permutations((1, 2, 3)):
        untied = score.astype(float)
        untied[list(order)] += np.array([0.2, 0.1, 0.0])
        paths.append(recovery(untied, weak, strong).quality_C)
    np.testing.assert_allclose(recovery(score, weak, strong).quality_C, np.mean(paths, axis=0))


def test_a_random_order_recovers_half():
    generator, weak, strong = made(0, 5000)
    found = [recovery(generator.random(5000), weak, strong).apgr for _ in range(20)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)


@given(st.integers(0, 10**6))
def test_no_order_beats_that_of_the_true_gains(seed):
    generator, weak, strong = made(seed, 40)
    if strong.mean() <= weak.mean():
        return
    best = recovery(strong - weak, weak, strong).apgr
    assert recovery(generator.normal(size=40), weak, strong).apgr <= best + 1e-12


@given(st.integers(0, 10**6))
def test_only_the_order_of_scores_counts(seed):
    generator, weak, strong = made(seed, 40)
    if strong.mean() == weak.mean():
        return
    score = generator.integers(-5, 6, 40).astype(float)
    same = np.exp(score) * 3 - 7
    assert recovery(score, weak, strong).apgr == recovery(same, weak, strong).apgr


def test_bins_cut_at_quantiles_and_agree_with_all_cuts_there():
    _, weak, strong = made(3, 1000)
    score = np.random.default_rng(1).random(1000) + 0.3 * (strong - weak)
    every, binned = recovery(score, weak, strong), recovery_in_bins(score, weak, strong)
    assert len(binned.share_C) == 12  # eleven quantiles, and none at all
    np.testing.assert_allclose(binned.share_C[[0, -1]], [0, 1])
    cut = np.rint(binned.share_C * 1000).astype(int)
    np.testing.assert_allclose(binned.quality_C, every.quality_C[cut])
    assert binned.apgr == pytest.approx(every.apgr, abs=0.02)


@pytest.mark.parametrize(
    ("score", "weak", "strong", "message"),
    [
        ([], [], [], "at least one"),
        ([1.0], [0, 1], [1, 1], "same queries"),
        ([np.nan, 1], [0, 0], [1, 1], "finite"),
        ([0.1, 1], [np.nan, 0], [1, 1], "finite"),
        ([0.1, 1], [0, 1], [1, 0], "no gap"),
    ],
)
def test_what_cannot_be_judged_is_refused(score, weak, strong, message):
    for judge in (recovery, recovery_in_bins):
        with pytest.raises(InputError, match=message):
            judge(np.array(score), np.array(weak), np.array(strong))
