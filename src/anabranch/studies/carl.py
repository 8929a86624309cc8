"""Does PPO with the simple reward gain from larger mini-batches, and lose with a shaped one?

"CaRL: Learning Scalable Planning Policies with Simple Rewards", 2025, arXiv 2504.17838. The paper: with the shaped reward of Roach PPO
fails or becomes worse as mini-batches grow; with route completion cut down by infractions it is as good or better, which is what lets it
learn from 300 million samples in CARLA (driving score 64 on longest6 v2) and 500 million in nuPlan.

Scaled down: LaneWorld instead of CARLA and nuPlan, 161 numbers instead of a picture, dense layers of 2 x 256, 4 million samples. No score
of these benchmarks can be compared with; the order of rewards and sizes can.

One run: PPO on as many samples in all arms; a batch is 4 mini-batches. Then 100 routes on maps that were never seen, by the policy's mean:
the same routes for all arms of a seed. What differs by the mini-batch besides: 64, 128 or 256 worlds side by side, a rollout of 16, 64 or
256 steps of each (so at 256 advantages reach less far before the critic's word stands in for the rest), and 46,872 to 732 gradient steps.

The learning rate is tuned for each reward by itself, at 256 and with an equal budget: 1.25e-4, 2.5e-4 (CaRL's) and 5e-4. At 16,384 it is
that times the square root of 64. For each seed the rate counts that had the best driving score at 256 over the other seeds, so no seed
chooses for itself, and both sizes of a reward have the same rate. The middle size and the ablations are at 2.5e-4.

Rewards are scaled by 0.1 and the critic's clip is 0.1 for both, though returns of the shaped reward are about ten times as large: a look at
1/64 of shaped-16384, one seed, had an explained variance of 0.83 to 0.95 with the clip, and drove no worse with it (26.6) than without
(25.2) or with returns as small as those of the simple one (19.2; each +- 10).

Arms:

    simple-256, simple-2048, simple-16384    CaRL's reward, by mini-batch
    shaped-256, shaped-2048, shaped-16384    Roach's reward
    ...-256-slow, ...-256-fast, ...-16384-slow, ...-16384-fast    both rewards at half and at twice the learning rate
    no-factors                               simple-2048 without soft factors: progress, and the hint
    no-hint                                  simple-2048 without the hint at the end
    gamma-0.95, gamma-0.98, gamma-0.999      simple-2048 with another discount than 0.99 of a tenth of a second

The rule, fixed before any run. PRIMARY: at 16,384 the driving score of the simple reward is more than 10 points above that of the shaped
one. A claim is about a paired difference over seeds, ours - baseline - margin; it holds where that is above 0 by a two-sided paired t-test
at 5% after Holm's correction over all claims that have run, does not hold where it is below 0 by the same test, and is not resolved
otherwise or with fewer than five seeds. Nor does one hold where what is to be better (of those who stand: the simple reward) has not
learned to drive (`_FLOORS`): a driving score of 20, where one that has learned nothing has 14 to 15. What it is held against may fail.

What is reported and judged by nobody: the middle size, the ablations, how many routes ended standing still or crawling (below 0.5 m/s and
20 % of the route), and the share of runs that collapse (route completion below 20 %).

Not run yet. It is planned for 5 seeds. Measured on one thread of a loaded machine of two cores, 4 million samples take 0.50 hours of a
processor at 256, 0.29 at 2,048 and 0.24 at 16,384, and their evaluation 17 seconds or more: 6.6 hours for a seed of 19 arms, 33 for five
seeds, about 17 hours of two cores.
"""

from __future__ import annotations

import math
from typing import Any

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.rl import LaneWorld, training
from anabranch.rl.laneworld import Settings
from anabranch.rl.rewards import RouteReward
from anabranch.studies.asked import Asked, judged
from anabranch.studies.floors import Floor, above_floors
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.policy_training import train_policy
from anabranch.train import TaskRunConfig

