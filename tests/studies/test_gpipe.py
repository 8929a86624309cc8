import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.gpipe import arms, draw, judge, make
from anabranch.studies.gpipe_runs import Bubble, Exact, Memory, run, run_bubble
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)


def one(metric, *values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("arm", "metric", "good", "bad"),
    [
        ("exact-mlp", "gradient", 1e-11, 1e-9),
        ("exact-cnn", "statistics", 1e-7, 1e-5),
        ("bubble-4", "time_off", 0.08, 0.081),
        ("bubble-8", "idle_off", 0.03, 0.031),
        ("speed", "loss_off", 1e-5, 1e-3),
        ("memory", "slope_ratio", 0.35, 0.36),
        ("memory", "depth_gain_1", 3.0, 2.9),
        ("memory", "depth_gain_4", 10.0, 9.9),
    ],
)
def test_the_worst_seed_decides(arm, metric, good, bad):
    for values, verdict in (((good, good), "holds"), ((good, bad), "does not hold"), ((good,), "not resolved")):
        (claim,) = judge(Results({arm: one(metric, *values)}))
        assert claim.verdict == verdict
        assert claim.ours == values[-1]


@pytest.mark.parametrize(
    ("speeds", "cores", "verdict"),
    [
        ((1.5, 1.7), (0.9, 0.8), "holds"),
        ((1.5, 1.4), (0.9, 0.9), "does not hold"),
        ((1.5, 1.4), (0.9, 0.7), "not resolved"),
        ((1.9,), (0.9,), "not resolved"),
    ],
)
def test_speed_is_judged_where_there_are_two_cores(speeds, cores, verdict):
    runs = {
        seed: {"speedup": speed, "cores": core} for seed, (speed, core) in enumerate(zip(speeds, cores, strict=True))
    }
    (claim,) = judge(Results({"speed": runs}))
    assert claim.verdict == verdict


def test_learning_is_compared_seed_by_seed():
    runs = {"lm-1": one("validation", 2.0, 3.0), "lm-4": one("validation", 2.00005, 3.00005)}
    (claim,) = judge(Results(runs))
    assert (claim.verdict, claim.ours) == ("holds", pytest.approx(5e-5))


def test_equal_up_to_rounding_is_a_test():
    study = make(full=True)
    marked = {claim.claim for claim in study.judged(Results({})) if claim.exact}
    assert study.plan()["primary"] in marked
    assert len(marked) == 4
    assert all(claim.startswith("E1: ") for claim in marked)


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0,), (0, 1, 2, 3, 4))
    assert len(full.arms) == 10
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "gpipe" in names()
    assert find("gpipe") is make


@pytest.mark.parametrize("model", ["mlp", "cnn", "lm"])
def test_gradients_are_exact_in_small(model):
    found = run(Exact(model=model, stages=(1, 3), micro_batches=(1, 3), items=5), 0, lambda text: None)
    assert found["ways"] == 24
    assert found["gradient"] < 1e-10
    assert found.get("statistics", 0.0) < 1e-6


def test_recomputation_keeps_less():
    found = run(Memory(depths=(4, 8), width=8, items=32, micro_batches=4, budget_depth=4), 0, lambda text: None)
    assert found["slope_ratio"] < found["never_ratio"]
    assert found["never_ratio"] == pytest.approx(1, abs=0.1)
    assert found["depth_gain_4"] > found["depth_gain_1"] > 1


def test_sleeping_stages_take_no_less_than_the_law():
    found = run_bubble(Bubble(stages=2, micro_batches=(2,), sleep_s=0.05, repeats=1), lambda text: None)
    # 2 (M + K - 1) slots of sleep; how much more is the study's to find.
    assert found["seconds"][0] >= 2 * 3 * 0.05


@pytest.mark.slow
def test_runs_end_to_end(tmp_path):
    outcome = run_study(make(steps=3, stages=(2,)), tmp_path / "results")
    assert not outcome.missing
    assert set(outcome.results.runs) == set(arms(False, 3, stages=(2,)))
    assert {claim.verdict for claim in outcome.claims} <= {"not resolved", "not run"}
    assert (tmp_path / "results" / "gpipe.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")
