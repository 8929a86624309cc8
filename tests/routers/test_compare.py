import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.referee import bootstrap, holm
from anabranch.routers.referee.compare import resampled_means


def test_draws_are_means_over_questions_drawn_with_replacement():
    generator = np.random.default_rng(5)
    value, count = generator.normal(size=(30, 2)), generator.integers(1, 4, 30).astype(float)
    found = resampled_means(value, count, 50, seed=9)
    rows = np.random.default_rng(9).integers(0, 30, (50, 30))
    expected = [[value[row, column].sum() / count[row].sum() for column in (0, 1)] for row in rows]
    np.testing.assert_allclose(found, expected)


def test_blocks_of_draws_have_different_draws():
    value = np.arange(3000.0)[:, None]
    found = resampled_means(value, np.ones(3000), 2000, seed=0)  # three blocks
    assert found.shape == (2000, 1)
    assert len(np.unique(found)) > 1900


def test_interval_of_a_mean_is_that_of_theory():
    value = np.random.default_rng(0).normal(0.5, 1, (900, 1))
    found = bootstrap(value)[0]
    assert found.mean == pytest.approx(value.mean())
    half = 1.96 * value.std() / 30
    assert found.low == pytest.approx(value.mean() - half, abs=0.005)
    assert found.high == pytest.approx(value.mean() + half, abs=0.005)
    assert found.p == pytest.approx(2 / 2001)


def test_pairing_finds_a_small_difference_that_scores_alone_hide():
    generator = np.random.default_rng(1)
    ours = generator.normal(0, 1, 500)
    theirs = ours - 0.02 + generator.normal(0, 0.01, 500)
    paired = bootstrap((ours - theirs)[:, None])[0]
    alone = bootstrap(np.column_stack([ours, theirs]))
    assert paired.low > 0
    assert alone[0].low < alone[1].high


def test_no_difference_has_p_of_one():
    found = bootstrap(np.zeros((10, 1)))[0]
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_false_alarms_come_as_often_as_they_should():
    generator = np.random.default_rng(2)
    p = [bootstrap(generator.normal(size=(60, 1)), draws=400, seed=seed)[0].p for seed in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10


def test_same_seed_same_interval():
    value = np.random.default_rng(3).normal(size=(50, 3))
    assert bootstrap(value) == bootstrap(value)
    assert bootstrap(value) != bootstrap(value, seed=1)


@pytest.mark.parametrize("value", [np.zeros((0, 1)), np.array([[np.nan]]), np.zeros(3)])
def test_what_has_no_mean_is_refused(value):
    with pytest.raises(InputError, match="bootstrap needs"):
        bootstrap(value)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.5]), [1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_keeps_the_order_and_never_helps(p):
    found = holm(p)
    assert all(corrected >= raw for corrected, raw in zip(found, p, strict=True))
    assert all(found[i] <= found[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])
    assert min(found) == pytest.approx(min(1, len(p) * min(p)))
