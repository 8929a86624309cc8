"""Environments in several processes are closed as those of one process are."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from anabranch.errors import ConfigError, DataError  # noqa: E402
from anabranch.rl import Gymnasium  # noqa: E402

MODULE = """
import os, sys
import gymnasium
import numpy as np


class Noted(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Discrete(2)

    def __init__(self, folder, failing=""):
        self.folder, self.failing = folder, failing
        self.note("opened")
        if "constructor" in failing:
            raise OSError("no port is free")

    def note(self, what):
        with open(os.path.join(self.folder, what), "a") as file:
            file.write("x")

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        if "step" in self.failing:
            raise OSError("it is stuck")
        return np.zeros(3, np.float32), 0.0, False, False, {}

    def close(self):
        self.note("closed")
        if "close" in self.failing:
            raise OSError("display is gone")
        if "exit" in self.failing:
            sys.exit(4)
        if "end" in self.failing:
            os._exit(5)


gymnasium.register("Noted-v0", entry_point=Noted)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes five environments, of which each notes its opening and closing."""
    (tmp_path / "module_that_notes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def made(workers, failing=""):
        arguments = {"folder": str(tmp_path), "failing": failing}
        config = Gymnasium.Config(id="module_that_notes:Noted-v0", arguments=arguments, workers=workers)
        return config.build().make(5, seed=0)

    return made


def _counts(folder):
    return [len((folder / what).read_text()) if (folder / what).exists() else 0 for what in ("opened", "closed")]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_run", [False, True])
def test_as_many_are_closed_as_were_opened(make, tmp_path, workers, is_run):
    """Those of other processes were never closed, and what they had begun went on."""
    world = make(workers)
    if is_run:
        world.reset()
        world.step(np.zeros(5, int))
    world.close()
    world.close()
    opened, closed = _counts(tmp_path)
    assert opened == closed >= 5


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("failing", "told"), [("close", "OSError: display is gone"), ("exit", "SystemExit: 4")])
def test_what_closing_fails_with_is_told(make, tmp_path, workers, failing, told):
    world = make(workers, failing)
    world.reset()
    with pytest.raises(DataError, match=f"environment 0 failed with {told}; mend it"):
        world.close()
    world.close()
    opened, closed = _counts(tmp_path)
    assert opened == closed >= 5


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_failed_first_is_told(make, tmp_path, workers):
    world = make(workers, "step close")
    world.reset()
    with pytest.raises(DataError, match="environment 0 failed with OSError: it is stuck"):
        world.step(np.zeros(5, int))
    world.close()
    assert _counts(tmp_path) == [5, 5]


@pytest.mark.slow
def test_one_that_ends_its_process_as_it_is_closed_is_told(make):
    world = make(2, "end")
    with pytest.raises(
        DataError, match=r"a process that ran environments has ended \(code 5\) before these were closed"
    ):
        world.close()
    world.close()


@pytest.mark.slow
def test_one_that_cannot_be_made_is_told(make):
    with pytest.raises(ConfigError, match="no port is free"):
        make(2, "constructor")


@pytest.mark.slow
def test_an_answer_that_nobody_has_read_is_in_nobodys_way(make, tmp_path):
    """As where somebody ends the run while processes work."""
    world = make(2)
    world.reset()
    for worker, part in zip(world._workers, world._shares, strict=True):
        worker.ask("step", (np.zeros(len(part), int),))
    world.close()
    assert _counts(tmp_path) == [5, 5]


@pytest.mark.slow
def test_they_are_closed_where_the_one_who_acts_is_gone(make, tmp_path):
    world = make(2)
    workers = [worker._process for worker in world._workers]
    for worker in workers:
        worker.stdout.close()
        worker.stdin.close()
        assert worker.wait(60) == 0
    assert _counts(tmp_path) == [5, 5]
    world._workers = []
    world.close()
