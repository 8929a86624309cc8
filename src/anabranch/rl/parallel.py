"""`ParallelWorld`: environments in several processes, so that those that take long do not wait for each other.

What happens is that of one process, to the bit: an episode follows from the seed, the number of its environment and its own number.
"""
# Shapes: N environments, W processes

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from anabranch.config import to_dict
from anabranch.errors import DataError
from anabranch.rl.environment import OUTCOME, Environment
from anabranch.rl.world_worker import CLOSED, LAST

__all__ = ["ParallelWorld"]

# Seconds until a process that was told to end is ended, and until its environments are closed: a simulator may have much to put away.
_PATIENCE_S, _CLOSING_S = 5.0, 30.0


class ParallelWorld(VectorEnv):
    """See the module. A `anabranch.rl.environment.World`.

    Args:
        config: of the environment, which must make its world in one process.
        num: N.
        workers: W, at most; no process has less than one environment.
        seed: of all episodes.
        first: number of the first environment; the others follow.

    Raises what making the environments raises, DataError if a process ends.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self, config: Environment.Config, num: int, *, workers: int, seed: int, first: int = 0) -> None:
        self.num_envs = num
        self._shares = [part for part in np.array_split(np.arange(num), min(workers, num)) if len(part)]
        self._workers: list[_Worker] = []
        self._has_failed = False
        try:
            for part in self._shares:
                self._workers.append(_Worker())
                given = {"path": sys.path, "config": to_dict(config), "num": len(part), "seed": seed}
                self._workers[-1].ask("begin", given | {"first": first + int(part[0])})
            spaces = self._answers()
        except BaseException:
            self._has_failed = True
            self.close_extras()
            raise
        self.single_observation_space, self.single_action_space = spaces[0]
        self.observation_space = batch_space(self.single_observation_space, num)
        self.action_space = batch_space(self.single_action_space, num)

    def _all(self, name: str, given: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What all processes answer, who work at the same time."""
        try:
            for worker, arguments in zip(self._workers, given, strict=True):
                worker.ask(name, arguments)
            return self._answers()
        except BaseException:
            self._has_failed = True
            raise

    def _answers(self) -> list[Any]:
        """One of each; an error of any is raised once all have answered, so that nothing of it is taken for a later answer."""
        found = [worker.answer() for worker in self._workers]
        for is_answer, value in found:
            if not is_answer:
                raise value
        return [value for _, value in found]

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin episode 0 in every environment. ``seed`` and ``options`` are not looked at."""
        found = self._all("reset", [()] * len(self._workers))
        return self._joined([seen for seen, _ in found]), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of each; see `anabranch.rl.environment.World`."""
        actions = np.asarray(actions)
        found = self._all("step", [(actions[part],) for part in self._shares])
        seen = self._joined([one[0] for one in found])
        reward_N, terminated_N, truncated_N = (np.concatenate([one[place] for one in found]) for place in (1, 2, 3))
        return seen, reward_N, terminated_N, truncated_N, self._infos([one[4] for one in found])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Of all processes; see `anabranch.rl.environment.World`."""
        from anabranch.rl.acting import joined_states

        return joined_states(self._all("state_dict", [()] * len(self._workers)))

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> Any:
        """Go to where ``state`` says; the observations of there."""
        given = [({name: array[part] for name, array in state.items()},) for part in self._shares]
        return self._joined(self._all("load_state_dict", given))

    def _joined(self, parts: list[Any]) -> Any:
        if isinstance(self.single_observation_space, gymnasium.spaces.Dict):
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return np.concatenate(parts)

    def _infos(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """What processes tell of ended episodes; where a process tells of none, its places are empty."""
        made: dict[str, Any] = {}
        for part, told in zip(self._shares, parts, strict=True):
            for name, array in told.items():
                if name == OUTCOME:
                    for key, values in array.items():
                        made.setdefault(OUTCOME, {}).setdefault(key, np.full(self.num_envs, np.nan))[part] = values
                else:
                    empty = np.zeros(self.num_envs, bool) if array.dtype == bool else np.full(self.num_envs, None)
                    made.setdefault(name, empty)[part] = array
        return made

    def close_extras(self, **_: Any) -> None:
        """Close the environments, all of them, and end the processes. What the first to fail fails with is told, unless something has
        failed before."""
        workers, self._workers = self._workers, []
        # All at the same time.
        for worker in workers:
            worker.ask_no_more()
        end_s = time.monotonic() + _CLOSING_S
        failed = [error for error in [worker.close(end_s) for worker in workers] if error is not None]
        # Also where it fails: Python closes what is open once more as it ends, and would complain.
        self.closed = True
        if failed and not self._has_failed:
            raise failed[0]


class _Worker:
    """One process."""

    def __init__(self) -> None:
        # Each has a core of its own, so one thread.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "anabranch.rl.world_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def ask(self, name: str, given: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump((name, given), self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def answer(self) -> tuple[bool, Any]:
        """(True, the answer), or (False, an error)."""
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._ended() from None

    def _ended(self) -> DataError:
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = None
        return DataError(
            f"a process that ran environments has ended (code {code}); what it said stands above; resume the run, or set "
            "task.environment.workers=1"
        )

    def ask_no_more(self) -> None:
        """Tell it to end."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            # It is gone already, with what it was to be told.
            return

    def close(self, end_s: float) -> Exception | None:
        """End it, once it has closed its environments or at this time; what that failed with."""
        assert self._process.stdout is not None
        told, waiting = bytearray(), select.poll()
        with self._process.stdout as stdout:
            waiting.register(stdout, select.POLLIN)
            while not told.endswith(CLOSED):
                ready = waiting.poll(1e3 * max(end_s - time.monotonic(), 0))
                # Past what is kept of earlier answers, of which nobody reads any more.
                more = os.read(stdout.fileno(), 1 << 16) if ready else b""
                if not more:
                    break
                told += more
        if not told.endswith(CLOSED):
            failed: Exception | None = self._unclosed(end_s)
        else:
            size, _ = LAST.unpack(told[-LAST.size :])
            failed = pickle.loads(told[-LAST.size - size : -LAST.size])
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return failed

    def _unclosed(self, end_s: float) -> DataError:
        """It has not said that its environments are closed, by this time."""
        try:
            code = self._process.wait(max(end_s - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return DataError(
                f"environments did not close within {_CLOSING_S:g} s, and their process was ended; mend their close"
            )
        return DataError(
            f"a process that ran environments has ended (code {code}) before these were closed; what it said stands above"
        )
