"""How good a policy is: whole episodes from fixed beginnings, in which it does what it holds for best and tries nothing out.

The beginnings are never those of training. Which they are follows from the seed and their number alone, so policies are compared on the
same ones; a policy that ends its episodes quickly does not get more of the quick ones.
"""
# Shapes: N environments, E episodes

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_file
from anabranch.rl.environment import OUTCOME, Environment, World, flat
from anabranch.rl.network import ActorCritic
from anabranch.rl.student import within_95

__all__ = ["Episodes", "judge"]

# Of all episodes of evaluations, beside the seed: none of them is one of training.
_EVALUATION = 7_919
# Environments side by side, at most: one pass of the network serves them all.
_MOST_BESIDE = 64
# Steps of an episode, at most; one that goes on has no end of its own.
LONGEST = 100_000
# Outcomes that an episode has or has not.
_SHARES = frozenset(
    "arrived blocked collided deviated finished off_road red_light stands_still stop_sign sumo_arrived timeout vehicle walker".split()
)
# What is told for an amount of something, and is pooled: all of the first over all of the second. The mean of the ratios of episodes
# would be that of the shortest ones.
_POOLED = {"infractions_per_km": ("infractions", "driven_km")}


@dataclass(frozen=True)
class Episodes:
    """What an evaluation gave, one entry an episode, in a fixed order.

    Attributes:
        return_E: sum of rewards.
        length_E: steps.
        terminated_E: whether it ended by itself; the others were cut off.
        outcomes: other numbers about it by name, which the environment tells.
    """

    return_E: np.ndarray
    length_E: np.ndarray
    terminated_E: np.ndarray
    outcomes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def measures(self) -> dict[str, Any]:
        """JSON-ready: means, the deviation of returns, and half the width of the 95 % interval of their mean (nan for one episode).

        ``infractions_per_km`` is that of all episodes together, where ``infractions`` and ``driven_km`` are told.
        """
        number = len(self.return_E)
        deviation = float(self.return_E.std(ddof=1)) if number > 1 else math.nan
        return {
            "mean_return": float(self.return_E.mean()),
            "return_deviation": deviation,
            "return_interval": _interval(self.return_E),
            "mean_length": float(self.length_E.mean()),
            "terminated": float(self.terminated_E.mean()),
            "episodes": number,
            **{name: self._mean(name) for name in sorted(self.outcomes)},
        }

    def _mean(self, name: str) -> float:
        parts = self._pooled(name)
        if parts is None:
            return float(np.nanmean(self.outcomes[name]))
        counted_E, amount_E = parts
        amount = float(np.nansum(amount_E))
        return float(np.nansum(counted_E)) / amount if amount else math.nan

    def _pooled(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """What was counted and what it is told for, where this is pooled and an environment tells both."""
        names = _POOLED.get(name, ())
        if not names or any(each not in self.outcomes for each in names):
            return None
        counted_E, amount_E = (self.outcomes[each] for each in names)
        return counted_E, amount_E

    def intervals(self) -> dict[str, float]:
        """Half the width of the 95 % interval of the mean of each of ``outcomes``; nan where fewer than two episodes have it.

        By Student's t. Where all episodes agree on yes or no, it is what so many may have missed: 3 in E, at most 1.
        """
        return {name: self._within(name) for name in sorted(self.outcomes)}

    def _within(self, name: str) -> float:
        value_E = self.outcomes[name]
        parts = self._pooled(name)
        if parts is not None:
            (counted_E, amount_E), mean = parts, self._mean(name)
            # Of a ratio of two means: what each episode has above its share.
            value_E = (counted_E - mean * amount_E) / np.nanmean(amount_E) + mean
        value_E = value_E[~np.isnan(value_E)]
        if len(value_E) > 1 and value_E.std() == 0 and name in _SHARES:
            return min(3 / len(value_E), 1.0)
        return _interval(value_E)

    def write_csv(self, path: str | Path) -> None:
        """A line for each episode, below the names of columns. Raises DataError if it cannot be written."""
        names = sorted(self.outcomes)
        with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["episode", "return", "length", "terminated", *names])
            for place in range(len(self.return_E)):
                told = [self.return_E[place], self.length_E[place], int(self.terminated_E[place])]
                writer.writerow([place, *told, *(self.outcomes[name][place] for name in names)])


