"""Counts by model and task: what they come to, that they add up, and that nobody makes them grow for ever."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.test_time import BetaTTSPM, Priors
from anabranch.test_time.fitting import fit_counts
from anabranch.test_time.priors import MOST_PAIRS, MOST_SAMPLES, OTHERS


def counted(*questions):
    priors = Priors()
    for question in questions:
        priors.add(*question)
    return priors


def test_nothing_seen_is_the_prior():
    prior = BetaTTSPM(0.7, 2.0, 3.0)
    assert Priors(prior).curve("m", "math") is prior


def test_traffic_moves_the_curve_to_what_was_seen():
    rng = np.random.default_rng(0)
    truth = BetaTTSPM(0.8, 2.0, 4.0)
    priors = Priors()
    for _ in range(3000):
        p = rng.beta(2, 4) * (rng.random() < 0.8)
        first = int(rng.geometric(p)) if p > 0 else 10**6
        priors.add("m", "math", min(first, 12), first <= 12)
    found = priors.curve("m", "math")
    assert found.value(np.arange(1, 13)) == pytest.approx(truth.value(np.arange(1, 13)), abs=0.03)
    assert abs(found.saturation(0.01) - truth.saturation(0.01)) <= 2
    assert priors.questions("m", "math") == 3000


def test_a_task_begins_with_what_is_known_of_its_model():
    priors = Priors()
    for _ in range(400):
        priors.add("m", "easy", 1, True)
    # Of a task that nobody has seen, all of the model's questions tell; of another model, none.
    assert priors.curve("m", "new").value(1) > 0.9
    assert priors.curve("other", "easy").value(1) == pytest.approx(priors.prior.value(1))
    for _ in range(5):
        priors.add("m", "hard", 8, False)
    hard = priors.curve("m", "hard").value(1)
    assert 0.5 < hard < priors.curve("m", "easy").value(1)
    for _ in range(400):
        priors.add("m", "hard", 8, False)
    assert priors.curve("m", "hard").value(1) < 0.15


def test_more_samples_than_are_told_apart_are_counted_as_far_as_they_are():
    priors = counted(("m", None, 10**6, True), ("m", None, MOST_SAMPLES, True))
    arrays, facts = priors.state()
    assert facts == {"pairs": [["m", ""]], "fits": []}
    assert arrays["count_G2N"][0, 0].sum() == 1
    assert arrays["count_G2N"][0, 1].tolist() == [2.0] * MOST_SAMPLES


def test_names_of_senders_do_not_grow_it_for_ever():
    priors = Priors()
    for number in range(2 * MOST_PAIRS):
        priors.add("m", f"task {number} {'x' * 1000}", 1, True)
    # What has no room counts for its model.
    assert len(priors) == MOST_PAIRS + 1
    assert priors.questions("m", "") == priors.questions("m") == priors.questions("m", "new") == 2 * MOST_PAIRS
    assert max(len(task) for _, task in priors) <= 80
    # Another model is known as well as before.
    for _ in range(9):
        priors.add("n", "math", 1, True)
    assert (priors.questions("n", "math"), priors.questions("n")) == (9, 9)
    arrays, facts = priors.state()
    (again := Priors()).load_state(arrays, facts)
    assert again.questions("n", "math") == 9
    # Models have an end too.
    for number in range(2 * MOST_PAIRS):
        priors.add(f"model {number}", None, 1, True)
    assert len(priors) == 2 * MOST_PAIRS
    assert priors.questions(OTHERS) == MOST_PAIRS + 3


def test_tasks_that_are_not_told_apart_count_for_their_model():
    priors = counted(("m", "a", 2, True), ("m", "b", 3, True), ("m", None, 1, False), ("n", "c", 1, True))
    fitted = repr(priors.curve("m", "b")), repr(priors.curve("m"))
    folded = priors.folded({"b"})
    assert sorted(folded) == [("m", ""), ("m", "b"), ("n", "")]
    assert [folded.questions("m", task) for task in ("b", None, "a")] == [1, 3, 3]
    assert folded.questions("n", "c") == 1
    # What was fitted is the same still.
    assert (repr(folded.known("m", "b")), repr(folded.known("m"))) == fitted
    assert folded.known("n") is folded.prior


def test_a_fit_is_made_where_a_tenth_more_is_known_and_never_to_look(monkeypatch):
    priors = counted(*[("m", "math", 1, True)] * 10)
    fits = []
    first = Priors._fit
    monkeypatch.setattr(Priors, "_fit", lambda self, *pair: fits.append(pair) or first(self, *pair))
    assert priors.known("m", "math") is priors.prior
    assert (fits, priors.is_due("m", "math"), priors.is_due("m", "new"), priors.is_due("n")) == ([], True, True, False)
    of_all = priors.curve("m", "new")
    # All names that nobody has seen have the model's own fit.
    assert [priors.curve("m", f"new {number}") for number in range(9)] == [of_all] * 9
    assert fits == [("m", "")]
    assert priors.known("m", "math") is of_all
    own = priors.curve("m", "math")
    assert (priors.known("m", "math"), fits) == (own, [("m", ""), ("m", "math")])
    priors.add("m", "math", 1, False)
    # Eleven are a tenth more than ten, and not above it; twelve are.
    assert (priors.is_due("m", "math"), priors.curve("m", "math")) == (False, own)
    priors.add("m", "math", 1, False)
    assert priors.is_due("m", "math")
    assert priors.known("m", "math") is own
    assert priors.curve("m", "math") is not own
    assert len(fits) == 4


questions = st.lists(
    st.tuples(st.sampled_from(["m", "n"]), st.sampled_from([None, "a", "b"]), st.integers(1, 9), st.booleans()),
    max_size=30,
)


@given(questions, questions)
def test_parts_add_up_and_can_be_taken_off(first, second):
    both, one, other = counted(*first, *second), counted(*first), counted(*second)
    total = one.plus(other)
    for model in ("m", "n"):
        for task in (None, "a", "b"):
            assert total.questions(model, task) == both.questions(model, task)
    assert sorted(map(tuple, total.state()[1]["pairs"])) == sorted(map(tuple, both.state()[1]["pairs"]))
    back = total.less(other)
    assert {key: back._counts[key].tolist() for key in one} == {key: one._counts[key].tolist() for key in one}


def test_it_is_kept_and_read_back_to_the_bit():
    priors = counted(("m", "a", 3, True), ("n", None, 2, False))
    fitted = priors.curve("m", "a")
    arrays, facts = priors.state()
    again = Priors()
    again.load_state(arrays, json.loads(json.dumps(facts)))
    assert again.state()[1] == facts
    np.testing.assert_array_equal(again.state()[0]["count_G2N"], arrays["count_G2N"])
    assert repr(again.curve("m", "a")) == repr(fitted)


@pytest.mark.parametrize(
    ("arrays", "facts"),
    [
        ({}, {"pairs": []}),
        ({"count_G2N": np.zeros((1, 2, 3))}, {"pairs": [["m", ""]]}),
        ({"count_G2N": np.ones((1, 2, MOST_SAMPLES))}, {"pairs": []}),
        ({"count_G2N": np.full((1, 2, MOST_SAMPLES), np.nan)}, {"pairs": [["m", ""]]}),
        ({"count_G2N": np.stack([np.stack([np.ones(MOST_SAMPLES), np.zeros(MOST_SAMPLES)])])}, {"pairs": [["m", ""]]}),
        ({"count_G2N": np.zeros((1, 2, MOST_SAMPLES))}, {"pairs": [3]}),
        ({"count_G2N": np.zeros((1, 2, MOST_SAMPLES))}, {"pairs": [["m", ""]], "fits": [["m", "", 1, 2.0, 1.0, 1.0]]}),
    ],
)
def test_damaged_counts_are_refused_and_nothing_changes(arrays, facts):
    priors = counted(("m", None, 1, True))
    with pytest.raises(DataError):
        priors.load_state(arrays, facts)
    assert priors.questions("m") == 1


def test_a_question_that_was_solved_by_nothing_is_refused():
    with pytest.raises(InputError, match="solved by none"):
        Priors().add("m", None, 0, True)
    with pytest.raises(InputError, match="tried is -1"):
        Priors().add("m", None, -1, False)


@pytest.mark.parametrize(("f_max", "a", "b"), [(1.0, 0.5, 1.5), (0.6, 2.0, 6.0), (0.9, 20.0, 20.0)])
def test_counts_give_back_what_they_were_made_of(f_max, a, b):
    """Exact counts of a million questions, most of which were given few samples."""
    truth = BetaTTSPM(f_max, a, b)
    at = np.arange(MOST_SAMPLES)
    given = 1e6 * 0.8**at
    tried, solved = given * truth.unsolved(at), given * truth.gain(at)
    found = BetaTTSPM(*fit_counts(solved, tried))
    n = np.arange(1, 40)
    assert found.value(n) == pytest.approx(truth.value(n), abs=5e-3)
    assert abs(found.saturation(0.01) - truth.saturation(0.01)) <= 1


def test_many_who_were_given_one_sample_are_not_judged_by_few_who_were_given_all():
    solved, tried = np.zeros(8), np.zeros(8)
    tried[0] = 300.0
    # One question went on, and was solved by its second sample.
    tried[:2] += 1.0
    solved[1] = 1.0
    assert BetaTTSPM(*fit_counts(solved, tried)).value(8) < 0.3


def test_samples_all_of_which_are_known_count_a_question_once_whatever_their_order():
    priors = Priors()
    priors.add_samples("m", "t", [1, 0], [2, 3])
    # Half of the orders of the first are solved by the first sample, the other half by the second.
    assert priors.questions("m", "t") == 2
    count_2N = priors.state()[0]["count_G2N"][0]
    assert count_2N[:, :4].tolist() == [[0.5, 0.5, 0, 0], [2, 1.5, 1, 0]]
    priors.add_samples("m", "t", [], [])
    assert len(priors) == 1


def test_many_samples_of_each_question_show_the_mixture_that_they_are_of():
    rng = np.random.default_rng(0)
    p_Q = rng.beta(0.6, 1.8, 600)
    priors = Priors(weight=1.0)
    priors.add_samples("m", None, rng.binomial(32, p_Q), np.full(600, 32))
    wanted = BetaTTSPM(1.0, 0.6, 1.8).value([1, 4, 16, 32])
    assert priors.curve("m").value([1, 4, 16, 32]) == pytest.approx(wanted, abs=0.03)
