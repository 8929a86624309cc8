"""Does CaRL's simple reward also drive the roads of others, at least as well as the rewards that were made for them?

"CaRL: Learning Scalable Planning Policies with Simple Rewards", 2025, arXiv 2504.17838, whose study in a world of our own is
`carl`. Here the roads, cars and observations are HighwayEnv's (Leurent 2018), and what is learned from is either CaRL's reward, by
lane coordinates, or HighwayEnv's own, a sum of shaped terms (speed, collision, lanes) that its authors chose for each of these
environments.

One run: PPO on as many samples in all arms, with HighwayEnv's own settings of PPO (gamma 0.8, on the racetrack 0.9; 2 x 256, 5e-4), from
8 environments side by side. Rewards are scaled so that returns are about as large: CaRL's, a hundred for a route, by 0.1; HighwayEnv's, at
most 1 a decision, by 1. Then whole episodes by the policy's likeliest actions: the same beginnings for both arms of a seed. Neither reward
judges: what counts is who arrived, and who ran into somebody.

Arms:

    simple-roundabout, own-roundabout        CaRL's reward and HighwayEnv's on roundabout-v1
    simple-intersection, own-intersection    on intersection-v2
    simple-racetrack, own-racetrack          on racetrack-v1: steering alone, five decisions a second; who has driven 400 m has arrived

The rule, fixed before any run. PRIMARY: on the roundabout at least as many arrive by the simple reward, with 5 points of a hundred
as the margin. A claim is about a paired difference over seeds, ours - baseline - margin; it holds where that is above 0 by a two-
sided paired t-test at 5% after Holm's correction over all claims that have run, does not hold where it is below 0 by the same test,
and is not resolved otherwise or with fewer than five seeds. Nor does one hold, also of collisions (who stands collides with
nobody), where CaRL's reward has not learned to drive (`FLOORS`): where fewer than 70 in a hundred arrive on the roundabout, 60 at the
intersection and 20 on the racetrack. HighwayEnv's may fail.

Who always goes faster arrives in 60 of a hundred on the roundabout, who never brakes in 50 at the intersection, and who never steers leaves
the racetrack within ten seconds.

What is reported and judged by nobody: route completion, driving score, and the return by HighwayEnv's own reward, whichever was
learned from.

An arrival ends an episode by either reward: cut off, and with HighwayEnv's at the intersection for good, as it does there.

Not run yet. It is planned for 5 seeds. A processor of a loaded machine takes 46 decisions a second on the roundabout, 20 at the
intersection and 35 on the racetrack: 0.30, 0.69 and 0.40 hours for 50,000. The 100 episodes of an evaluation take 200 decisions each where
the racetrack was learned, 0.16 hours, and half a minute to a minute on the other roads: 3.2 hours for a seed of 6 arms, 16 for five.
"""

from __future__ import annotations

from typing import Any

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.rl import Highway, training
from anabranch.rl.rewards import RouteReward
from anabranch.studies.asked import Asked, judged
from anabranch.studies.carl import run
from anabranch.studies.floors import Floor, above_floors
from anabranch.studies.harness import Arm, Claim, Column, Results, Study
from anabranch.train import TaskRunConfig

