"""The study of CaRL's reward on HighwayEnv: what its arms are, its rule, and that it runs."""

import math

import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("highway_env")

from anabranch.studies.carl_highway import ARMS, FLOORS, Size, judge, make, run_of
from anabranch.studies.harness import Results


def test_arms_differ_in_reward_and_road_alone():
    found = {name: run_of(name, Size()) for name in ARMS}
    first = found["simple-roundabout"]
    for name, run in found.items():
        environment = run.task.environment
        assert environment.own_reward == name.startswith("own")
        road = name.partition("-")[2]
        assert environment.id == {"intersection": "intersection-v2"}.get(road, f"{road}-v1")
        # Ten seconds of a danger, whose decisions are of a second, or a fifth of one.
        assert environment.reward.window == (50 if road == "racetrack" else 10)
        assert run.task.gamma == (0.9 if road == "racetrack" else 0.8)
        assert run.task.reward_scale == (1.0 if name.startswith("own") else 0.1)
        assert run.train == first.train
        for field in vars(run.task).keys() - {"environment", "reward_scale", "gamma"}:
            assert getattr(run.task, field) == getattr(first.task, field), field


def test_the_rule():
    def runs(arrived, collided):
        return {seed: {"arrived": arrived + 0.004 * seed, "collided": collided - 0.003 * seed} for seed in range(5)}

    def other(arrived, collided):
        return {seed: {"arrived": arrived + 0.001 * seed**2, "collided": collided} for seed in range(5)}

    found = judge(Results({"simple-roundabout": runs(0.8, 0.1), "own-roundabout": other(0.8, 0.3)}))
    assert [claim.verdict for claim in found] == ["holds", "holds", *["not run"] * 4]
    found = judge(Results({"simple-intersection": runs(0.55, 0.5), "own-intersection": other(0.8, 0.2)}))
    assert [claim.verdict for claim in found] == [*["not run"] * 2, *["does not hold"] * 2, *["not run"] * 2]
    few = {seed: metrics for seed, metrics in runs(0.8, 0.1).items() if seed < 4}
    assert judge(Results({"simple-roundabout": few, "own-roundabout": few}))[0].verdict == "not resolved"


@pytest.mark.parametrize("less", [0.0, 0.01])
@pytest.mark.parametrize("collided", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("who", ["both", "simple"])
def test_no_claim_holds_where_nothing_is_learned(who, share, collided, less):
    """Nobody arrives, or no more than by doing always the same; they stand, or collide. Or those of CaRL's reward alone do."""
    found = {}
    for arm in ARMS:
        arrived = share * (FLOORS[arm.partition("-")[2]] - 0.02) if who == "both" or arm.startswith("simple") else 0.9
        found[arm] = {
            seed: {"arrived": max(arrived - less * (seed % 2), 0.0), "collided": min(collided, 1 - arrived)}
            for seed in range(5)
        }
    for claim in judge(Results(found)):
        assert claim.verdict != "holds", claim.claim


@pytest.mark.parametrize("own", [0.0, 0.19, 0.21, 0.5, 0.69, 0.71, 1.0])
@pytest.mark.parametrize("stands", [False, True])
def test_who_always_arrives_is_no_worse_than_any(own, stands):
    """Also where HighwayEnv's reward has not learned to drive, and collides or stands."""
    found = {}
    for arm in ARMS:
        arrived = own if arm.startswith("own") else 1.0
        found[arm] = {
            seed: {
                "arrived": arrived - 1e-4 * seed * arrived,
                "collided": 0.0 if stands else 1e-4 * seed * arrived + 1 - arrived,
            }
            for seed in range(5)
        }
    assert {claim.verdict for claim in judge(Results(found))} == {"holds"}


def test_who_stands_does_not_collide_less():
    """The policy of CaRL's reward stands and collides with nobody, that of HighwayEnv's drives: no claim may hold."""
    runs = {
        "simple": {seed: {"arrived": 0.0, "collided": 0.0} for seed in range(5)},
        "own": {seed: {"arrived": 0.8 + 0.01 * seed, "collided": 0.15 - 0.01 * seed} for seed in range(5)},
    }
    found = judge(Results({arm: runs[arm.partition("-")[0]] for arm in ARMS}))
    assert [claim.verdict for claim in found] == ["does not hold", "not resolved"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own-roundabout", "simple-racetrack"])
def test_an_arm_runs(name):
    study = make()
    assert study.seeds == (0, 1)
    arm = next(arm for arm in study.arms if arm.name == name)
    found = study.run(arm.config, 0, lambda text: None)
    assert {column.metric for column in study.columns} <= found.keys()
    assert found["samples"] == 16
    assert all(math.isfinite(found[column.metric]) for column in study.columns)


def test_both_sizes_are_made():
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    assert make(samples=64).settings["samples"] == 64
    with pytest.raises(ValueError, match="samples is 0"):
        Size(samples=0)
