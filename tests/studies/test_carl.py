"""The study of CaRL: what its arms are, its rule, and that it runs."""

import math

import pytest

from anabranch.rl.rewards import FACTORS
from anabranch.studies.carl import ARMS, Size, judge, make, run_of
from anabranch.studies.harness import Results


def test_arms_differ_in_batch_and_reward_alone():
    size = Size()
    found = {name: run_of(name, size) for name in ARMS}
    batches = {name: (run.train.batch_size, run.task.collecting.num_samples) for name, run in found.items()}
    for reward in ("simple", "shaped"):
        assert [batches[f"{reward}-{each}"] for each in (256, 2048, 16384)] == [
            (256, 1024),
            (2048, 8192),
            (16384, 65536),
        ]
    assert batches["no-hint"] == batches["no-factors"] == (2048, 8192)
    gammas = {name: run.task.gamma for name, run in found.items() if name.startswith("gamma")}
    assert gammas == {"gamma-0.95": 0.95, "gamma-0.98": 0.98, "gamma-0.999": 0.999}
    assert {batches[name] for name in gammas} == {(2048, 8192)}
    assert {run.train.learning_rate for name, run in found.items() if name in gammas} == {2.5e-4 * math.sqrt(8)}
    # The square root of 64 and of 8.
    rates = [found[f"simple-{each}"].train.learning_rate / 2.5e-4 for each in (256, 2048, 16384)]
    assert rates == pytest.approx([1, math.sqrt(8), 8])
    assert rates == [found[f"shaped-{each}"].train.learning_rate / 2.5e-4 for each in (256, 2048, 16384)]
    for name, run in found.items():
        world = run.task.environment.world
        assert world.shaped == name.startswith("shaped")
        assert world.reward.hint == (0 if name == "no-hint" else -1)
        assert [getattr(world.reward, factor) for factor in FACTORS] == [name != "no-factors"] * 5
        same = {"num_envs", "rollout_steps", "environment"} | ({"gamma"} if name in gammas else set())
        for field in vars(run.task).keys() - same:
            assert getattr(run.task, field) == getattr(found["simple-256"].task, field), field
        # Whole rollouts: no more than one is left over.
        samples = run.train.steps * run.train.batch_size // run.task.epochs
        assert 4_000_000 - 65_536 < samples <= 4_000_000


def test_the_rule():
    def runs(score, still):
        return {
            seed: {"driving_score": score + 0.3 * seed, "stands_still": still + 0.002 * seed**2} for seed in range(5)
        }

    found = {
        claim.claim.partition(" mini-batches")[0]: claim.verdict
        for claim in judge(
            Results(
                {
                    "simple-16384": runs(60.0, 0.01),
                    "shaped-16384": runs(40.0, 0.3),
                    "simple-256": runs(58.0, 0.0),
                }
            )
        )
    }
    assert list(found.values()) == ["holds", "holds", "not run", "holds"]
    near = judge(Results({"simple-16384": runs(49.0, 0.0), "shaped-16384": runs(40.0, 0.0)}))[0]
    assert near.verdict == "does not hold"
    few = {seed: metrics for seed, metrics in runs(60.0, 0.0).items() if seed < 4}
    assert judge(Results({"simple-16384": few, "shaped-16384": few}))[0].verdict == "not resolved"


def test_an_arm_runs():
    pytest.importorskip("gymnasium")
    study = make()
    assert study.seeds == (0, 1)
    arm = next(arm for arm in study.arms if arm.name == "shaped-256")
    found = study.run(arm.config, 0, lambda text: None)
    assert {column.metric for column in study.columns} <= found.keys()
    assert found["samples"] > 0
    assert all(math.isfinite(value) for value in found.values())


def test_both_sizes_are_made():
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    assert make(samples=1024).settings["samples"] == 1024
    with pytest.raises(ValueError, match="samples is 0"):
        Size(samples=0)
