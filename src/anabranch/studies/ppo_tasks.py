"""Does our PPO learn the two tasks that every implementation of it is tried on?

"Proximal Policy Optimization Algorithms", Schulman et al. 2017, arXiv 1707.06347, in the presets `cartpole` and `pendulum` of `anabranch rl
train`, as they are shipped. What is asked is what CaRL's specification asks of PPO before anything is built on it: 500 steps of CartPole-v1
within 100,000 samples, and a return of -200 of Pendulum-v1 within 300,000.

One run: the preset, then 100 whole episodes by the policy's likeliest actions.

Arms:

    cartpole    CartPole-v1, 100,000 samples
    pendulum    Pendulum-v1, 300,000 samples

The rule, fixed before any run. PRIMARY: CartPole's pole stands for all 500 steps of all 100 episodes: it holds where that is so in all of
five seeds, does not hold where it is so in none, and is not resolved else. Pendulum: the mean return over seeds is above -200 by a
two-sided t-test at 5 %; it does not hold where it is below by the same test. Nothing is decided with fewer than five seeds. That returns
along the way are within 10 % of CleanRL's is asked too, and has not run: CleanRL is no package that installs beside this one.

The presets were chosen on seeds 0 to 2 (Pendulum's gamma among eight settings), so the study's seeds are counted from 100.

It has run: 15 seconds of a processor for a run of CartPole and a minute for one of Pendulum, six minutes together.
"""

from __future__ import annotations

from typing import Any

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.rl import training
from anabranch.studies.asked import holm
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import SEEDS_NEEDED, estimate, every_seed
from anabranch.studies.policy_training import train_policy
from anabranch.train import TaskRunConfig

ARMS = {"cartpole": "CartPole-v1, the preset", "pendulum": "Pendulum-v1, the preset"}
COLUMNS = (
    Column("mean_return", "mean return", ".1f"),
    Column("samples", "samples", ",.0f"),
    Column("samples_per_second", "samples/s", ",.0f"),
)
# What is asked: every step of an episode; and a return.
STEPS, RETURN = 500.0, -200.0
# Before the first seed: presets were chosen on the first ones.
_BEFORE = 100


@configclass
class Size(Config):
    """What arms have.

    Attributes:
        samples: of each arm.
        episodes: by which a policy is measured.
    """

    samples: dict[str, int] = Field(default_factory=lambda: {"cartpole": 100_000, "pendulum": 300_000})
    episodes: int = Field(default=100, ge=1)


def run_of(arm: str, size: Size) -> TaskRunConfig:
    """The training of an arm."""
    return training(arm, samples=size.samples[arm], settings={"task.eval_episodes": size.episodes})


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(samples={"cartpole": 256, "pendulum": 2048}, episodes=2)
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="ppo_tasks",
        title="PPO's presets on CartPole and Pendulum",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, run_of(name, size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
    )


def run(config: TaskRunConfig, seed: int, progress: Progress) -> Metrics:
    """One arm, whose policy is measured on beginnings that follow from the seed."""
    return train_policy(config, _BEFORE + seed, progress)


_CARTPOLE = "PRIMARY: the pole of CartPole stands for all 500 steps of 100 episodes after 100,000 samples"
_PENDULUM = "the return of Pendulum is above -200 after 300,000 samples"
_CURVES = "returns along the way are within 10 % of CleanRL's"


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return [_stands(results), _swings(results), Claim.not_run(_CURVES, "CleanRL's curves, by our specification")]


def _stands(results: Results) -> Claim:
    values = list(results.values("cartpole", "mean_return").values())
    paper = "learned, without figures"
    if not values:
        return Claim.not_run(_CARTPOLE, paper)
    verdict = every_seed([value >= STEPS for value in values]) if len(values) >= SEEDS_NEEDED else "not resolved"
    return Claim.against(STEPS, _CARTPOLE, paper, min(values), verdict, count=len(values))


def _swings(results: Results) -> Claim:
    values = list(results.values("pendulum", "mean_return").values())
    paper = "learned, without figures"
    if not values:
        return Claim.not_run(_PENDULUM, paper)
    above = [value - RETURN for value in values]
    mean = sum(values) / len(values)
    interval = estimate(values).interval
    return Claim.against(RETURN, _PENDULUM, paper, mean, holm({0: above})[0], interval, count=len(values))
