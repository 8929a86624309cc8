import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.graphrouter import Case, draw, judge, make, run
from anabranch.studies.graphrouter_runs import (
    UNIT,
    area,
    baseline,
    earned,
    packed,
    parts,
    run_newcomers,
    run_online,
    unpacked,
)
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)

QUESTIONS = 300


def rewards(shift, seeds=5, noise=0.02):
    """Runs of an arm: on every question the same reward but for the shift and a little of its own."""
    found = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        shared, own = (
            rng.uniform(0, 0.5, QUESTIONS),
            np.random.default_rng([seed, round(1000 * (shift + 2))]).normal(0, noise, QUESTIONS),
        )
        each = shared + own + shift
        found[seed] = {"rows": packed(100 * (seed % 2) + np.arange(QUESTIONS))}
        for scenario in ("performance", "balance", "cost"):
            found[seed] |= {scenario: float(each.mean()), f"{scenario}_each": packed(np.round(UNIT * each))}
    return found


def verdicts(**arms):
    return {
        claim.claim: claim for claim in judge(Results({name.replace("_", "-"): runs for name, runs in arms.items()}))
    }


def found(claims, start):
    return next(claim for name, claim in claims.items() if name.startswith(start))


def test_packing_comes_back():
    value = np.array([-32_000, -1, 0, 7, 32_000])
    assert (unpacked(packed(value)) == value).all()


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "holds"), (0.02, "not resolved"), (-0.01, "does not hold")])
def test_two_points_over_the_best_single_model(gain, verdict):
    claim = found(verdicts(single=rewards(0), mean=rewards(gain)), "mean beats")
    assert claim.verdict == verdict
    assert claim.difference == pytest.approx(gain, abs=0.003)
    assert claim.interval[0] < claim.difference < claim.interval[1]


@pytest.mark.parametrize("scenario", ["Performance First", "Balance", "Cost First"])
@pytest.mark.parametrize("best", ["single", "task-told", "knn", "kmeans", "ridge"])
def test_plus_is_held_against_the_best_baseline_that_is_told_no_task(scenario, best):
    """In each scenario, whichever it is; what is told the task, and the oracle, are none."""
    others = {arm: rewards(0.1) for arm in ("single", "task-told", "knn", "kmeans", "ridge")}
    told = {"task": rewards(0.3), "oracle": rewards(0.4)}
    for gain, verdict in ((0.11, "does not hold"), (0.14, "holds")):
        claims = verdicts(**told, **{**others, best: rewards(0.12)}, plus=rewards(gain))
        assert claims[f"plus is at least as good as the best baseline ({best}), {scenario}"].verdict == verdict
        assert claims[f"plus is better than the best baseline ({best}) by a point, {scenario}"].verdict == verdict


def test_the_primary_claim_is_the_papers_margin():
    study = make(full=True)
    claim = next(claim for claim in study.judge(Results({})) if claim.claim == study.primary)
    assert claim.claim.startswith("12.3% above the best baseline")
    assert claim.paper.startswith("at least 12.3%")


def test_the_papers_margin_is_relative_to_the_best_baseline():
    claims = verdicts(single=rewards(0.1), ridge=rewards(0.25), plus=rewards(0.3))
    claim = found(claims, "12.3% above")
    assert "(ridge)" in claim.claim
    assert claim.verdict == "does not hold"  # .05 of .5, where .0615 is asked for
    assert found(verdicts(ridge=rewards(0.25), plus=rewards(0.4)), "12.3% above").verdict == "holds"


def newcomers(**gains):
    """Runs of the arm: the pool without new models earns .6."""
    runs = {}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        runs[seed] = {"old": 0.6, **{name: 0.6 + gain + rng.normal(0, 0.002) for name, gain in gains.items()}}
    return runs


def test_new_models_by_shots():
    claims = verdicts(newcomers=newcomers(ours_30=0.005, ours_100=0.02, ours_400=0.03, knn_100=0.0, full=0.04))
    assert {claim.verdict for claim in claims.values()} == {"holds"}
    assert len(claims) == 5
    bad = verdicts(newcomers=newcomers(ours_30=-0.02, ours_100=-0.01, ours_400=0.005, knn_100=-0.005, full=0.06))
    assert (
        found(bad, "30 shots").verdict
        == found(bad, "100 shots: no worse").verdict
        == found(bad, "100 shots: .8").verdict
    )
    assert found(bad, "400 shots").verdict == "does not hold"
    assert found(bad, "more shots").verdict == "holds"


