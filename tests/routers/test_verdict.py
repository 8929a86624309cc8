"""The verdict of an evaluation: by hand, its errors in repeated worlds without a difference, and what an evaluation makes of it."""

import dataclasses
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.data import pool_of, split
from anabranch.routers.referee import evaluate, holm
from anabranch.routers.referee.log_verdict import verdict_of_log
from anabranch.routers.referee.page import page
from anabranch.routers.referee.verdict import Contender, compared, decide, lower, reach_of
from anabranch.routers.strategies.fixed import Random, Static
from made_outcomes import MODELS, WordMeans, made_outcomes

Z = NormalDist().inv_cdf


def one(name, gain=0.0, gain_se=0.001, saving=0.0, saving_se=0.001, setting=None, kind="strategy"):
    return Contender(
        kind=kind, name=name, setting=setting, gain=gain, gain_se=gain_se, saving=saving, saving_se=saving_se
    )  # fmt: skip


def judged(strategies, sequences=None, p=None, questions=10_000, **fields):
    sequences = [[each] for each in strategies] if sequences is None else sequences
    p = p or {each.name: 0.0005 if abs(each.gain) > 5 * each.gain_se else 0.9 for each in strategies}
    held = {"reach": 1.0, "chosen_on": "train", "margin": 0.02, **fields}
    return decide(strategies, sequences, "large", p, questions=questions, **held)


def test_a_contender_by_hand():
    found = compared(
        "strategy",
        "s",
        np.array([1, 0, 1, 1.0]),
        np.array([1, 1, 1, 1.0]),
        np.array([0, 0, 1, 0.0]),
        np.array([1, 3, 2, 2.0]),
    )
    assert (found.gain, found.saving) == (0.5, 0.5)
    assert found.gain_se == pytest.approx(np.sqrt(4 * 0.25 / 3) / 2)
    # cost - (1 - saving) * that of the best, as shares of 2 dollars: 1/4, -1/4, 0, 0.
    assert found.saving_se == pytest.approx(np.sqrt(2 / 16 / 3) / 2)
    assert compared("model", "s", np.ones(3), None, np.ones(3), np.ones(3)).saving is None
    assert compared("model", "s", np.ones(3), np.ones(3), np.ones(3), np.zeros(3)).saving is None  # nothing to save


def test_a_bound_is_the_normal_one_or_what_was_never_seen():
    assert lower(0.1, 0.01, 0.05, 10**6, 1.0) == pytest.approx(0.1 - Z(0.95) * 0.01)
    # Of 5 questions that all gained 1: with 1 - 0.025 ** (1/5) = 0.52 of others that lose 1, five like these come once in 40 times.
    assert lower(1.0, 0.0, 0.025, 5, 1.0) == pytest.approx(1 - 2 * (1 - 0.025**0.2))
    assert lower(1.0, 0.0, 0.025, 5, 1.0) < 0 < lower(1.0, 0.0, 0.025, 6, 1.0)  # as the sign test has it


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(1e-6, 0.5), st.integers(1, 10**6))
def test_a_bound_is_below_and_falls_with_doubt(mean, se, level, num):
    bound = lower(mean, se, level, num, 1.0)
    assert bound <= mean
    assert lower(mean, se, level / 2, num, 1.0) <= bound + 1e-12
    assert lower(mean, 2 * se, level, num, 1.0) <= bound
    assert bound <= lower(mean, se, level, num + 1, 1.0) + 1e-12


def test_the_best_of_several_is_told_with_an_interval_for_all():
    found = judged([one("a", 0.05, 0.005, 0.1), one("b", 0.08, 0.005, -0.2), one("c", -0.05, 0.005)])
    assert [each.name for each in found.gains] == ["b", "a", "c"]
    assert [each.found for each in found.gains] == ["better", "better", "worse"]
    half = Z(1 - 0.05 / 3 / 2) * 0.005
    assert found.gains[0].interval == pytest.approx([0.08 - half, 0.08 + half])
    assert (found.recommended.kind, found.recommended.name, found.recommended.setting) == ("strategy", "b", None)
    assert found.is_resolved
    assert found.sentences()[0].startswith(
        "b is better than large, the best single model: +0.0800 (+0.0680 to +0.0920, 95% for all 3"
    )
    assert "so is a" in found.sentences()[0]
    assert "20% more cost" in found.sentences()[0]


