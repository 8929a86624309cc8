"""The study of PCCL: its rule, and each part in small."""

import collections
import json

import pytest

from anabranch.cluster.pccl import Communicator, PeerLost
from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.studies import find, names
from anabranch.studies.corrected import settled
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
        ("validation", "asynchronous", "diloco", 1.02),
    ],
)
def test_ways_to_learn_are_compared_seed_by_seed(metric, ours, baseline, limit):
    runs = {f"learn-{baseline}": one(metric, 100.0, 200.0)}
    for value, verdict in ((limit, "holds"), (limit * 1.01, "does not hold")):
        (claim,) = judge(Results(runs | {f"learn-{ours}": one(metric, 50.0 * limit, 200.0 * value)}))
        assert (claim.verdict, claim.ours) == (verdict, pytest.approx(value))


@pytest.mark.parametrize("left_out", [None, *WAYS])
def test_weights_are_equal_where_all_ways_have_run(left_out):
    """A way that had not run counted as one that was equal."""
    runs = {f"learn-{way}": one("spread", 0.0, 0.0) for way in WAYS if way != left_out}
    found = judge(Results(runs))
    assert [claim.verdict for claim in found] == (["holds"] if left_out is None else [])
    if left_out is None:
        runs["learn-churned"] = one("spread", 1e-9)
        assert [(claim.verdict, claim.ours) for claim in judge(Results(runs))] == [("not resolved", 1e-9)]
        runs["learn-churned"] = one("spread", 0.0, 1e-9)
        assert [claim.verdict for claim in judge(Results(runs))] == ["does not hold"]


def test_no_claim_rests_on_the_seeds_of_other_arms():
    """Where rings had run five times, three seeds of a way to learn decided."""
    both = {f"learn-{way}": {seed: {"validation": 1.0} for seed in range(3)} for way in ("ddp", "diloco")}
    rings = {seed: {"off": 0.0} for seed in range(5)}
    found = {claim.claim: claim.verdict for claim in settled(judge(Results({**both, "rings": rings})), 5)}
    assert found == {
        "E2: tours are the cheapest of all": "holds",
        "E5: DiLoCo's loss is within 2 % of synchronous training's": "not resolved",
    }


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


SMALL = {"steps": 8, "every": 2, "width": 16, "layers": 1, "batch": 2, "length": 16}


@pytest.mark.parametrize("way", ["ddp", "quantised", "churned"])
def test_workers_learn_the_same_in_small(way):
    # Half of the steps ends a round, as it does at the recorded size.
    small = Learn(way=way, **SMALL, workers=2, absent=int(way == "churned"))
    found = run(small, 0, lambda text: None)
    assert found["spread"] == 0
    assert found["workers"] == 2
    assert found["bytes"] > 0
    assert 0 < found["validation"] < 10


def test_a_worker_dies_in_the_midst_of_a_reduction_and_the_others_go_on_without_it(monkeypatch):
    """It left politely between two rounds, and nobody did a step before another had taken its place."""
    lost, worlds = collections.Counter(), []
    inner = Communicator._reduce

    def reduce(self, one):
        try:
            made = inner(self, one)
        except PeerLost:
            lost[self.peer] += 1
            raise
        worlds.append(made.world)
        return made

    monkeypatch.setattr(Communicator, "_reduce", reduce)
    found = run(Learn(way="churned", workers=4, absent=1, **SMALL), 0, lambda text: None)
    assert len(lost) == 3
    # Of four rounds one is reduced again by three, one by three alone; each of them has as many reductions.
    assert collections.Counter(worlds)[3] * 4 == collections.Counter(worlds)[4] * 3
    assert set(worlds) == {3, 4}
    assert (found["workers"], found["least_world"], found["spread"]) == (4, 3, 0)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_death_leaves_rounds_without_it_and_with_another(absent):
    with pytest.raises(ConfigError, match=f"absent is {absent}"):
        run(Learn(way="churned", workers=2, absent=absent, **SMALL), 0, lambda text: None)


@pytest.mark.slow
def test_runs_end_to_end(tmp_path):
    outcome = run_study(make(steps=100, seconds=3.0), tmp_path / "results")
    assert not outcome.missing
    assert set(outcome.results.runs) == set(arms(False, 100, 3.0))
    assert {claim.verdict for claim in outcome.claims} == {"not resolved"}
    assert (tmp_path / "results" / "pccl.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")