def test_areas_and_streams():
    arms = {
        "plus": {seed: {"aiq": 0.7} for seed in range(3)},
        "reference": {seed: {"aiq": 0.6 + 0.001 * seed} for seed in range(3)},
        "kmeans": {seed: {"aiq": 0.71 + 0.001 * seed} for seed in range(3)},
        "online": {seed: {"reward": 0.65 + 0.001 * seed, "frozen": 0.66} for seed in range(3)},
        "linucb": {seed: {"reward": 0.64} for seed in range(3)},
    }
    claims = verdicts(**arms)
    area = "one plus for the three trade-offs: area at least that of"
    assert claims[f"{area} three reference models"].verdict == "holds"
    assert claims[f"{area} k-means"].verdict == "does not hold"
    assert found(claims, "learning from its own").verdict == "holds"
    assert found(claims, "learning on").verdict == "does not hold"


def test_nothing_is_claimed_of_arms_that_did_not_run():
    assert judge(Results({"random": rewards(0)})) == []


def test_configs_read_back_and_the_study_is_listed():
    assert "graphrouter" in names()
    for study in (find("graphrouter")(full=True), make()):
        for arm in study.arms:
            assert from_dict(Case, to_dict(arm.config)) == arm.config
        assert "published" not in study.default_arms


def test_baselines_and_bounds_on_made_topics():
    part = parts("made", 0)
    mean = {
        name: earned(part, {"performance": baseline(name, part, "performance", 0)})["performance"]
        for name in ("random", "single", "task", "task-told", "knn", "kmeans", "ridge", "oracle")
    }
    assert mean["oracle"] == pytest.approx(part.test.score_NM.max(1).mean())
    assert mean["single"] == pytest.approx(part.test.score_NM[:, part.train.score_NM.mean(0).argmax()].mean())
    assert max(mean.values()) == mean["oracle"]
    assert min(mean["task"], mean["knn"]) > mean["random"]
    assert not set(part.train.query) & set(part.test.query)


def test_the_area_of_one_choice_is_its_effect_from_its_cost_on():
    part = parts("made", 0)
    cheapest, best = np.zeros(len(part.test), int), part.test.score_NM.argmax(1)
    cost, effect = part.cost_QM.mean(0), part.test.score_NM.mean(0)
    assert area(part, [cheapest]) == pytest.approx(effect[0])
    paid = part.cost_QM[np.arange(len(best)), best].mean()
    slope = (paid - cost[0]) / (cost[-1] - cost[0])
    assert area(part, [best]) == pytest.approx(
        (1 - slope / 2) * part.test.score_NM.max(1).mean() + slope / 2 * effect[0]
    )


def test_areas_are_of_the_three_scenarios_for_every_arm_alike():
    """What `plus` reaches at more trade-offs stands beside it, and is held against nobody."""
    configs = {arm.name: arm.config for arm in make().arms}
    part = parts("made", 0)
    for name in ("single", "task-told", "knn", "kmeans", "ridge"):
        choices = [baseline(name, part, scenario, 0) for scenario in ("performance", "balance", "cost")]
        assert run(configs[name], 0, print)["aiq"] == area(part, choices)
    plus = run(configs["plus"], 0, print)
    assert plus["aiq"] <= plus["aiq_all"]
    assert "aiq_all" not in run(configs["mean"], 0, print)


def test_small_runs(tmp_path):
    study = make()
    outcome = run_study(study, tmp_path, arms=["single", "knn", "kmeans", "mean", "plus"], seeds=[0, 1])
    assert {claim.verdict for claim in outcome.claims} <= {"holds", "does not hold", "not resolved", "not run"}
    assert (tmp_path / "graphrouter.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "graphrouter" / "plus-seed0.json").read_text())
    assert 0 < kept["metrics"]["aiq"] <= 1
    assert (tmp_path / "graphrouter" / "plus-seed0.json").stat().st_size < 20_000


def test_new_models_and_streams_run():
    configs = {arm.name: arm.config for arm in make().arms}
    grown = run_newcomers(configs["newcomers"].router, "made", 0)
    assert len(grown["new"]) == 3
    assert {"old", "full", "ours_30", "trusting_400", "knn_100", "uses_400", "add_cpu_ms_100"} <= grown.keys()
    graph = run_online("online", configs["online"].router, (), "made", 0, 60, 80)
    bandit = run_online("linucb", configs["online"].router, (0.1, 0.5), "made", 0, 60, 80)
    assert bandit["reward"] == max(bandit["alpha_0.1"], bandit["alpha_0.5"])
    assert 0 < graph["reward"] < 1


def test_the_picture_of_no_newcomers(tmp_path):
    draw(Results({"single": rewards(0), "plus": rewards(0.1)}), tmp_path / "graphrouter")
    assert (tmp_path / "graphrouter.svg").exists()
