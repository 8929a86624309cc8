"""Observed curves: Hit@n against all ways to draw, curves of questions that stopped early, and votes."""

import tracemalloc
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import ends_at_first, first_counts, hit_at, hit_curve, survival_curve, vote_curve


def test_known_values():
    # 1 - C(5, n) / C(8, n): 3/8, 1 - 10/28, 1 - 5/70, 1.
    assert hit_at(3, 8, np.array([1, 2, 4, 8])) == pytest.approx([0.375, 0.642857, 0.928571, 1], abs=5e-7)
    assert hit_curve([3], 8)[0, [0, 1, 3, 7]] == pytest.approx([0.375, 0.642857, 0.928571, 1], abs=5e-7)


@given(st.integers(1, 12).flatmap(lambda m: st.tuples(st.just(m), st.integers(0, m), st.integers(1, m))))
def test_it_is_what_counting_all_draws_gives(case):
    m, k, n = case
    draws = list(combinations([1] * k + [0] * (m - k), n))
    wanted = sum(any(draw) for draw in draws) / len(draws)
    assert hit_at(k, m, n) == pytest.approx(wanted, abs=1e-12)
    assert hit_curve(np.array([k]), m, n)[0, -1] == pytest.approx(wanted, abs=1e-12)


def test_large_counts_do_not_overflow():
    assert hit_at(1, 10_000, 5_000) == pytest.approx(0.5)
    assert hit_at(0, 10_000, 10_000) == 0
    assert hit_at(5, 10, 0) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hit_at(3, 8, 9), "n is 9; it must be at most the number of samples"),
        (lambda: hit_at(9, 8, 2), "correct is 9"),
        (lambda: hit_curve([1, 9], 8), r"correct_Q\[1\] is 9; it must be at most 8"),
        (lambda: hit_curve([1], 8, 9), "most is 9; it must be at most the 8 samples"),
        (lambda: hit_curve([1], 0), "samples is 0"),
        (lambda: survival_curve([2], [1]), r"solved_N\[0\] is 2"),
        (lambda: survival_curve([1], [1, 2]), "both must be"),
        (lambda: survival_curve([0.5], [np.nan]), r"tried_N\[0\] is nan"),
        (lambda: vote_curve([[1, 2]], [[1]], [1]), "it must be that of correct_QM"),
        (lambda: vote_curve([[1, 2]], [[1, 0]], [3]), r"n_N\[0\] is 3; it must be at most the 2 samples"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_questions_that_stop_when_solved_still_tell_the_curve():
    # Ten tried once, four solved; six tried again, three solved: 1 - 0.6 * 0.5.
    assert survival_curve([4, 3, 0], [10, 6, 0]).tolist() == pytest.approx([0.4, 0.7])
    rng = np.random.default_rng(0)
    p_Q = rng.beta(2, 3, 40_000)
    first_Q = rng.geometric(p_Q)
    # Half of them are given four samples at most, the others eight.
    most_Q = np.where(rng.random(len(p_Q)) < 0.5, 4, 8)
    tried = [(np.minimum(first_Q, most_Q) >= n).sum() for n in range(1, 9)]
    solved = [((first_Q == n) & (most_Q >= n)).sum() for n in range(1, 9)]
    wanted = [(first_Q <= n).mean() for n in range(1, 9)]
    assert survival_curve(solved, tried) == pytest.approx(wanted, abs=0.01)


def test_a_vote_may_fall_where_every_sample_more_makes_the_wrong_answer_surer():
    # One right answer in five samples, and four times the same wrong one.
    answer_QM, correct_QM = np.array([[7, 1, 1, 1, 1]] * 50), np.array([[1, 0, 0, 0, 0]] * 50)
    curve = vote_curve(answer_QM, correct_QM, [1, 3, 5], draws=200)
    # One: a fifth. Three: never commonest with two wrong ones beside it. Of all five: never.
    assert curve == pytest.approx([0.2, 0.0, 0.0], abs=0.02)
    assert hit_curve([1], 5)[0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_vote_of_one_is_the_share_of_right_samples_and_ties_go_to_the_first():
    rng = np.random.default_rng(1)
    answer_QM = rng.integers(0, 3, (30, 6))
    correct_QM = answer_QM == 0
    assert vote_curve(answer_QM, correct_QM, [1], draws=400)[0] == pytest.approx(correct_QM.mean(), abs=0.02)
    # Two that differ: the first drawn is given, so half of the time the right one.
    assert vote_curve([[0, 1]], [[1, 0]], [2], draws=2000)[0] == pytest.approx(0.5, abs=0.04)


def every_pair(answer_QM, correct_QM, n_N, draws, seed):
    """A vote as it is defined: each answer against each other one, in Q M^2."""
    rng, right_N = np.random.default_rng(seed), np.zeros(len(n_N))
    for _ in range(draws):
        order_QM = rng.permuted(np.broadcast_to(np.arange(answer_QM.shape[1]), answer_QM.shape), axis=1)
        drawn_QM = np.take_along_axis(answer_QM, order_QM, 1)
        is_right_QM = np.take_along_axis(correct_QM, order_QM, 1)
        for place, n in enumerate(n_N):
            best_Q = (drawn_QM[:, :n, None] == drawn_QM[:, None, :n]).sum(2).argmax(1)
            right_N[place] += is_right_QM[np.arange(len(best_Q)), best_Q].mean()
    return right_N / draws


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_a_vote_is_to_the_bit_that_of_each_answer_against_each_other(questions, samples, kinds, seed):
    rng = np.random.default_rng(seed)
    # Numbers need not be small, nor the same in two questions.
    answer_QM = rng.integers(0, 2**40, (questions, kinds))[:, rng.integers(0, kinds, samples)]
    answer_QM = rng.permuted(answer_QM, axis=1)
    correct_QM = rng.random((questions, samples)) < 0.5
    n_N = np.arange(1, samples + 1)
    found = vote_curve(answer_QM, correct_QM, n_N, draws=5, seed=seed)
    assert found.tolist() == every_pair(answer_QM, correct_QM, n_N, 5, seed).tolist()


def test_a_vote_needs_memory_for_its_answers_and_not_for_their_pairs():
    """It had a byte for each pair of answers to a question: here 200 MB."""
    rng = np.random.default_rng(0)
    answer_QM = rng.integers(0, 5, (50, 2000))
    correct_QM = answer_QM == 0
    vote_curve(answer_QM[:1, :2], correct_QM[:1, :2], [2], draws=1)
    tracemalloc.start()
    vote_curve(answer_QM, correct_QM, [1, 64, 2000], draws=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * answer_QM.size


@given(st.lists(st.integers(1, 5).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), min_size=1, max_size=4))
def test_counts_are_the_mean_over_all_orders_of_samples(questions):
    wanted = np.zeros((2, 6))
    for k, m in questions:
        orders = list(permutations([1] * k + [0] * (m - k)))
        for order in orders:
            first = order.index(1) if k else m
            wanted[1, : min(first + 1, m)] += 1 / len(orders)
            if k:
                wanted[0, first] += 1 / len(orders)
    found = first_counts(*np.array(questions).T, 6)
    assert found == pytest.approx(wanted, abs=1e-12)
    # Their survival is Hit@n, where all have as many samples.
    if len({m for _, m in questions}) == 1:
        k_Q, m = np.array([k for k, _ in questions]), questions[0][1]
        solved, tried = found[:, :m]
        here = tried > 1e-12
        assert survival_curve(solved[here], tried[here]) == pytest.approx(
            hit_curve(k_Q, m).mean(0)[: here.sum()], abs=1e-9
        )


def test_counts_of_more_right_ones_than_samples_are_refused():
    with pytest.raises(InputError, match="at most the number of samples"):
        first_counts([3], [2], 4)


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([[0, 1], [1], [0, 0, 0]], True),
        ([[0, 1], [0, 1]], False),
        ([[0, 1, 0], [1]], False),
        ([[1], [0]], False),
        ([[0, 0], [0]], True),
    ],
)
def test_questions_drawn_for_until_one_is_right_are_known_by_their_ends(rows, ends):
    assert ends_at_first(rows) is ends
