"""A small world for tests of reinforcement learning, which needs no gymnasium: a walk in a corridor.

It is found as those of other packages are, by the entry point in rl_worlds-0.dist-info.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from anabranch.config import configclass
from anabranch.rl import PPO, Actions, Environment, Layout, Rollouts, episode_seed
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer

LENGTH, LIMIT = 6, 9


class Corridor(Environment, kind="corridor"):
    """Walk to the right end of a corridor of 6 places: reward 1 there, -0.1 a step; cut off after 9 steps.

    With ``is_vector`` an action is a number from -2 to 2, and above 0 goes right. ``bad`` is the number of an environment whose reward is
    ``worst`` (NaN if None) at its third step, ``slow`` of one whose step takes 10 ms,
    ``blind`` of one that sees NaN after two steps. The critic alone sees how many steps are left.
    """

    @configclass
    class Config(Environment.Config):
        """See the class."""

        is_vector: bool = False
        bad: int | None = None
        worst: float | None = None
        slow: int | None = None
        blind: int | None = None

    @property
    def layout(self):
        actions = Actions(0, (-2.0,), (2.0,)) if self.config.is_vector else Actions(2)
        return Layout(2, 1, actions)

    def make(self, num, *, seed, first=0):
        return CorridorWorld(num, seed, first, self.config)


class CorridorWorld:
    def __init__(self, num, seed, first, config):
        self.num_envs, self.seed, self.first, self.bad = num, seed, first, config.bad
        self.worst = np.nan if config.worst is None else config.worst
        self.blind = None if config.blind is None else config.blind - first
        self.is_slow = config.slow is not None and first <= config.slow < first + num
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
        if self.blind is not None and 0 <= self.blind < self.num_envs and self.steps[self.blind] == 2:
            middle[self.blind] = np.nan
        return {
            "policy": np.stack([middle, np.sin(self.place)], 1).astype(np.float32),
            "critic": (self.steps[:, None] / LIMIT).astype(np.float32),
        }

    def step(self, actions):
        if self.is_slow:
            time.sleep(0.01)
        right = np.asarray(actions).reshape(self.num_envs) > 0
        self.place = np.clip(self.place + np.where(right, 1, -1), 0, LENGTH - 1)
        self.steps += 1
        over = self.place == LENGTH - 1
        cut = (self.steps >= LIMIT) & ~over
        reward = np.where(over, 1.0, -0.1)
        if self.bad is not None and self.first <= self.bad < self.first + self.num_envs:
            reward[self.bad - self.first] = np.where(self.steps[self.bad - self.first] == 3, self.worst, -0.1)
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


def run(*, batch_size=8, steps=8, train=None, **fields):
    """A training of PPO in a corridor, of rollouts of 4 x 8 samples."""
    environment = fields.pop("environment", Corridor.Config())
    config = PPO.Config(
        **{
            "environment": environment,
            "num_envs": 4,
            "rollout_steps": 8,
            "epochs": 2,
            "hidden": (8,),
            "eval_episodes": 4,
        }
        | fields
    )
    settings = {"schedule": Constant.Config(), "weight_decay": 0.0, "learning_rate": 1e-2} | (train or {})
    return TaskRunConfig(task=config, train=TrainConfig(steps=steps, batch_size=batch_size, **settings))


def rollouts(model_seed=0, **fields):
    """Those of `run`, with a new network."""
    made = run(**fields)
    task = made.task.build()
    torch.manual_seed(model_seed)
    stream = Rollouts(task.environment, made.task.collecting, batch_size=made.train.batch_size, seed=3)
    stream.model = task.network()
    return stream


def train_rank(rank, run, folder, ranks):
    """A process of a training whose rollouts may be stopped; writes how long they were, and its weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    lengths = []
    trainer = Trainer(run, Path(folder) / "run")
    acts = trainer.stream._collect

    def collect(number):
        acts(number)
        lengths.append(len(trainer.stream.rollout.samples.value_B))

    trainer.stream._collect = collect
    trainer.fit()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.save({"lengths": lengths, "weights": weights}, Path(folder) / f"{rank}.pt")
    # Threads of gloo may still let go of tensors; see `Workers.close`.
    time.sleep(0.2)
    dist.destroy_process_group()
