"""`ReplayedWorld`: single environments of gymnasium side by side, in this process, whose place is kept without pickling anything.

What is kept of an environment is the number of its episode and what was done since that began. To go back there the episode is begun
anew from its seed, and everything is done again; that takes as long as it took, and no more is asked of an environment than that.
"""
# Shapes: N environments, L steps since an episode began, A numbers of an action

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from anabranch.errors import AnabranchError, CheckpointError, ConfigError, DataError
from anabranch.rl.environment import OUTCOME, episode_seed

__all__ = ["ReplayedWorld"]

# Kinds of NumPy's types.
_NUMBERS = "biuf"


class ReplayedWorld(VectorEnv):
    """See the module. A `anabranch.rl.environment.World`.

    Args:
        make: makes one environment.
        num: N.
        seed: of all episodes, see `episode_seed`.
        first: number of the first environment; the others follow.

    Attributes:
        envs: the environments.
        on_end: called with the place of an environment whose episode has ended, before the next one begins.

    An environment may tell numbers about an episode that has ended as ``info["outcome"]``, a dict; and in ``changed_rules``, a tuple, what
    is otherwise in its episodes than in earlier versions of it, one sentence for each change, so that a run of before is told of it.

    To make a world and all that is done with it raises DataError, with the environment's number, for whatever that fails with or ends by
    (``sys.exit``), and for an observation that is not of its space's shape.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self, make: Callable[[], gymnasium.Env], num: int, *, seed: int, first: int = 0) -> None:
        if num < 1:
            raise ConfigError(f"{num} environments; there must be at least one")
        self._seed, self._first = seed, first
        # What closing it fails with is no news then.
        self._has_failed = False
        self.envs: list[gymnasium.Env] = []
        self.num_envs = num
        try:
            for _ in range(num):
                self.envs.append(make())
        except (Exception, SystemExit) as error:
            self._give_up(len(self.envs), error)
        try:
            self.single_observation_space = self.envs[0].observation_space
            self.single_action_space = self.envs[0].action_space
            self.observation_space = batch_space(self.single_observation_space, num)
            self.action_space = batch_space(self.single_action_space, num)
        except (Exception, SystemExit) as error:
            self._give_up(0, error)
        self.is_discrete = isinstance(self.single_action_space, gymnasium.spaces.Discrete)
        self._episode_N = np.zeros(num, np.int64)
        self.on_end: Callable[[int], None] | None = None
        self._done: list[list[Any]] = [[] for _ in range(num)]

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin episode 0 in every environment. ``seed`` and ``options`` are not looked at."""
        self._episode_N[:] = 0
        return self._batched([self._begin(place) for place in range(self.num_envs)]), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of each; see `anabranch.rl.environment.World`."""
        num = self.num_envs
        reward_N = np.zeros(num)
        terminated_N, truncated_N = np.zeros(num, bool), np.zeros(num, bool)
        observations: list[Any] = []
        infos: dict[str, Any] = {}
        for place in range(num):
            action = int(actions[place]) if self.is_discrete else np.array(actions[place])
            try:
                seen, reward_N[place], terminated_N[place], truncated_N[place], told = self.envs[place].step(action)
                self._check_seen(place, seen)
                if terminated_N[place] or truncated_N[place]:
                    self._tell(infos, place, seen, told)
            except (Exception, SystemExit) as error:
                self._raise_failure(place, error)
            self._done[place].append(action)
            if terminated_N[place] or truncated_N[place]:
                if self.on_end is not None:
                    self.on_end(place)
                self._episode_N[place] += 1
                seen = self._begin(place)
            observations.append(seen)
        return self._batched(observations), reward_N, terminated_N, truncated_N, infos

    def _begin(self, place: int) -> Any:
        self._done[place] = []
        start = episode_seed(self._seed, self._first + place, int(self._episode_N[place]))
        try:
            seen, _ = self.envs[place].reset(seed=start)
            self._check_seen(place, seen)
        except (Exception, SystemExit) as error:
            self._raise_failure(place, error)
        return seen

    def _raise_failure(self, place: int, error: BaseException) -> NoReturn:
        """Say whose fault it is: environments are their authors', and one of them has failed."""
        self._has_failed = True
        if isinstance(error, AnabranchError):
            raise error
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"environment {self._first + place} failed with {told}; mend it, and resume") from error

    def _give_up(self, place: int, error: BaseException) -> NoReturn:
        """It cannot be made: close what was, and say why not."""
        self._has_failed = True
        self.close()
        self._raise_failure(place, error)

    def _check_seen(self, place: int, seen: Any) -> None:
        """Raise DataError for an observation that is not of its space: the network would fail with it, or learn from another one."""
        space = self.single_observation_space
        parts = [("", space, seen)]
        if isinstance(space, gymnasium.spaces.Dict):
            parts = [(f" {name!r}", part, seen[name]) for name, part in space.spaces.items()]
        for name, part, given in parts:
            array = np.asarray(given)
            if array.shape != part.shape or array.dtype.kind not in _NUMBERS:
                raise DataError(
                    f"environment {self._first + place} gave an observation{name} of shape {list(array.shape)} ({array.dtype}), and its "
                    f"space is {list(part.shape or ())}; mend it, and resume"
                )

    def _tell(self, infos: dict[str, Any], place: int, seen: Any, told: Mapping[str, Any]) -> None:
        num = self.num_envs
        infos.setdefault("final_obs", np.full(num, None, dtype=object))[place] = seen
        infos.setdefault("_final_obs", np.zeros(num, bool))[place] = True
        for name, value in told.get(OUTCOME, {}).items():
            infos.setdefault(OUTCOME, {}).setdefault(name, np.full(num, np.nan))[place] = value

    def _batched(self, observations: list[Any]) -> Any:
        if isinstance(self.single_observation_space, gymnasium.spaces.Dict):
            return {
                name: np.stack([seen[name] for seen in observations]) for name in self.single_observation_space.spaces
            }
        return np.stack(observations)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Number of the episode ``[N]``, steps since it began ``[N]``, what was done in them ``[N, L, A]``, filled up with 0, and how often
        the environment's rules had changed ``[N]``."""
        num = self.num_envs
        length_N = np.array([len(done) for done in self._done], np.int64)
        numbers = 1 if self.is_discrete else int(np.prod(self.single_action_space.shape or (1,)))
        dtype = np.int64 if self.is_discrete else self.single_action_space.dtype
        action_NLA = np.zeros((num, int(length_N.max(initial=0)), numbers), dtype)
        for place, done in enumerate(self._done):
            if done:
                action_NLA[place, : len(done)] = np.asarray(done).reshape(len(done), -1)
        return {
            "episode": self._episode_N.copy(),
            "length": length_N,
            "action": action_NLA,
            "rules": np.array([len(self._changed_rules(place)) for place in range(num)], np.int64),
        }

    def _changed_rules(self, place: int) -> tuple[str, ...]:
        return getattr(self.envs[place], "changed_rules", ())

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> Any:
        """Do again what ``state`` tells of; the observations of there.

        Raises CheckpointError if it does not fit, or an episode ends sooner this time: then its rules have changed since, or the
        environment is another one than before, or does not follow from its seed.
        """
        episode_N, length_N, action_NLA = (state[name] for name in ("episode", "length", "action"))
        if not len(episode_N) == len(length_N) == len(action_NLA) == self.num_envs:
            raise CheckpointError(f"the state is of {len(episode_N)} environments, and there are {self.num_envs}")
        self._episode_N = np.array(episode_N, np.int64)
        # States of earlier versions have none.
        rules_N = state.get("rules", np.zeros(self.num_envs, np.int64))
        return self._batched(
            [
                self._again(place, action_NLA[place, : length_N[place]], int(rules_N[place]))
                for place in range(self.num_envs)
            ]
        )

    def _again(self, place: int, action_LA: np.ndarray, rules: int) -> Any:
        seen = self._begin(place)
        shape = self.single_action_space.shape
        for step, action_A in enumerate(action_LA):
            action = int(action_A[0]) if self.is_discrete else action_A.reshape(shape)
            try:
                seen, _, terminated, truncated, _ = self.envs[place].step(action)
            except (Exception, SystemExit) as error:
                self._raise_failure(place, error)
            self._done[place].append(action)
            if terminated or truncated:
                changed = "; ".join(self._changed_rules(place)[rules:])
                why = (
                    f"the run was begun by an earlier version of anabranch, and since then {changed}; begin a new run, or evaluate this one"
                    if changed
                    else "it is another one than before, or does not follow from its seed, and the run cannot be resumed"
                )
                raise CheckpointError(
                    f"environment {self._first + place} ended its episode after step {step + 1} of {len(action_LA)} that were done again; "
                    f"{why}"
                )
        return seen

    def drawn(self, place: int) -> Any:
        """What an environment draws of itself, in the way that it was made to."""
        try:
            return self.envs[place].render()
        except (Exception, SystemExit) as error:
            self._raise_failure(place, error)

    def close_extras(self, **_: Any) -> None:
        """Close the environments, all of them. What the first to fail fails with is told, unless one has failed before."""
        failed: list[tuple[int, BaseException]] = []
        for place, env in enumerate(self.envs):
            try:
                env.close()
            except (Exception, SystemExit) as error:
                failed.append((place, error))
        # Also where it fails: Python closes what is open once more as it ends, and would complain.
        self.closed = True
        if failed and not self._has_failed:
            self._raise_failure(*failed[0])
