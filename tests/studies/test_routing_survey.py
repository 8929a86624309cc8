import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.routers import strategies
from anabranch.routers.data import pool_of
from anabranch.routers.strategies.bandit import Bandit
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.routing_survey import (
    BANDITS,
    BASELINES,
    Case,
    _packed,
    gains,
    judge,
    learners,
    made_up,
    make,
    online,
    part,
)
from claims import run_only

judge = run_only(judge)


def runs(scores, codes=None, name="llmrouter", **others):
    """Runs of an arm; ``codes`` are gains of each question, in 127ths."""
    found = {}
    for seed, score in enumerate(scores):
        found[seed] = {f"{name}_score": score, "seconds": 10.0, **{key: values[seed] for key, values in others.items()}}
        if codes is not None:
            found[seed][f"{name}_gains"] = _packed(np.array(codes[seed], "i1"))
    return found


def reference(rows, scores=(0.6, 0.6)):
    found = runs(scores)
    for seed, of_split in enumerate(rows):
        found[seed]["llmrouter_rows"] = _packed(np.array(of_split, "<u2"))
    return found


def verdicts(arms):
    return {claim.claim.partition(" (")[0]: claim for claim in judge(Results(arms))}


def test_gains_are_pooled_by_question():
    arms = {"best-single": reference([[0, 1, 2], [2, 3, 4]]), "a": runs([0.7, 0.7], [[127, 0, -127], [127, 0, 127]])}
    gain, p, corrected = gains(Results(arms), ["a"], "llmrouter")["a"]
    assert gain == pytest.approx((1 + 0 - 1 + 1 + 0 + 1) / 6)
    assert p == corrected
    assert gains(Results({"a": arms["a"]}), ["a"], "llmrouter") == {}


@pytest.mark.parametrize(("num_good", "verdict"), [(4, "holds"), (3, "does not hold")])
def test_winners_need_two_points_and_a_small_p(num_good, verdict):
    generator = np.random.default_rng(0)
    rows = [np.arange(400), np.arange(200, 600)]
    good = [127 * (generator.random(400) < 0.1) for _ in rows]
    noise = [generator.integers(-127, 128, 400) for _ in rows]
    small = [np.full(400, 1) for _ in rows]  # sure, but less than 1 point
    arms = {
        "best-single": reference(rows),
        "task": runs([0.7, 0.7], good),
        "noise": runs([0.6, 0.6], noise),
        "small": runs([0.6, 0.6], small),
    }
    arms |= {f"good{number}": runs([0.7, 0.7], good) for number in range(num_good)}
    claim = next(one for name, one in verdicts(arms).items() if name.startswith("at least 4"))
    assert (claim.ours, claim.verdict) == (num_good, verdict)


def test_one_split_resolves_nothing():
    arms = {"best-single": reference([[0, 1]], [0.6]), "random": runs([0.4]), "a": runs([0.7], [[127, 127]])}
    found = verdicts(arms)
    assert next(one for name, one in found.items() if name.startswith("at least 4")).verdict == "not resolved"
    assert found["no strategy is below chance on any set"].verdict == "not resolved"


@pytest.mark.parametrize(
    ("scores", "apgr", "verdict"),
    [
        ([0.5, 0.5], [0.6, 0.6], "holds"),
        ([0.5, 0.39], [0.6, 0.6], "does not hold"),
        ([0.5, 0.5], [0.6, 0.49], "does not hold"),
    ],
)
def test_chance_is_passed_in_every_split(scores, apgr, verdict):
    arms = {"random": runs([0.4, 0.4]), "a": runs(scores, routellm_mmlu_apgr=apgr), "b": runs([0.6, 0.6])}
    assert verdicts(arms)["no strategy is below chance on any set"].verdict == verdict


def test_chance_is_to_be_passed_on_every_set():
    """On MMLU an arm may be worse than random choice, though its scores order the questions well."""
    arms = {
        "random": runs([0.4, 0.4], routellm_mmlu_score=[0.74, 0.74]),
        "a": runs([0.5, 0.5], routellm_mmlu_apgr=[0.6, 0.6], routellm_mmlu_score=[0.68, 0.69]),
        "b": runs([0.6, 0.6], routellm_mmlu_score=[0.8, 0.8]),
    }
    claim = verdicts(arms)["no strategy is below chance on any set"]
    assert claim.verdict == "does not hold"
    assert (claim.ours, claim.baseline) == (pytest.approx(0.685), pytest.approx(0.74))