def test_p_or_interval_that_does_not_settle_it_leaves_it_open():
    by_p = judged([one("a", 0.05, 0.01)], p={"a": 0.06})
    by_interval = judged([one("a", 0.05, 0.03)], p={"a": 0.01})
    for found in (by_p, by_interval):
        assert found.gains[0].found == "not resolved"
        assert (found.recommended.kind, found.recommended.name) == ("model", "large")
        assert "No strategy is shown to be better than large" in found.sentences()[0]
        assert "not resolved on 10,000 questions" in found.sentences()[0]


def test_without_a_gain_the_largest_saving_at_equal_quality_is_recommended():
    along = [
        one("a", 0.0, 0.002, 0.1, setting=0.0),
        one("a", -0.002, 0.002, 0.3, setting=1.0),
        one("a", -0.019, 0.002, 0.6, setting=2.0),  # cannot be told from a loss of more than the margin
        one("a", 0.0, 0.002, 0.7, setting=3.0),  # behind one that is not as good: never looked at
    ]
    small = [one("small", -0.2, 0.002, 0.9, kind="model")]
    found = judged([one("a", 0.0, 0.002, 0.1)], [along, small])
    equal = found.equal_quality
    assert (equal.name, equal.setting, equal.saving) == ("a", 1.0, 0.3)
    assert equal.at_least == pytest.approx(-0.002 - Z(1 - 0.05 / 2) * 0.002)
    half = Z(1 - 0.05 / 2 / 5) * 0.001
    assert equal.interval == pytest.approx([0.3 - half, 0.3 + half])
    assert (found.recommended.name, found.recommended.setting) == ("a", 1.0)
    assert found.recommended.reason == "it costs 30% less than large at equal quality"
    assert "a with its knob at 1 saves 30% (30% to 30%) of what large costs" in found.sentences()[1]


def test_a_cheaper_model_that_is_as_good_is_recommended_too():
    found = judged(
        [one("a", -0.1, 0.001)], [[one("a", -0.1, 0.001, 0.5)], [one("small", 0.0, 0.002, 0.9, kind="model")]]
    )
    assert (found.recommended.kind, found.recommended.name) == ("model", "small")
    assert "always small saves 90%" in found.sentences()[1]
    assert found.sentences()[-1] == "Recommended: always small, since it costs 90% less than large at equal quality."


def test_a_saving_that_may_be_none_is_none():
    found = judged([one("a", 0.0, 0.001, 0.01, 0.01)])
    assert found.equal_quality is None
    assert found.recommended.name == "large"
    assert "Cost at equal quality is not resolved" in found.sentences()[1]
    assert not found.is_resolved


def test_few_questions_settle_nothing():
    """Four questions that all agree were worth p = 0.001 to the bootstrap."""
    data = Recorded(
        query=tuple("abcd"),
        models=("weak", "strong"),
        score_NM=np.tile([0.0, 1.0], (4, 1)),
        cost_NM=np.tile([1.0, 2.0], (4, 1)),
    )
    learned = dataclasses.replace(data, query=tuple("efgh"), score_NM=1 - data.score_NM)
    report = evaluate({"strong": Static(Static.Config(model="strong"))}, train=learned, test=data, seeds=[0])
    assert (report.verdict.best_single, report.strategies[0].gain, report.strategies[0].p_holm < 0.01) == (
        "weak",
        1.0,
        True,
    )
    assert report.verdict.gains[0].found == "not resolved"
    assert report.verdict.recommended.name == "weak"


def test_without_costs_nothing_is_said_of_them():
    found = judged([one("a", 0.0, 0.001, None, None)])
    assert (found.has_costs, found.equal_quality, len(found.sentences())) == (False, None, 2)
    assert found.sentences()[-1] == "Recommended: always large, since nothing is shown to be better."