# Learning rates that are tried, against CaRL's: of two that are as good the first is taken.
RATES = {"": 1.0, "-slow": 0.5, "-fast": 2.0}
_TRIED = {"": "", "-slow": ", half the learning rate", "-fast": ", twice the learning rate"}
ARMS = {
    "simple-256": "CaRL's reward, mini-batches of 256",
    "simple-2048": "of 2,048",
    "simple-16384": "of 16,384",
    "shaped-256": "Roach's reward, mini-batches of 256",
    "shaped-2048": "of 2,048",
    "shaped-16384": "of 16,384",
    "no-factors": "simple-2048 without soft factors",
    "no-hint": "simple-2048 without the hint",
    "gamma-0.95": "simple-2048 with a discount of 0.95: 2 seconds",
    "gamma-0.98": "of 0.98: 5 seconds",
    "gamma-0.999": "of 0.999: 100 seconds",
} | {
    f"{reward}-{size}{rate}": f"{reward}-{size}{_TRIED[rate]}"
    for reward in ("simple", "shaped")
    for size in (256, 16384)
    for rate in ("-slow", "-fast")
}
# Worlds side by side: more for larger batches, so that a rollout is not all of one stretch of road.
_WORLDS = {256: 64, 2048: 128, 16384: 256}
# Mini-batches of a batch, and the size at which the learning rate is chosen; CaRL's.
_BATCHES, _TUNED_AT, _LEARNING_RATE = 4, 256, 2.5e-4
COLUMNS = (
    Column("driving_score", "driving\nscore", ".1f"),
    Column("route_completion", "route\n%", ".1f"),
    Column("finished", "finished", ".2f"),
    Column("stands_still", "stands\nstill", ".2f"),
    Column("collapsed", "collapsed", ".2f"),
    Column("gradient_steps", "gradient\nsteps", ".0f"),
    Column("samples_per_second", "samples/s", ".0f"),
)


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        samples: of each run.
        shrink: batches and worlds are so many times smaller, for a look whether it runs.
        episodes: routes by which a policy is measured.
        hidden: widths of the networks.
        world: LaneWorld, but for the reward.
    """

    samples: int = Field(default=4_000_000, ge=1)
    shrink: int = Field(default=1, ge=1)
    episodes: int = Field(default=100, ge=1)
    hidden: tuple[int, ...] = (256, 256)
    world: Settings = Settings()


def run_of(arm: str, size: Size) -> TaskRunConfig:
    """The training of an arm."""
    reward, batch, *rate = arm.split("-")
    mini_batch = int(batch) if batch.isdigit() else 2048
    tried = RATES["".join(f"-{name}" for name in rate)]
    worlds = max(_WORLDS[mini_batch] // size.shrink, 1)
    rollout = max(_BATCHES * mini_batch // size.shrink, _BATCHES * worlds)
    world = size.world.replace(shaped=reward == "shaped", reward=_reward(arm))
    discount = {"task.gamma": float(batch)} if reward == "gamma" else {}
    return training(
        "laneworld",
        samples=size.samples,
        settings={
            **discount,
            "task.environment": to_dict(LaneWorld.Config(world=world)),
            "task.num_envs": worlds,
            "task.rollout_steps": rollout // worlds,
            "task.hidden": list(size.hidden),
            "task.eval_episodes": size.episodes,
            "train.batch_size": rollout // _BATCHES,
            "train.learning_rate": tried * _LEARNING_RATE * math.sqrt(mini_batch / _TUNED_AT),
        },
    )


def _reward(arm: str) -> RouteReward:
    if arm == "no-factors":
        return RouteReward(outside=False, speed=False, ttc=False, comfort=False, centre=False)
    return RouteReward(hint=0.0) if arm == "no-hint" else RouteReward()


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(
        samples=512,
        shrink=64,
        episodes=2,
        hidden=(8,),
        world=Settings(maps=1, routes=4, traffic=4, walkers=1, longest_m=400.0, timeout_s=10.0),
    )
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="carl",
        title="PPO with a simple and with a shaped reward, by the size of mini-batches",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, run_of(name, size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        # 2: LaneWorld's roads and walkers are others, and what is told of an episode is of all of it.
        revision=2,
    )


def run(config: TaskRunConfig, seed: int, progress: Progress) -> Metrics:
    """One arm: what its policy came to on routes that it had not seen."""
    measured = train_policy(config, seed, progress)
    return {**measured, "collapsed": float(measured["route_completion"] < 20)}


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_CLAIMS: tuple[Asked, ...] = (
    (
        "driving_score",
        "simple-16384",
        "driving_score",
        "shaped-16384",
        10.0,
        "PRIMARY: at mini-batches of 16,384 the simple reward drives more than 10 points better than the shaped one",
        "the shaped one fails",
    ),
    (
        "driving_score",
        "simple-16384",
        "driving_score",
        "simple-256",
        -3.0,
        "with the simple reward mini-batches of 16,384 lose less than 3 points against those of 256",
        "equal or better",
    ),
    (
        "driving_score",
        "shaped-256",
        "driving_score",
        "shaped-16384",
        0.0,
        "with the shaped reward mini-batches of 16,384 drive worse than those of 256",
        "worse",
    ),
    (
        "stands_still",
        "shaped-16384",
        "stands_still",
        "simple-16384",
        0.0,
        "at mini-batches of 16,384 more routes end standing still with the shaped reward",
        "local optima",
    ),
)


# Of each claim: what must have learned to drive for it to hold. Never what it is held against, or a win over that would count for less the
# worse it is.
FLOOR = 20.0
_FLOORS: tuple[tuple[Floor, ...], ...] = (
    (("driving_score", "simple-16384", FLOOR),),
    (("driving_score", "simple-16384", FLOOR),),
    (("driving_score", "shaped-256", FLOOR),),
    (("driving_score", "simple-16384", FLOOR),),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    found = at_tuned_rates(results)
    return above_floors(found, judged(found, _CLAIMS), _FLOORS)


def at_tuned_rates(results: Results) -> Results:
    """Runs of 256 and 16,384 at the rate of their reward: for each seed that of the best driving score at 256 over all other seeds.

    A reward of which a rate is missing at 256, or that has one seed, has none.
    """
    found: dict[str, dict[int, Metrics]] = {}
    for reward in ("simple", "shaped"):
        scores = {rate: results.values(f"{reward}-{_TUNED_AT}{rate}", "driving_score") for rate in RATES}
        common = set.intersection(*(set(of_rate) for of_rate in scores.values()))
        for seed in sorted(common) if len(common) > 1 else ():
            best = max(RATES, key=lambda rate: sum(scores[rate][other] for other in common - {seed}))
            for size in (_TUNED_AT, 16384):
                run = results.runs.get(f"{reward}-{size}{best}", {}).get(seed)
                if run is not None:
                    found.setdefault(f"{reward}-{size}", {})[seed] = run
    return Results(found)