@pytest.mark.parametrize(
    ("apgr", "verdict"), [([0.69, 0.68], "holds"), ([0.70, 0.67], "not resolved"), ([0.6, 0.6], "does not hold")]
)
def test_apgr_of_the_best_arm(apgr, verdict):
    arms = {"a": runs([0.5, 0.5], routellm_mmlu_apgr=apgr), "b": runs([0.5, 0.5], routellm_mmlu_apgr=[0.55, 0.55])}
    claim = verdicts(arms)["the best strategy"]
    assert (claim.verdict, claim.ours) == (verdict, pytest.approx(np.mean(apgr)))


@pytest.mark.parametrize(
    ("after", "verdict"), [([0.66, 0.67], "holds"), ([0.66, 0.6], "does not hold"), ([0.5, 0.5], "does not hold")]
)
def test_each_bandit_is_held_against_ridge_by_itself_in_every_split(after, verdict):
    arms = {"ridge": runs([0.68, 0.70]), "linucb": runs([0.6, 0.6], llmrouter_online=after)}
    arms |= {"thompson": runs([0.6, 0.6], llmrouter_online=[0.69, 0.69])}
    found = verdicts(arms)
    claim = found["linucb reaches 95% of ridge regression that saw all outcomes, in every split"]
    assert claim.verdict == verdict
    assert claim.ours == pytest.approx(min(after[0] / 0.68, after[1] / 0.70))
    assert found["thompson reaches 95% of ridge regression that saw all outcomes, in every split"].verdict == "holds"


def test_every_bandit_has_its_claim():
    assert {name for name in learners() if isinstance(strategies.make(name), Bandit)} == set(BANDITS)


def test_two_points_are_tested_against_two_points():
    """All gain more than nothing for sure, and 2.5 points on average: that they gain more than 2 is not sure."""
    rows = [np.arange(400), np.arange(200, 600)]
    arms = {f"near{number}": runs([0.6, 0.6], [127 * (np.arange(400) % 40 == number)] * 2) for number in range(4)}
    results = Results({"best-single": reference(rows), **arms})
    for beyond, is_sure in ((0.0, True), (0.02, False)):
        for gain, p, _ in gains(results, list(arms), "llmrouter", beyond).values():
            assert gain == pytest.approx(0.025)
            assert (p < 0.05) is is_sure
    claim = next(one for name, one in verdicts(results.runs).items() if name.startswith("at least 4"))
    assert (claim.ours, claim.verdict) == (0, "does not hold")


def test_no_claim_is_said_to_be_of_the_survey():
    study = make(full=True)
    claims = {claim.claim: claim.paper for claim in study.judge(Results({}))}
    assert claims[study.primary].startswith("ours")


def test_speed_is_that_of_the_slowest_and_time_of_all():
    arms = {"a": runs([0.5], llmrouter_p99_ms=[0.2]), "b": runs([0.5], llmrouter_p99_ms=[1.2])}
    found = verdicts(arms)
    assert found["99 of 100 decisions within 1 ms, given a vector"].verdict == "does not hold"
    assert found["all strategies on all sets, one split, within 2,400 processor seconds"].ours == 20


def test_arms_are_the_strategies_that_learn():
    found = learners()
    assert {"knn", "ridge", "linucb"} <= set(found)
    assert not {"random", "static", "cheapest", "oracle", "ranked"} & set(found)
    study = make(full=True)
    assert [arm.name for arm in study.arms] == [*BASELINES, *found]
    assert all(from_dict(Case, to_dict(arm.config)) == arm.config for arm in study.arms)
    assert "routing_survey" in names()
    assert find("routing_survey") is make


def test_made_up_questions_reward_knowing_the_topic():
    data = made_up().data
    assert data.score_NM.max(1).mean() > data.score_NM.mean(0).max() + 0.1
    assert len(set(data.query)) == len(data)


def test_a_bandit_learns_from_what_it_chose_only():
    train, test, _, _ = part("made", 0, 128, 0.2)
    pool = pool_of(test.models)
    short, long = (online(strategies.make("linucb"), train, test, pool, rounds, 0) for rounds in (5, 400))
    assert long > short
    assert long > test.score_NM.mean()


def test_a_quick_look_runs_from_start_to_picture(tmp_path):
    outcome = run_study(make(), tmp_path, arms=[*BASELINES, "knn", "ridge", "linucb"])
    assert not outcome.missing
    found = json.loads((tmp_path / "routing_survey.json").read_text())
    # Two splits decide nothing.
    assert {claim["verdict"] for claim in found["claims"]} == {"not resolved", "not run"}
    assert (tmp_path / "routing_survey.png").read_bytes().startswith(b"\x89PNG")
    oracle, knn = (outcome.results.mean(arm, "made_score").mean for arm in ("oracle", "knn"))
    assert oracle > knn > outcome.results.mean("random", "made_score").mean
