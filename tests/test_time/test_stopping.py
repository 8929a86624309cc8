"""Stop rules: the vote by hand and by exact fractions, and what rules spend on recorded answers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import (
    TTSPM,
    BetaTTSPM,
    effective_samples,
    is_decided,
    play_fixed,
    play_global,
    play_oracle,
    play_question,
    play_votes,
    regret,
    verified_accuracy,
    vote_probability,
)


def test_a_lead_of_five_to_one_is_not_yet_enough():
    # Beta(6, 2): 1 - 8/128.
    assert vote_probability(5, 1) == pytest.approx(0.9375)
    assert not is_decided([5, 1], 0.95)
    # Beta(7, 2): 1 - 9/256.
    assert vote_probability(6, 1) == pytest.approx(1 - 9 / 256)
    assert is_decided([1, 6], 0.95)
    # Four alike, Beta(5, 1): 1 - 1/32.
    assert is_decided([4])
    assert not is_decided([3])
    assert not is_decided([])
    assert not is_decided([0, 0])


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_vote_is_a_binomial_tail(first, second):
    total = first + second + 1
    wanted = 1 - sum(Fraction(math.comb(total, at), 2**total) for at in range(second + 1))
    assert vote_probability(first, second) == pytest.approx(float(wanted), abs=1e-12)
    assert vote_probability(first, second) + vote_probability(second, first) == pytest.approx(1, abs=1e-12)


def test_thousands_of_votes_are_a_probability_too():
    assert vote_probability(5000, 5000) == pytest.approx(0.5, abs=1e-9)
    assert vote_probability(60_000, 100) == 1.0
    assert vote_probability(5200, 4800) == pytest.approx(0.99997, abs=1e-4)


def test_samples_that_go_together_count_for_less():
    assert effective_samples(8, 0) == 8
    assert effective_samples(8, 1) == 1
    # 9 / (1 + 8 / 4).
    assert effective_samples(9, 0.25) == 3
    assert effective_samples([0, 1], BetaTTSPM(1, 2, 1).rho).tolist() == [0, 1]


def test_a_verifier_that_lets_wrong_answers_pass_bounds_what_it_delivers():
    # p / (p + f (1 - p)) with p = 1/5, f = 1/4: 1/2 in the limit; 1/5 of one sample, for it is accepted only if it is right or passes.
    assert verified_accuracy(0.2, 0.25, 10**6) == pytest.approx(0.5)
    assert verified_accuracy(0.2, 0.25, 1) == pytest.approx(0.2)
    assert verified_accuracy(0.2, 0.0, 7) == pytest.approx(TTSPM(p=0.2).value(7))
    assert verified_accuracy(0.2, 1.0, 7) == pytest.approx(0.2)
    assert verified_accuracy(0.2, 0.5, 0) == 0
    with pytest.raises(InputError, match=r"false_accepts is 1\.5"):
        verified_accuracy(0.2, 1.5, 3)


CORRECT = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])


def test_fixed_and_global_rules_spend_what_they_say():
    spent = play_fixed(CORRECT, 2)
    assert (spent.samples_Q.tolist(), spent.right_Q.tolist()) == ([2] * 4, [True, False, True, False])
    assert spent.worth(1.0, 0.1) == pytest.approx(0.5 - 0.2)
    curve = TTSPM(p=0.5)
    # Gains 1/2, 1/4, 1/8, ...
    assert play_global(CORRECT, curve, 0.2).mean_samples == 2
    assert play_global(CORRECT, curve, 1e-6).mean_samples == 4
    with pytest.raises(InputError, match="n is 5"):
        play_fixed(CORRECT, 5)


def test_a_question_is_left_where_its_failures_make_it_hopeless():
    curve = BetaTTSPM(1.0, 1.0, 1.0)
    # After n failures the next is right with 1 / (n + 2): 1/2, 1/3, 1/4, 1/5; more than 0.26 for two of them.
    spent = play_question(CORRECT, curve, 0.26)
    assert (spent.samples_Q.tolist(), spent.right_Q.tolist()) == ([2, 2, 1, 2], [True, False, True, False])
    # Two at a time: a batch that is begun is paid.
    assert play_question(CORRECT, curve, 1e-6, batch=2).samples_Q.tolist() == [2, 4, 2, 4]
    assert play_question(CORRECT, curve, 0.6).samples_Q.tolist() == [0] * 4
    # Questions that are all alike are never hopeless.
    assert play_question(CORRECT, TTSPM(p=0.5), 0.26).samples_Q.tolist() == [2, 4, 1, 4]


def test_votes_stop_when_they_are_decided():
    answer_QM = np.array([[3, 3, 3, 3, 3], [1, 2, 1, 2, 1], [5, 4, 4, 4, 4]])
    correct_QM = answer_QM == 3
    spent = play_votes(answer_QM, correct_QM)
    assert spent.samples_Q.tolist() == [4, 5, 5]
    assert spent.right_Q.tolist() == [True, False, False]
    assert play_votes(answer_QM, correct_QM, least=5).samples_Q.tolist() == [5, 5, 5]
    # The earlier of two that are as common.
    assert play_votes([[1, 2]], [[1, 0]]).right_Q.tolist() == [True]


def test_the_oracle_takes_what_is_worth_most():
    # Of k right in four: Hit@n less a fifth for each sample.
    # k = 2: 1/2 - .2, 5/6 - .4, 1 - .6: two. k = 0: none. k = 4: one. k = 1: 1/4 - .2, 1/2 - .4, 3/4 - .6, 1 - .8: four.
    assert play_oracle(CORRECT, 1.0, 0.2).tolist() == [2, 0, 1, 4]


def test_regret_is_what_the_oracle_has_more():
    # Worth at 1 and a fifth: two of 5/6 - .4, none, one of 1 - .2, four of 1 - .8; the rule takes two of each, and is right twice.
    best = (5 / 6 - 0.4 + 0.8 + 0.2) / 4
    assert regret(play_fixed(CORRECT, 2), CORRECT, 1.0, 0.2) == pytest.approx(best - (0.5 - 0.4))
    with pytest.raises(InputError, match="spent is of 4 questions"):
        regret(play_fixed(CORRECT, 2), CORRECT[:2], 1.0, 0.2)


@given(st.integers(0, 2**31), st.floats(0.001, 0.5))
def test_no_rule_beats_the_oracle_on_average_over_orders(seed, price):
    rng = np.random.default_rng(seed)
    correct_QM = (rng.random((20, 6)) < rng.random((20, 1))).astype(int)
    best_Q = play_oracle(correct_QM, 1.0, price)
    from anabranch.test_time import hit_curve

    curve_QN = np.hstack([np.zeros((20, 1)), hit_curve(correct_QM.sum(1), 6)])
    worth_QN = curve_QN - price * np.arange(7)
    assert (worth_QN[np.arange(20), best_Q] >= worth_QN.max(1) - 1e-12).all()
