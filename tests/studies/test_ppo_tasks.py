"""The study of PPO's presets: its arms, its rule, and that it runs."""

import math

import pytest

pytest.importorskip("gymnasium")

from anabranch.rl import training
from anabranch.studies.harness import Results
from anabranch.studies.ppo_tasks import ARMS, Size, judge, make, run, run_of


def test_arms_are_the_presets_as_they_are_shipped():
    for arm in ARMS:
        found, preset = run_of(arm, Size()), training(arm)
        assert found == preset.replace(task=preset.task.replace(eval_episodes=100))


def verdicts(cartpole=(), pendulum=()):
    runs = {
        name: {seed: {"mean_return": value} for seed, value in enumerate(values)}
        for name, values in (("cartpole", cartpole), ("pendulum", pendulum))
    }
    return [claim.verdict for claim in judge(Results(runs))]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([500.0] * 5, "holds"),
        ([500.0] * 4 + [499.9], "not resolved"),
        ([499.9] * 5, "does not hold"),
        ([500.0] * 4, "not resolved"),
        ([], "not run"),
    ],
)
def test_the_rule_of_cartpole(values, verdict):
    assert verdicts(cartpole=values)[0] == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-170.0, -172, -168, -175, -171], "holds"),
        ([-230.0, -232, -228, -235, -231], "does not hold"),
        ([-199.0, -190, -205, -203, -195], "not resolved"),
        ([-170.0, -172, -168, -175], "not resolved"),
        ([], "not run"),
    ],
)
def test_the_rule_of_pendulum(values, verdict):
    assert verdicts(pendulum=values)[1] == verdict


def test_the_interval_is_that_of_the_difference():
    values = dict(enumerate([-170.0, -172, -168, -175, -171]))
    runs = {"pendulum": {seed: {"mean_return": value} for seed, value in values.items()}}
    claim = judge(Results(runs))[1]
    assert claim.difference == pytest.approx(28.8)
    assert claim.interval[0] < 28.8 < claim.interval[1] < 35


def test_what_cannot_be_run_here_is_listed():
    assert verdicts([500.0] * 5, [-170.0] * 5)[2] == "not run"


def test_a_run_is_of_a_seed_on_which_nothing_was_chosen():
    study = make()
    (cartpole, pendulum) = study.arms
    found = [run(cartpole.config, seed, lambda text: None) for seed in (0, 0, 1)]
    drop = ("seconds", "samples_per_second")
    kept = [{name: value for name, value in metrics.items() if name not in drop} for metrics in found]
    assert kept[0] == kept[1] != kept[2]
    assert all(math.isfinite(value) for value in kept[0].values() if isinstance(value, float))
    assert kept[0]["samples"] == 256
    assert run(pendulum.config, 0, lambda text: None)["samples"] == 2048
