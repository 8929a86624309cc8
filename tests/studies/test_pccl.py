"""The study of PCCL: its rule, and each part in small."""

import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.pccl import WAYS, arms, draw, judge, make
from anabranch.studies.pccl_runs import Far, Hidden, Learn, Rings, run
from claims import run_only

judge = run_only(judge)


def one(metric, *values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("arm", "metric", "good", "bad"),
    [
        ("churn", "completed", 0.99, 0.98),
        ("churn", "sound", 1.0, 0.0),
        ("churn", "gap_s", 4.0, 4.1),
        ("rings", "off", 0.0, 1e-6),
        ("rings", "searched_off", 0.05, 0.06),
        ("rings", "gain", 1.5, 1.4),
        ("far", "gain", 4.0, 3.9),
        ("hidden", "hidden", 0.8, 0.7),
        ("learn-ddp", "spread", 0.0, 1e-9),
    ],
)
def test_the_worst_seed_decides(arm, metric, good, bad):
    for values, verdict in (((good, good), "holds"), ((good, bad), "does not hold"), ((good,), "not resolved")):
        (claim,) = judge(Results({arm: one(metric, *values)}))
        assert claim.verdict == verdict
        assert claim.ours == values[-1]


@pytest.mark.parametrize(
    ("metric", "ours", "baseline", "limit"),
    [
        ("validation", "diloco", "ddp", 1.02),
        ("bytes", "diloco", "ddp", 0.021),
        ("validation", "quantised", "diloco", 1.005),
        ("bytes", "quantised", "diloco", 0.27),
        ("validation", "churned", "diloco", 1.01),
    ],
)
def test_ways_to_learn_are_compared_seed_by_seed(metric, ours, baseline, limit):
    runs = {f"learn-{baseline}": one(metric, 100.0, 200.0)}
    for value, verdict in ((limit, "holds"), (limit * 1.01, "does not hold")):
        (claim,) = judge(Results(runs | {f"learn-{ours}": one(metric, 50.0 * limit, 200.0 * value)}))
        assert (claim.verdict, claim.ours) == (verdict, pytest.approx(value))


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0,), (0, 1, 2, 3, 4))
    assert len(full.arms) == 4 + len(WAYS)
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "pccl" in names()
    assert find("pccl") is make


def test_tours_far_ways_and_sleeping_rounds_in_small():
    found = run(Rings(draws=3, peers=4), 0, print)
    assert found["off"] < 1e-9
    assert found["gain"] >= 1
    assert run(Far(delay_s=0.001, numbers=4096, repeats=1), 0, print).keys() == {"gain", "one_s", "several_s"}
    found = run(Hidden(rounds=2, every=2, step_s=0.01, numbers=4096), 0, print)
    assert found["plain_wait_s"] > 0


@pytest.mark.parametrize("way", ["ddp", "quantised", "churned"])
def test_workers_learn_the_same_in_small(way):
    # Half of the steps ends a round, as it does at the recorded size.
    small = Learn(way=way, workers=2, steps=8, every=2, width=16, layers=1, batch=2, length=16)
    found = run(small, 0, lambda text: None)
    assert found["spread"] == 0
    assert found["workers"] == 2
    assert found["bytes"] > 0
    assert 0 < found["validation"] < 10


@pytest.mark.slow
def test_runs_end_to_end(tmp_path):
    outcome = run_study(make(steps=100, seconds=3.0), tmp_path / "results")
    assert not outcome.missing
    assert set(outcome.results.runs) == set(arms(False, 100, 3.0))
    assert {claim.verdict for claim in outcome.claims} == {"not resolved"}
    assert (tmp_path / "results" / "pccl.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")