def test_scores_of_another_range_have_margins_of_theirs():
    assert reach_of(np.array([[0.2, 0.4]])) == 1.0
    assert reach_of(np.array([[0.0, 10.0], [np.nan, 5.0]])) == 10.0
    assert reach_of(np.array([[-1.0, 1.0]])) == 2.0


def test_where_nothing_differs_something_is_called_better_once_in_twenty_at_most():
    generator, times, num = np.random.default_rng(0), 1500, 300
    # Four strategies that share the luck of the questions; lost, equal or won, alike often.
    shared = generator.random((times, num, 1)) < 0.5
    value = np.where(shared, generator.integers(-1, 2, (times, num, 1)), generator.integers(-1, 2, (times, num, 4)))
    mean, se = value.mean(1), value.std(1, ddof=1) / np.sqrt(num)
    alarms = 0
    for row in range(times):
        raw = [2 * (1 - NormalDist().cdf(abs(z))) for z in mean[row] / se[row]]
        p = dict(zip("abcd", holm(raw), strict=True))
        strategies = [one(name, mean[row, at], se[row, at]) for at, name in enumerate("abcd")]
        alarms += any(each.found != "not resolved" for each in judged(strategies, p=p, questions=num).gains)
    assert 0.01 < alarms / times < 0.065  # 0.05, and what 1,500 times leave to chance


def test_what_is_worse_by_the_margin_passes_for_equal_once_in_twenty_at_most():
    generator, times, num = np.random.default_rng(1), 1500, 600
    lost, won = 0.12, 0.10  # so that all are 0.02 worse, the margin
    draw = generator.random((times, num, 6))
    value = np.where(draw < lost, -1.0, np.where(draw < lost + won, 1.0, 0.0))
    mean, se = value.mean(1), value.std(1, ddof=1) / np.sqrt(num)
    wrong = 0
    for row in range(times):
        settings = [one("a", mean[row, at], se[row, at], 0.1 * at + 0.1, setting=float(at)) for at in range(4)]
        others = [[one(f"m{at}", mean[row, at], se[row, at], 0.5, kind="model")] for at in (4, 5)]
        wrong += judged([settings[0]], [settings, *others], questions=num).equal_quality is not None
    assert 0.005 < wrong / times < 0.06


def word_means():
    return Ranked(Ranked.Config(predictor=WordMeans.Config()))


def test_an_evaluation_ends_in_a_verdict():
    train, test = split(made_outcomes(1500), seed=1)
    report = evaluate(
        {"word_means": word_means(), "cheap": Static(Static.Config(model="small"))}, train=train, test=test, seeds=[0]
    )
    found, standing = report.verdict, report.strategies[0]
    assert (found.best_single, found.chosen_on, found.questions) == ("large", "train", 300)
    assert (found.gains[0].name, found.gains[0].found, found.gains[0].gain) == (
        "word_means",
        "better",
        pytest.approx(standing.gain),
    )
    assert found.gains[0].p_holm == standing.p_holm
    assert found.gains[0].interval[0] < standing.gain_interval[0]  # corrected for two
    assert (found.gains[1].name, found.gains[1].found) == ("cheap", "worse")
    assert found.recommended.name == "word_means"
    assert report.to_dict()["verdict"]["recommended"] == {
        "kind": "strategy", "name": "word_means", "setting": None, "reason": found.recommended.reason,
    }  # fmt: skip
    told = report.replace(verdict=found.replace(next="type <this>"))
    assert "## Verdict" in told.to_markdown()
    assert "`type <this>`" in told.to_markdown()
    shown = page(told, "title")
    assert "<h2>Verdict</h2><ul><li>word_means is better than large" in shown
    assert "<code>type &lt;this&gt;</code>" in shown


