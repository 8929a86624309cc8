"""How many steps a second has LaneWorld beside HighwayEnv, and PPO beside Stable-Baselines3?

world       64 worlds of LaneWorld with 20 cars each, one step of all, against as many steps of HighwayEnv's highway with 20 cars: both
            at 10 decisions and 10 steps of physics a second, one thread. bar: 50 times
ppo         acting and learning on 512 samples of HighwayEnv's roundabout under its own reward: the same network, rollouts, epochs and
            mini-batches; Stable-Baselines3 in one process or in eight, whichever is quicker. Ours has its processes, and asks all lanes
            of a map at once, which gives the same episodes to the bit. bar: 1.5 times Stable-Baselines3's samples a second
ppo on roads as HighwayEnv asks them      the same without asking them at once: what processes alone give. no bar
cartpole    the same on 2,048 samples of CartPole, where the environment costs little. no bar

python benchmarks/rl.py --threads 2 --json benchmarks/results/rl.json           # needs gymnasium, highway-env, stable-baselines3
"""
# Shapes: W worlds

import atexit
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import highway_env
import numpy as np

from _harness import arguments, compare, finish, start
from anabranch.rl import Gymnasium, LaneWorld, training
from anabranch.rl.laneworld import Settings
from anabranch.train import Trainer

WORLDS, CARS = 64, 20
HIDDEN = (256, 256)


def laneworld() -> Callable[[], None]:
    """One step of all worlds, on the road with a little steering; episodes end and begin as they do."""
    world = LaneWorld.Config(world=Settings(traffic=CARS)).build().make(WORLDS, seed=0)
    world.reset()
    rng = np.random.default_rng(0)

    def work() -> None:
        world.step(rng.uniform(-1, 1, (WORLDS, 2)) * np.array([0.05, 1.0]))

    return work


def highway() -> Callable[[], None]:
    """As many steps of HighwayEnv, continuous actions as there."""
    gymnasium.register_envs(highway_env)
    config = {
        "action": {"type": "ContinuousAction"},
        "vehicles_count": CARS,
        "policy_frequency": 10,
        "simulation_frequency": 10,
        "duration": 60,
    }
    env = gymnasium.make("highway-v0", config=config)
    env.reset(seed=0)
    rng = np.random.default_rng(0)

    def work() -> None:
        for _ in range(WORLDS):
            action = (rng.uniform(-1, 1, 2) * np.array([1.0, 0.05])).astype(np.float32)
            _, _, over, cut, _ = env.step(action)
            if over or cut:
                env.reset()

    return work


# Seconds in which contestants acted and learned: neither making environments and processes nor an evaluation is in them.
_learned_s = 0.0


def learned_s() -> float:
    """A clock that stands still where nobody learns."""
    return _learned_s


def ours(environment: dict[str, Any], samples: int, envs: int, steps: int, batch: int) -> Callable[[], None]:
    """A training of this length, from nothing."""
    settings: dict[str, Any] = {
        "task.environment": environment,
        "task.num_envs": envs,
        "task.rollout_steps": steps,
        "task.epochs": 10,
        "task.hidden": list(HIDDEN),
        "task.eval_episodes": 1,
        "train.batch_size": batch,
        "train.checkpoint_every": samples * 10,
        "train.device": "cpu",
    }
    run = training("cartpole", samples=samples, settings=settings)

    def work() -> None:
        global _learned_s
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(run, Path(folder) / "run")
            trainer.stream.actor.open()
            _learned_s += trainer.fit().seconds
            trainer.stream.close()

    return work


def theirs(id: str, samples: int, envs: int, steps: int, batch: int, *, processes: bool) -> Callable[[], None]:
    """The same by Stable-Baselines3, in one process or in one for each environment, which are kept."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    world = make_vec_env(id, n_envs=envs, seed=0, vec_env_cls=SubprocVecEnv if processes else DummyVecEnv)
    atexit.register(world.close)

    class Watch(BaseCallback):
        """Notes when acting begins: the environments are reset by then, as ours are."""

        begin = 0.0

        def _on_training_start(self) -> None:
            self.begin = time.perf_counter()

        def _on_step(self) -> bool:
            return True

    def work() -> None:
        global _learned_s
        layers = {"net_arch": {"pi": list(HIDDEN), "vf": list(HIDDEN)}}
        learner = PPO(
            "MlpPolicy", world, n_steps=steps, batch_size=batch, n_epochs=10, policy_kwargs=layers, device="cpu", seed=0
        )
        watch = Watch()
        learner.learn(samples, callback=watch)
        _learned_s += time.perf_counter() - watch.begin

    return work


def against(name: str, mine: dict[str, Any], size: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    """A row of PPO beside Stable-Baselines3's on the environment ``size[0]``."""
    peers = {
        "Stable-Baselines3": theirs(*size, processes=False),
        "Stable-Baselines3, SubprocVecEnv": theirs(*size, processes=True),
    }
    row = compare(name, ours(mine, *size[1:]), peers, rounds=rounds, clock=learned_s)
    return {**row, "samples_per_second": round(1e3 * size[1] / row["ours"])}


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    start(options)
    rows = []
    if options.only in "world":
        Gymnasium.Config(id="CartPole-v1").build().make(1, seed=0).close()
        row = compare("world", laneworld(), {"HighwayEnv": highway()}, rounds=options.rounds)
        rows.append({**row, "steps_per_second": round(1e3 * WORLDS / row["ours"])})
    highway_envs = {"kind": "highway", "id": "roundabout-v1", "own_reward": True, "workers": 0}
    cases = (
        ("ppo", highway_envs, "roundabout-v1", 512, 8, 32, 64),
        ("ppo on roads as HighwayEnv asks them", highway_envs | {"quick": False}, "roundabout-v1", 512, 8, 32, 64),
        ("cartpole", {"kind": "gymnasium", "id": "CartPole-v1"}, "CartPole-v1", 2048, 8, 32, 64),
    )
    for name, mine, id, samples, envs, steps, batch in cases:
        if options.only in name:
            gymnasium.register_envs(highway_env)
            size = (id, samples // 4, envs, 8, batch) if options.quick else (id, samples, envs, steps, batch)
            rows.append(against(name, mine, size, options.rounds))
    peers = ["stable-baselines3"] if any(row["case"] != "world" for row in rows) else []
    finish("rl", rows, options, ["torch", "gymnasium", "highway-env", *peers])


if __name__ == "__main__":
    main()
