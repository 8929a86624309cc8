"""Curves of recorded samples: of models and tasks, whatever the numbers of samples, and as lines of a config that can be served."""

import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.sample_curves import config_lines, sample_curves
from anabranch.test_time import TTSPM, BetaTTSPM, survival_curve


def recorded(rows, tasks=(), models=("small",)):
    """Rows by model: each a list of samples, or None for a question that it was not asked."""
    samples = tuple({name: tuple(map(float, row)) for name, row in zip(models, of, strict=True) if row} for of in rows)
    means = np.array([[np.mean(of[name]) if name in of else np.nan for name in models] for of in samples])
    return Recorded(
        query=tuple(f"q{at}" for at in range(len(rows))),
        models=models,
        task=tuple(tasks),
        score_NM=means,
        samples=samples,
    )


def outcomes(p_Q, samples, seed=0):
    return [[row.tolist()] for row in np.random.default_rng(seed).random((len(p_Q), samples)) < p_Q[:, None]]


def test_it_is_the_fit_of_its_outcomes_and_each_task_has_its_own():
    p_Q = np.random.default_rng(1).beta(0.5, 1.5, 120)
    rows = outcomes(p_Q, 8)
    tasks = ["a" if at % 3 else "b" for at in range(120)]
    whole, first, second = sample_curves(recorded(rows, tasks), eps=0.02)
    assert [(one.task, one.questions, one.left_out) for one in (whole, first, second)] == [
        (None, 120, 0),
        ("a", 80, 0),
        ("b", 40, 0),
    ]
    array = np.array(rows)[:, 0]
    wanted = BetaTTSPM().fit(array)
    assert (whole.curve.f_max, whole.curve.a, whole.curve.b) == (wanted.f_max, wanted.a, wanted.b)
    assert whole.stop == wanted.saturation(0.02)
    assert whole.stop_interval == wanted.interval(eps=0.02)["saturation"]
    assert whole.single_stop == TTSPM().fit(array).saturation(0.02)
    assert whole.observed_N == pytest.approx(wanted.observed)
    of_b = BetaTTSPM().fit(array[[at for at in range(120) if not at % 3]])
    assert second.curve.value(4) == of_b.value(4)
    told = whole.to_dict()
    assert told["observed"][0] == pytest.approx(array.mean())
    assert (told["stop"], told["eps"], told["lost"]) == (whole.stop, 0.02, None)


def test_a_single_task_is_all_there_is():
    rows = outcomes(np.full(20, 0.4), 4)
    assert [one.task for one in sample_curves(recorded(rows, ["a"] * 20))] == [None]


def test_questions_with_fewer_samples_than_half_of_all_have_are_left_out():
    rows = [[[0, 1, 0, 1, 1, 0]]] * 6 + [[[1, 0, 1, 0]]] * 5 + [[[1]]] * 4
    (one,) = sample_curves(recorded(rows))
    # The middle one of fifteen has four samples.
    assert (len(one.observed_N), one.questions, one.left_out, one.is_cut) == (4, 11, 4, False)
    assert one.observed_N[0] == pytest.approx(0.5)


def test_questions_drawn_for_until_one_is_right_have_a_curve_of_survival():
    rng = np.random.default_rng(0)
    truth = BetaTTSPM(1.0, 1.0, 2.0)
    first_Q = rng.geometric(rng.beta(1.0, 2.0, 3000))
    rows = [[[0] * (first - 1) + [1]] if first <= 12 else [[0] * 12] for first in first_Q.tolist()]
    (one,) = sample_curves(recorded(rows), eps=0.01)
    assert one.is_cut
    assert one.questions == 3000
    solved = [sum(first == n for first in first_Q) for n in range(1, 13)]
    tried = [sum(first >= n for first in first_Q) for n in range(1, 13)]
    assert one.observed_N == pytest.approx(survival_curve(solved, tried))
    assert one.curve.value([1, 4, 12]) == pytest.approx(truth.value([1, 4, 12]), abs=0.03)
    assert one.stop_interval[0] <= truth.saturation(0.01) <= one.stop_interval[1]


def test_rounds_go_by_their_order_and_tell_what_they_lose():
    rows = [[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1]], [[0, 0, 1, 1]]] * 5
    (one,) = sample_curves(recorded(rows), kind="sequential")
    # Solved by round: 1/4, 2/4, 3/4, 3/4. Right before a further round: 2 + 3 + 1 of each four, of which one is lost.
    assert one.observed_N == pytest.approx([0.25, 0.5, 0.75, 0.75])
    assert one.lost == pytest.approx(1 / 6)
    config = tomllib.loads(config_lines([one]))["strategies"]["best-of"]
    assert config["rounds"] is True


def test_models_are_apart_and_one_without_several_samples_is_left_out():
    rows = [[[0, 1, 1], [1]], [[1, 0, 0], [0]]] * 8
    found = sample_curves(recorded(rows, models=("small", "large")))
    assert [one.model for one in found] == ["small"]
    rows = [[[0, 1, 1], [1, 1, 0]], [[1, 0, 0], None]] * 10
    found = sample_curves(recorded(rows, models=("small", "large")), eps={"small": 0.01, "large": 0.1})
    assert [(one.model, one.questions, one.eps) for one in found] == [("small", 20, 0.01), ("large", 10, 0.1)]
    lines = tomllib.loads(config_lines(found, value_usd=0.5))["strategies"]
    assert [(name, of["model"], of["value_usd"]) for name, of in lines.items()] == [
        ("best-of-1", "small", 0.5),
        ("best-of-2", "large", 0.5),
    ]