def test_money_is_saved_where_a_margin_allows_it():
    """Two models, of which the dear one is right 3 points more often, whatever is asked."""
    generator = np.random.default_rng(3)
    words = [f"{'red' if row % 2 else 'blue'} {row}" for row in range(6000)]
    score_NM = (generator.random((6000, 2)) < [0.80, 0.83]).astype(float)
    cost_NM = np.tile([1.0, 10.0], (6000, 1))
    data = Recorded(query=tuple(words), models=("cheap", "dear"), score_NM=score_NM, cost_NM=cost_NM)
    train, test = split(data, (0.5, 0.5), seed=0)
    wide, none = (
        evaluate({"word_means": word_means()}, train=train, test=test, seeds=[0], margin=margin).verdict
        for margin in (0.1, 0.0)
    )
    assert wide.best_single == "dear"
    assert wide.equal_quality.saving == pytest.approx(0.9)
    assert wide.recommended.reason == "it costs 90% less than dear at equal quality"
    assert (none.equal_quality, none.recommended.name) == (None, "dear")


def test_a_best_single_model_that_is_known_is_taken():
    test = made_outcomes(100)
    fitted = word_means().fit(made_outcomes(100, seed=5))
    report = evaluate({"w": fitted}, train=None, test=test, best_single="small")
    assert (report.verdict.best_single, report.verdict.chosen_on) == ("small", "train")
    assert report.baselines["best_single"]["model"] == "small"
    unknown = evaluate({"w": fitted}, train=None, test=test, best_single="gone").verdict
    assert (unknown.best_single, unknown.chosen_on) == ("large", "test")
    assert "chosen on the same questions, which favours it" in unknown.sentences()[0]


def test_what_could_not_be_judged_is_named():
    strategies = {"cheap": Static(Static.Config(model="small")), "out": Static(Static.Config(model="gone"))}
    found = evaluate(strategies, train=None, test=made_outcomes(40)).verdict
    assert list(found.unfit) == ["out"]
    assert any(sentence.startswith("out was not compared: ") for sentence in found.sentences())


# Logs


def drawn_log(num, weights, seed=0, by=None):
    """One answer a question, of the model that was drawn for it."""
    data = made_outcomes(num, seed)
    draw = np.random.default_rng(seed + 100)
    model_N = draw.choice(3, num, p=weights)
    score_NM, cost_NM, chance_NM = (np.full((num, 3), np.nan) for _ in range(3))
    rows = np.arange(num)
    score_NM[rows, model_N], cost_NM[rows, model_N] = data.score_NM[rows, model_N], data.cost_NM[rows, model_N]
    chance_NM[rows, model_N] = np.array(weights)[model_N]
    return dataclasses.replace(data, score_NM=score_NM, cost_NM=cost_NM, signals={"probability": chance_NM})


def test_a_log_that_was_drawn_ends_in_a_verdict():
    learned, log = drawn_log(2500, (0.3, 0.3, 0.4)), drawn_log(2500, (0.3, 0.3, 0.4), seed=1)
    router = word_means().fit(learned)
    found = verdict_of_log(
        {"word_means": router, "cheap": Static(Static.Config(model="small"))}, log, pool_of(MODELS), learned=learned
    )
    assert (found.best_single, found.chosen_on, found.questions) == ("large", "train", 2500)
    best, cheap = found.gains
    assert (best.name, best.found, cheap.found) == ("word_means", "better", "worse")
    assert best.gain == pytest.approx(0.1, abs=0.05)  # .867 against .767
    assert cheap.saving == pytest.approx(0.9, abs=0.05)
    assert found.recommended.name == "word_means"


def test_a_log_without_lots_recommends_nothing():
    log = dataclasses.replace(drawn_log(200, (0.3, 0.3, 0.4)), signals={})
    found = verdict_of_log({"s": Static(Static.Config(model="small"))}, log, pool_of(MODELS))
    assert (found.recommended, found.gains, found.is_resolved) == (None, [], False)
    assert found.sentences() == [found.note, "No recommendation."]
    assert "no choice of the log was drawn" in found.note


def test_choices_that_the_log_cannot_have_made_are_not_compared():
    log = drawn_log(400, (0.5, 0.0, 0.5))
    found = verdict_of_log(
        {"m": Static(Static.Config(model="medium")), "any": Random(Random.Config())}, log, pool_of(MODELS)
    )
    assert "about 0% of its choices" in found.unfit["m"]
    assert set(found.unfit) == {"m", "any"}
    assert any("m was not compared" in sentence for sentence in found.sentences())
    assert found.best_single == "large"