ARMS = {
    "simple-roundabout": "CaRL's reward on roundabout-v1",
    "own-roundabout": "HighwayEnv's own",
    "simple-intersection": "CaRL's reward on intersection-v2",
    "own-intersection": "HighwayEnv's own",
    "simple-racetrack": "CaRL's reward on racetrack-v1",
    "own-racetrack": "HighwayEnv's own",
}
_IDS = {"roundabout": "roundabout-v1", "intersection": "intersection-v2", "racetrack": "racetrack-v1"}
# Of HighwayEnv's example of PPO for each; and ten seconds of a danger, in decisions.
_GAMMAS = {"roundabout": 0.8, "intersection": 0.8, "racetrack": 0.9}
_WINDOWS = {"roundabout": 10, "intersection": 10, "racetrack": 50}
# So that returns are about as large.
_SCALES = {"simple": 0.1, "own": 1.0}
COLUMNS = (
    Column("arrived", "arrived", ".2f"),
    Column("collided", "collided", ".2f"),
    Column("route_completion", "route\n%", ".1f"),
    Column("driving_score", "driving\nscore", ".1f"),
    Column("own_return", "HighwayEnv's\nreturn", ".2f"),
    Column("samples_per_second", "samples/s", ".0f"),
)


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        samples: of each run.
        episodes: by which a policy is measured.
        hidden: widths of the networks.
        physics: steps of HighwayEnv's physics in a decision of a second.
        workers: processes that environments are spread over; 0 for one for each processor.
    """

    samples: int = Field(default=50_000, ge=8)
    episodes: int = Field(default=100, ge=1)
    hidden: tuple[int, ...] = (256, 256)
    physics: int = Field(default=15, ge=1)
    workers: int = Field(default=0, ge=0)


def run_of(arm: str, size: Size) -> TaskRunConfig:
    """The training of an arm."""
    reward, _, road = arm.partition("-")
    arguments = {"config": {"simulation_frequency": size.physics}}
    environment = Highway.Config(
        id=_IDS[road],
        arguments=arguments,
        reward=RouteReward(window=_WINDOWS[road]),
        own_reward=reward == "own",
        workers=size.workers,
    )
    return training(
        "highway",
        samples=size.samples,
        settings={
            "task.environment": to_dict(environment),
            "task.reward_scale": _SCALES[reward],
            "task.gamma": _GAMMAS[road],
            "task.hidden": list(size.hidden),
            "task.eval_episodes": size.episodes,
        },
    )


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    size = (Size() if full else Size(samples=16, episodes=2, hidden=(8,), physics=5, workers=1)).replace(**changes)
    return Study(
        name="carl_highway",
        title="PPO with CaRL's reward and with HighwayEnv's own, on HighwayEnv's roads",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, run_of(name, size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        # 2: arrivals are found, end an episode by either reward, and pay for their own metres alone.
        revision=2,
    )


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_CLAIMS: tuple[Asked, ...] = (
    (
        "arrived",
        "simple-roundabout",
        "arrived",
        "own-roundabout",
        -0.05,
        "PRIMARY: on the roundabout no more than 5 in a hundred fewer arrive by CaRL's reward than by HighwayEnv's",
        "nothing: HighwayEnv is not in it",
    ),
    (
        "collided",
        "own-roundabout",
        "collided",
        "simple-roundabout",
        -0.05,
        "on the roundabout no more than 5 in a hundred more collide by CaRL's reward",
        "nothing: HighwayEnv is not in it",
    ),
    (
        "arrived",
        "simple-intersection",
        "arrived",
        "own-intersection",
        -0.05,
        "at the intersection no more than 5 in a hundred fewer arrive by CaRL's reward than by HighwayEnv's",
        "nothing: HighwayEnv is not in it",
    ),
    (
        "collided",
        "own-intersection",
        "collided",
        "simple-intersection",
        -0.05,
        "at the intersection no more than 5 in a hundred more collide by CaRL's reward",
        "nothing: HighwayEnv is not in it",
    ),
    (
        "arrived",
        "simple-racetrack",
        "arrived",
        "own-racetrack",
        -0.05,
        "on the racetrack no more than 5 in a hundred fewer arrive by CaRL's reward than by HighwayEnv's",
        "nothing: HighwayEnv is not in it",
    ),
    (
        "collided",
        "own-racetrack",
        "collided",
        "simple-racetrack",
        -0.05,
        "on the racetrack no more than 5 in a hundred more collide by CaRL's reward",
        "nothing: HighwayEnv is not in it",
    ),
)


# What must arrive by CaRL's reward for a claim to hold: who stands does not collide. The baseline may fail, or a win over it would
# count for less the worse it is.
FLOORS = {"roundabout": 0.7, "intersection": 0.6, "racetrack": 0.2}
_FLOORS: tuple[tuple[Floor, ...], ...] = tuple(
    (("arrived", f"simple-{road}", least),) for road, least in FLOORS.items() for _ in ("arrived", "collided")
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return above_floors(results, judged(results, _CLAIMS), _FLOORS)