def test_its_lines_are_a_strategy_that_begins_with_its_curve():
    """Of questions that are all alike, whose mixture has no end too."""
    (one,) = sample_curves(recorded([[[0, 1, 0, 0]]] * 12))
    fields = tomllib.loads(config_lines([one]))["strategies"]["best-of"]
    made = strategies.make(fields.pop("kind"), **fields)
    n = np.array([1, 2, 8])
    assert made.priors.curve("small").value(n) == pytest.approx(one.curve.value(n), abs=2e-3)
    assert made.config.max_n == max(1, min(64, one.stop))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_too_few_questions_have_a_curve_of_their_own_and_nothing_of_others(count):
    """One had intervals of no width, and lines of a config as if that were sure."""
    rows = [[[1, 0, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]] * 3
    (one,) = sample_curves(recorded(rows[:count]), eps=0.05)
    assert (one.too_few, config_lines([one])) == (True, "")
    # Each was solved by one of four; which a curve of so few points meets only about.
    assert one.observed_N[-1] == pytest.approx(1.0)
    assert one.curve.value(4) > 0.8
    # All that can be: the ceiling from nothing to 1, and with gains that fall 1 / 0.05 samples less one.
    assert one.interval["f_max"] == (pytest.approx(0, abs=1e-9), 1.0)
    assert (one.interval["a"], one.interval["b"]) == ((0.0, np.inf), (0.0, np.inf))
    assert one.stop_interval == (0.0, 19.0)
    told = one.to_dict()
    assert (told["too_few_questions"], told["interval"], told["stop_interval"]) == (True, None, None)
    assert json.loads(json.dumps(told, allow_nan=False))["f_max"] == one.curve.f_max
    assert not sample_curves(recorded((rows * 2)[:10]))[0].too_few


def test_a_task_of_too_few_questions_takes_nothing_from_the_curve_of_all():
    whole, few, many = sample_curves(recorded(outcomes(np.linspace(0.1, 0.9, 30), 4), ["a"] * 4 + ["b"] * 26))
    assert (whole.too_few, few.too_few, many.too_few) == (False, True, False)
    assert tomllib.loads(config_lines([whole, few, many]))["strategies"]["best-of"]["model"] == "small"


def test_questions_that_do_not_differ_are_not_told_as_sure():
    """Twelve, each with one right sample of four: to draw these again tells nothing, and had no width."""
    (one,) = sample_curves(recorded([[[0, 1, 0, 0]]] * 12))
    for name in ("f_max", "mean"):
        low, high = one.interval[name]
        assert high - low > 0.1
    assert one.interval["mean"][0] < one.curve.mean < one.interval["mean"][1]


def test_a_vote_may_end_below_what_any_choice_could_reach():
    """Three questions: two wrong answers agree against one that is right; all right; right ones that are written otherwise."""
    data = replace(
        recorded([[[0, 1, 0]], [[1, 1, 1]], [[1, 0, 1]]]),
        texts=(
            {"small": ("4", "5", "4")},
            {"small": ("a", "a", "a")},
            {"small": ("The answer is 7.0", "8", r"\boxed{7}")},
        ),
    )
    (one,) = sample_curves(data)
    assert one.vote == {1: pytest.approx(2 / 3, abs=0.05), 2: pytest.approx(2 / 3, abs=0.05), 3: pytest.approx(2 / 3)}
    assert one.to_dict()["vote"][-1] == [3, pytest.approx(2 / 3)]
    assert one.observed_N[-1] == 1.0
    # One that says nothing of what it answered leaves no vote.
    assert sample_curves(replace(data, texts=({}, *data.texts[1:])))[0].vote is None
    assert sample_curves(data, kind="sequential")[0].vote is None


@pytest.mark.parametrize(("right", "stop"), [(0, 0), (1, 1)])
def test_outcomes_that_are_all_the_same_have_bounds_and_no_lines(right, stop):
    (one,) = sample_curves(recorded([[[right] * 4]] * 12))
    assert (one.all_same, one.stop, config_lines([one])) == (right, stop, "")
    assert one.stop_interval[0] <= stop <= one.stop_interval[1]
    told = one.to_dict()
    assert [told[name] for name in ("f_max", "a", "b", "single")] == [None] * 4
    json.dumps(told, allow_nan=False)


def test_where_none_was_right_nobody_drew_until_one_was():
    (one,) = sample_curves(recorded([[[0] * (2 + at % 3)] for at in range(12)]))
    assert (one.all_same, one.is_cut, one.left_out, len(one.observed_N)) == (0, False, 4, 3)


@pytest.mark.parametrize(
    ("eps", "models", "error", "message"),
    [
        (0.0, None, InputError, "eps is 0.0; it must be a share of questions, from 1e-06 to below 1"),
        (1.0, None, InputError, "eps is 1.0"),
        (float("nan"), None, InputError, "eps is nan"),
        (0.1, ["tiny"], InputError, "no model 'tiny' in the recorded outcomes; known: small"),
    ],
)
def test_what_makes_no_curve_is_refused(eps, models, error, message):
    with pytest.raises(error, match=message):
        sample_curves(recorded([[[0, 1]]] * 4), eps=eps, models=models)


def test_one_sample_each_is_no_curve():
    with pytest.raises(DataError, match="each question has one sample, which shows no curve; give several of each"):
        sample_curves(recorded([[[0]], [[1]]]))
