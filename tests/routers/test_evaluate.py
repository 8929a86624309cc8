import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.contract.query import Decision
from anabranch.routers.contract.strategy import Strategy, ordered, played
from anabranch.routers.data import pool_of, split
from anabranch.routers.referee import baselines as rules
from anabranch.routers.referee import decision_latency, evaluate, preference
from made_outcomes import MODELS, WordMeans, made_outcomes


class Always(Strategy, kind=None):
    """One column, whatever is asked."""

    column = 0

    def route(self, query, pool):
        score = -np.abs(np.arange(len(pool)) - float(self.column))
        return Decision(candidates=ordered(pool, score), strategy="always", reason="as told")


class Second(Always):
    column = 1


class Hindsight(Strategy, kind=None):
    """Knows the outcomes; routes nothing."""

    def play(self, data, pool):
        return played(data, np.argmax(data.score_NM, axis=1))


class Deaf(Strategy, kind=None):
    needs_vector = True


def word_means(**fields):
    return Ranked(Ranked.Config(predictor=WordMeans.Config(**fields)))


def by_hand():
    return Recorded(
        query=("a", "b", "c", "d"),
        models=("weak", "strong"),
        task=("x", "x", "y", "y"),
        score_NM=np.array([[1, 1], [0, 1], [0, 1], [1, 0.0]]),
        cost_NM=np.array([[1, 4], [1, 4], [2, 4], [2, 4.0]]),
    )


def test_baselines_by_hand():
    data = by_hand()
    report = evaluate({"always": Always(Always.Config())}, train=None, test=data)
    assert report.baselines["random"] == {
        "score": 0.625,
        "cost": 2.75,
        "aiq": pytest.approx((1.25 * 0.5625 + 1.25 * 0.625) / 2.5),
    }
    assert {name: (row["score"], row["cost"]) for name, row in report.singles.items()} == {
        "weak": (0.5, 1.5),
        "strong": (0.75, 4.0),
    }
    best = report.baselines["best_single"]
    assert (best["model"], best["score"], best["aiq"]) == ("strong", 0.75, 0.625)  # mixed with the weak model
    task = report.baselines["best_per_task"]
    assert task["models"] == {"x": "strong", "y": "weak"}  # of equals the cheaper one
    assert (task["score"], task["cost"]) == (0.75, 3.0)
    oracle = report.baselines["oracle"]
    assert (oracle["score"], oracle["cost"]) == (1.0, (1 + 4 + 4 + 2) / 4)
    assert report.mixing == {"aiq": 0.625, "curve": [[1.5, 0.5], [4.0, 0.75]]}
    assert report.cost_range == (1.5, 4.0)


def test_a_standing_by_hand():
    report = evaluate({"weak": Always(Always.Config()), "strong": Second(Second.Config())}, train=None, test=by_hand())
    weak, strong = report.strategies
    assert (weak.score, weak.cost, weak.gain, weak.gap, weak.regret) == (0.5, 1.5, -0.25, 0.5, 0.5)
    assert (strong.score, strong.gain, strong.gain_interval, strong.p) == (0.75, 0.0, [0.0, 0.0], 1.0)
    assert weak.calls == {"weak": 1.0, "strong": 0.0}
    assert weak.cost_save is None
    assert strong.cost_save == 0.0
    assert (strong.aiq, weak.aiq) == (0.625, 0.5)  # budgets below its cost are met by mixing with the weak model
    assert strong.aiq_routerbench == 0.0
    assert (weak.pareto_distance, strong.pareto_distance) == (0.0, 0.0)
    assert weak.apgr == pytest.approx(0.5)  # it prefers no query to another


def test_regret_weighs_dollars():
    data = by_hand()
    report = evaluate({"strong": Second(Second.Config())}, train=None, test=data, dollar=0.5)
    utility = data.score_NM - 0.5 * data.cost_NM
    assert report.strategies[0].regret == pytest.approx(np.mean(utility.max(1) - utility[:, 1]))


def test_the_best_single_model_is_chosen_on_what_is_learned_from():
    test = by_hand()
    train = Recorded(query=("e", "f"), models=test.models, score_NM=np.array([[1, 0], [1, 0.0]]), task=("x", "z"))
    report = evaluate({"always": Always(Always.Config())}, train=train, test=test, seeds=[0])
    assert report.baselines["best_single"]["model"] == "weak"
    assert report.baselines["best_per_task"]["score"] == 0.5
    assert report.num_train == 2