def _interval(value_E: np.ndarray) -> float:
    number = len(value_E)
    return within_95(number - 1) * float(value_E.std(ddof=1)) / math.sqrt(number) if number > 1 else math.nan


def judge(
    model: ActorCritic,
    environment: Environment,
    *,
    episodes: int = 100,
    seed: int = 0,
    on_step: Callable[[World, int], None] | None = None,
    world: World | None = None,
    beside: int | None = None,
) -> Episodes:
    """Let a policy act for so many episodes.

    Args:
        model: acts by the mode of its distributions; in whatever process group it is, each process does all of it.
        environment: where.
        episodes: E; where they begin follows from the seed and E.
        seed: another one has other beginnings.
        on_step: called after each step with the world and how many episodes have ended.
        world: use this one, of the first beginnings, instead of making one.
        beside: environments side by side, at most. Default: 64.

    Raises ConfigError for less than one episode, DataError if the environment gives a reward or an observation that is not finite, or an
    episode that does not end within 100,000 steps.
    """
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}; use at least 1")
    owned = world is None
    if world is None:
        world = environment.make(num_beside(episodes, beside), seed=evaluation_seed(seed))
    try:
        return _played(model, world, episodes, on_step)
    finally:
        if owned:
            world.close()


def num_beside(episodes: int, most: int | None = None) -> int:
    """Environments side by side for so many episodes: as many in each, so that few go on for nothing while others still play."""
    rounds = -(-episodes // (most or _MOST_BESIDE))
    return -(-episodes // rounds)


def evaluation_seed(seed: int) -> int:
    """The seed of worlds in which policies are judged."""
    return int(np.random.SeedSequence([seed, _EVALUATION]).generate_state(1, np.uint32)[0] >> 1)


@torch.no_grad()
def _played(model: ActorCritic, world: World, episodes: int, on_step: Callable[[World, int], None] | None) -> Episodes:
    num, device = world.num_envs, next(model.parameters()).device
    # How many episodes each environment still plays for the count.
    left_N = np.array([len(range(place, episodes, num)) for place in range(num)])
    played_N = np.zeros(num, np.int64)
    return_E, length_E = np.zeros(episodes), np.zeros(episodes, np.int64)
    terminated_E = np.zeros(episodes, bool)
    outcomes: dict[str, np.ndarray] = {}
    return_N, length_N = np.zeros(num), np.zeros(num, np.int64)
    observations, _ = world.reset()
    while left_N.any():
        seen_ND = flat(observations)
        _check(seen_ND, length_N, left_N)
        parameter_NP = model(torch.from_numpy(seen_ND).to(device), "policy").cpu()
        action_NA = model.kind.distribution(parameter_NP).mode()
        observations, reward_N, over_N, cut_N, infos = world.step(model.kind.to_environment(action_NA).numpy())
        return_N += reward_N
        length_N += 1
        for place in np.flatnonzero((over_N | cut_N) & (left_N > 0)):
            number = int(place + played_N[place] * num)
            if not math.isfinite(return_N[place]):
                raise DataError(
                    f"episode {number} has the return {return_N[place]}: the environment gave a reward that is no number"
                )
            return_E[number], length_E[number] = return_N[place], length_N[place]
            terminated_E[number] = over_N[place]
            for name, values in infos.get(OUTCOME, {}).items():
                outcomes.setdefault(name, np.full(episodes, np.nan))[number] = values[place]
            played_N[place] += 1
            left_N[place] -= 1
        return_N[over_N | cut_N] = 0.0
        length_N[over_N | cut_N] = 0
        if on_step is not None:
            on_step(world, int(played_N.sum()))
    return Episodes(return_E, length_E, terminated_E, outcomes)


def _check(seen_ND: np.ndarray, length_N: np.ndarray, left_N: np.ndarray) -> None:
    """Raise DataError for an observation that is no number, or an episode that counts and has no end."""
    finite_N = np.isfinite(seen_ND).all(axis=1) | (left_N == 0)
    if not finite_N.all():
        place = int(np.flatnonzero(~finite_N)[0])
        raise DataError(
            f"environment {place} gave an observation that is no number, {length_N[place]} steps into an episode"
        )
    if (length_N[left_N > 0] >= LONGEST).any():
        raise DataError(
            f"an episode has not ended after {LONGEST:,} steps; give the environment a limit, such as "
            "task.environment.arguments.max_episode_steps=1000"
        )
