"""A small world for tests of reinforcement learning, which needs no gymnasium: a walk in a corridor.

It is found as those of other packages are, by the entry point in rl_worlds-0.dist-info.
"""

import numpy as np

from anabranch.config import configclass
from anabranch.rl import Actions, Environment, Layout, episode_seed

LENGTH, LIMIT = 6, 9


class Corridor(Environment, kind="corridor"):
    """Walk to the right end of a corridor of 6 places: reward 1 there, -0.1 a step; cut off after 9 steps.

    With ``is_vector`` an action is a number from -2 to 2, and above 0 goes right. ``bad`` is the number of an environment whose reward is
    NaN at its third step. The critic alone sees how many steps are left.
    """

    @configclass
    class Config(Environment.Config):
        """See the class."""

        is_vector: bool = False
        bad: int | None = None

    @property
    def layout(self):
        actions = Actions(0, (-2.0,), (2.0,)) if self.config.is_vector else Actions(2)
        return Layout(2, 1, actions)

    def make(self, num, *, seed, first=0):
        return CorridorWorld(num, seed, first, self.config.bad)


class CorridorWorld:
    def __init__(self, num, seed, first, bad):
        self.num_envs, self.seed, self.first, self.bad = num, seed, first, bad
        self.place = np.zeros(num, np.int64)
        self.steps = np.zeros(num, np.int64)
        self.episode = np.zeros(num, np.int64)
        self.is_open = True

    def reset(self, *, seed=None, options=None):
        self.episode[:] = 0
        self._begin(np.ones(self.num_envs, bool))
        return self._seen(), {}

    def _begin(self, which):
        for place in np.flatnonzero(which):
            self.place[place] = episode_seed(self.seed, self.first + int(place), int(self.episode[place])) % (
                LENGTH - 1
            )
            self.steps[place] = 0

    def _seen(self):
        middle = self.place / LENGTH
        return {
            "policy": np.stack([middle, np.sin(self.place)], 1).astype(np.float32),
            "critic": (self.steps[:, None] / LIMIT).astype(np.float32),
        }

    def step(self, actions):
        right = np.asarray(actions).reshape(self.num_envs) > 0
        self.place = np.clip(self.place + np.where(right, 1, -1), 0, LENGTH - 1)
        self.steps += 1
        over = self.place == LENGTH - 1
        cut = (self.steps >= LIMIT) & ~over
        reward = np.where(over, 1.0, -0.1)
        if self.bad is not None and self.first <= self.bad < self.first + self.num_envs:
            reward[self.bad - self.first] = np.where(self.steps[self.bad - self.first] == 3, np.nan, -0.1)
        done = over | cut
        infos = {}
        if done.any():
            infos = {"final_obs": self._seen(), "_final_obs": done, "outcome": {"arrived": over.astype(float)}}
            self.episode[done] += 1
            self._begin(done)
        return self._seen(), reward, over, cut, infos

    def state_dict(self):
        return {"place": self.place.copy(), "steps": self.steps.copy(), "episode": self.episode.copy()}

    def load_state_dict(self, state):
        self.place, self.steps, self.episode = (state[name].copy() for name in ("place", "steps", "episode"))
        return self._seen()

    def close(self):
        self.is_open = False