def test_learning_the_topic_beats_the_best_single_model():
    train, test = split(made_outcomes(600), seed=1)
    report = evaluate({"word_means": word_means()}, train=train, test=test, seeds=[0])
    one = report.strategies[0]
    assert one.gain > 0
    assert one.p_holm < 0.05
    assert one.score == pytest.approx(report.baselines["best_per_task"]["score"])  # the word is the topic
    assert report.baselines["oracle"]["aiq"] >= one.aiq >= report.mixing["aiq"]


def test_a_trade_off_of_zero_is_the_best_quality_and_a_huge_one_the_cheapest_model():
    train, test = split(made_outcomes(300), seed=2)
    one = evaluate({"word_means": word_means()}, train=train, test=test, seeds=[0]).strategies[0]
    fitted = word_means().fit(train)
    best = np.argmax(fitted.predictor.predict(test).quality_NM, axis=1)
    assert one.score == pytest.approx(test.score_NM[np.arange(len(test)), best].mean())
    assert min(one.curve)[1] == pytest.approx(test.score_NM[:, 0].mean())


def test_seeds_are_averaged_and_repeat():
    train, test = split(made_outcomes(200), seed=3)
    report = evaluate({"noisy": word_means(noise=0.3)}, train=train, test=test, seeds=[0, 1, 2])
    one = report.strategies[0]
    assert len(set(one.by_seed)) > 1
    assert one.score == pytest.approx(np.mean(one.by_seed))
    again = evaluate({"noisy": word_means(noise=0.3)}, train=train, test=test, seeds=[0, 1, 2]).strategies[0]
    assert again.replace(latency_ms=None, fit_s=None) == one.replace(latency_ms=None, fit_s=None)


def test_no_strategy_passes_the_oracle():
    test = made_outcomes(80)
    report = evaluate(
        {"hindsight": Hindsight(Hindsight.Config()), "always": Always(Always.Config())}, train=None, test=test
    )
    hindsight, always = report.strategies
    assert hindsight.score == report.baselines["oracle"]["score"] >= always.score
    assert hindsight.gap == 0
    assert hindsight.latency_ms is None  # it cannot route
    assert always.latency_ms["p50"] <= always.latency_ms["p99"]


def test_two_models_are_judged_by_the_order_of_queries():
    data = made_outcomes(400).only(["small", "large"])
    train, test = split(data, seed=0)
    one = evaluate({"word_means": word_means()}, train=train, test=test, seeds=[0]).strategies[0]
    fitted = word_means().fit(train)
    by_predictor = preference(fitted, test, pool_of(test.models), "large", "small")
    by_routes = [
        {item.model: item.score for item in fitted.route(query, pool_of(test.models)).candidates}
        for query in test.queries()
    ]
    np.testing.assert_allclose(by_predictor, [scores["large"] - scores["small"] for scores in by_routes])
    assert 0.5 < one.apgr < 1.5
    assert one.cpt["20%"] <= one.cpt["50%"] <= one.cpt["80%"]
    assert one.apgr_in_bins == pytest.approx(one.apgr, abs=0.1)


def test_a_shared_question_is_refused_unless_allowed():
    data = made_outcomes(40)
    train = data.take(range(30))
    shouted = data.take([3, *range(30, 40)])
    shouted = Recorded(
        query=(f" {shouted.query[0].upper()}", *shouted.query[1:]), models=data.models, score_NM=shouted.score_NM
    )
    with pytest.raises(DataError, match=r"1 of 11 test questions were learned from"):
        evaluate({"word_means": word_means()}, train=train, test=shouted)
    assert evaluate({"word_means": word_means()}, train=train, test=shouted, allow_leak=True, seeds=[0]).num_test == 11


def test_questions_without_every_outcome_are_left_out_and_counted():
    data = made_outcomes(30)
    score_NM = data.score_NM.copy()
    score_NM[:4, 1] = np.nan
    cost_NM = data.cost_NM.copy()
    cost_NM[4, 2] = np.nan
    data = Recorded(query=data.query, models=MODELS, score_NM=score_NM, cost_NM=cost_NM)
    report = evaluate({"always": Always(Always.Config())}, train=None, test=data)
    assert (report.num_test, report.left_out) == (25, 5)
    assert math.isfinite(report.strategies[0].score)


def test_without_costs_what_needs_them_is_none():
    data = made_outcomes(30)
    data = Recorded(query=data.query, models=MODELS, score_NM=data.score_NM)
    report = evaluate({"always": Always(Always.Config())}, train=None, test=data)
    one = report.strategies[0]
    assert (one.cost, one.aiq, one.curve, one.cost_save, report.mixing, report.cost_range) == (None,) * 6
    assert "best_per_task" not in report.baselines
    assert report.baselines["oracle"]["aiq"] is None
    assert "$" not in "".join(cell for row in report.rows() for cell in row)


def test_one_model_and_constant_scores():
    data = made_outcomes(10).only(["small"])
    one = evaluate({"always": Always(Always.Config())}, train=None, test=data).strategies[0]
    assert (one.gain, one.gap, one.p) == (0, 0, 1)
    same = Recorded(query=data.query, models=("a", "b"), score_NM=np.ones((10, 2)))
    report = evaluate({"always": Always(Always.Config())}, train=None, test=same)
    assert report.strategies[0].apgr is None  # no gap to recover
    assert report.baselines["oracle"]["score"] == 1


def test_one_that_fails_does_not_spoil_the_rest():
    report = evaluate(
        {"deaf": Deaf(Deaf.Config()), "always": Always(Always.Config())}, train=None, test=made_outcomes(20)
    )
    assert list(report.failed) == ["deaf"]
    assert "needs vectors" in report.failed["deaf"]
    assert [one.name for one in report.strategies] == ["always"]
    assert "deaf was left out" in report.to_markdown()


@pytest.mark.parametrize("num", [0, 5])
def test_a_test_that_says_nothing_is_refused(num):
    empty = Recorded(query=tuple(map(str, range(num))), models=MODELS, score_NM=np.full((num, 3), np.nan))
    with pytest.raises(DataError, match=f"none of the {num} test questions"):
        evaluate({"always": Always(Always.Config())}, train=None, test=empty)


def test_bad_arguments_are_named():
    data = made_outcomes(20)
    with pytest.raises(InputError, match="no strategy could be judged; deaf"):
        evaluate({"deaf": Deaf(Deaf.Config())}, train=None, test=data)
    with pytest.raises(InputError, match="lacks the model 'large'"):
        evaluate({"always": Always(Always.Config())}, train=None, test=data, pool=pool_of(("small", "medium")))
    with pytest.raises(InputError, match="no model 'large'"):
        evaluate({"always": Always(Always.Config())}, train=data, test=made_outcomes(20, 1).only(["small", "medium"]))


def test_a_pool_in_another_order_is_put_in_that_of_the_data():
    data = made_outcomes(20)
    report = evaluate({"always": Always(Always.Config())}, train=None, test=data, pool=pool_of(MODELS[::-1]))
    assert report.strategies[0].calls["small"] == 1


def test_report_is_json_and_names_what_outside_readers_rely_on():
    train, test = split(made_outcomes(100), seed=0)
    found = json.loads(json.dumps(evaluate({"word_means": word_means()}, train=train, test=test).to_dict()))
    assert {"name", "score", "cost", "aiq", "interval", "p_holm", "latency_ms"} <= found["strategies"][0].keys()
    assert {"random", "best_single", "best_per_task", "oracle", "single", "mixing"} <= found["baselines"].keys()
    assert list(found["baselines"]["single"]) == list(MODELS)
    assert found["data"].keys() == {"train", "test"}
    assert found["seeds"] == [0, 1, 2]


def test_markdown_has_a_row_for_each_strategy_and_baseline():
    train, test = split(made_outcomes(100), seed=0)
    text = evaluate({"word_means": word_means()}, train=train, test=test, seeds=[0]).to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 + 2 + 1 + 4 + 3  # heads and rules, a strategy, mixing, baselines, single models
    assert all(line.count("|") == rows[0].count("|") for line in rows[:3])


def test_the_oracles_curve_gives_up_quality_for_cost():
    curve = rules.oracle(made_outcomes(60)).curve_P2
    cheapest = curve[np.argmin(curve[:, 0])]
    assert cheapest[0] == pytest.approx(made_outcomes(60).cost_NM[:, 0].mean())
    assert curve[0, 1] == curve[:, 1].max()


def test_latency_of_a_decision_is_measured_for_what_can_decide():
    p50, p99 = decision_latency(Always(Always.Config()), made_outcomes(10), pool_of(MODELS))
    assert 0 < p50 <= p99 < 1000


@given(st.integers(0, 10**6))
def test_no_area_passes_that_of_the_oracle(seed):
    generator = np.random.default_rng(seed)
    cost_NM = generator.uniform(0.1, 1, (12, 3)) * generator.uniform(0.1, 3, 3)
    data = Recorded(
        query=tuple(map(str, range(12))), models=MODELS, score_NM=generator.random((12, 3)), cost_NM=cost_NM
    )
    report = evaluate(
        {"always": Always(Always.Config()), "second": Second(Second.Config())}, train=None, test=data, draws=10
    )
    areas = [one.aiq for one in report.strategies] + [row["aiq"] for row in report.singles.values()]
    assert report.baselines["oracle"]["aiq"] >= max(areas) - 1e-9
    assert report.baselines["oracle"]["score"] >= max(one.score for one in report.strategies)
