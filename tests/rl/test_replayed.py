"""Environments of others that fail, or end the process, wherever they are asked for something: it is told as a fault of theirs."""

import sys

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from anabranch.cli.main import main  # noqa: E402
from anabranch.errors import AnabranchError, ConfigError, DataError  # noqa: E402
from anabranch.rl import Gymnasium  # noqa: E402
from anabranch.rl.replayed import ReplayedWorld  # noqa: E402

# An environment that fails where, and with what, its arguments say; and a module that ends the process as it is imported.
FAILS = """
import sys
import gymnasium

class Fails(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, where="", error="", render_mode=None):
        self.where, self.error, self.render_mode, self.steps = where, error, render_mode, 0
        self.at("constructor")

    def at(self, where):
        if where == self.where:
            if self.error == "leaves":
                sys.exit("no\\nlicence")
            raise {"fails": RuntimeError("no\\nlicence"), "number": SystemExit(3)}[self.error]

    @property
    def observation_space(self):
        self.at("observation_space")
        return gymnasium.spaces.Box(-1, 1, (3,))

    @property
    def action_space(self):
        self.at("action_space")
        return gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at("reset")
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.at("step")
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 5, False, {}

    def render(self):
        self.at("render")
        return __import__("numpy").zeros((4, 4, 3), "uint8")

    def close(self):
        self.at("close")

gymnasium.register("Fails-v0", entry_point=Fails, disable_env_checker=True, order_enforce=False)
"""
WHERE = ["constructor", "observation_space", "action_space", "reset", "step", "again", "render", "close"]
TOLD = {"fails": "RuntimeError: no licence", "leaves": "SystemExit: no licence", "number": "SystemExit: 3"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with them."""
    (tmp_path / "module_that_fails.py").write_text(FAILS)
    (tmp_path / "module_that_leaves.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    gymnasium.registry.pop("Fails-v0", None)
    for name in ("module_that_fails", "module_that_leaves"):
        sys.modules.pop(name, None)


def live(where, error):
    """All that is asked of an environment."""
    given = {"where": "step" if where == "again" else where, "error": error}
    environment = Gymnasium.Config(id="module_that_fails:Fails-v0", arguments=given).build()
    world = environment.make(1, seed=0, first=7, render_mode="rgb_array")
    world.reset()
    if where == "again":
        world.load_state_dict(
            {"episode": np.zeros(1, int), "length": np.ones(1, int), "action": np.zeros((1, 1, 1), int)}
        )
    for _ in range(6):
        world.step(np.zeros(1, int))
    environment.frame(world)
    world.close()
    return world


@pytest.mark.parametrize("error", TOLD)
@pytest.mark.parametrize("where", WHERE)
def test_whatever_an_environment_fails_with_is_told_as_its_own(here, where, error):
    with pytest.raises(AnabranchError) as raised:
        live(where, error)
    told = str(raised.value)
    assert "\n" not in told
    if where in ("constructor", "observation_space"):
        assert isinstance(raised.value, ConfigError)
        said = TOLD[error].removeprefix("RuntimeError: ")
        assert told == f"environment.id is 'module_that_fails:Fails-v0': {said}"
    else:
        assert isinstance(raised.value, DataError)
        assert told == f"environment 7 failed with {TOLD[error]}; mend it, and resume"


def test_one_that_fails_nowhere(here):
    assert live("", "").closed


def test_a_module_that_ends_the_process_as_it_is_imported(here):
    with pytest.raises(ConfigError, match=r"environment\.id is 'module_that_leaves:Fails-v0': SystemExit: 4"):
        Gymnasium.Config(id="module_that_leaves:Fails-v0").build().make(1, seed=0)


@pytest.mark.parametrize("error", TOLD)
@pytest.mark.parametrize("where", ["constructor", "action_space", "reset", "step", "close"])
def test_a_command_tells_it_in_one_line(here, capfd, where, error):
    given = ["--samples", "512", "--out", str(here / "run"), "--quiet", "--set", "task.environment.arguments.where"]
    given[-1] += f"={where}"
    code = main(
        ["rl", "train", "module_that_fails:Fails-v0", *given, "--set", f"task.environment.arguments.error={error}"]
    )
    err = capfd.readouterr().err
    assert code == 2
    assert [line for line in err.splitlines() if line] == [err.strip()]
    assert err.startswith("error: environment")
    assert TOLD[error].removeprefix("RuntimeError: ") in err


class Closed(gymnasium.Env):
    """Notes that it is closed, and fails at that."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Discrete(2)

    def __init__(self, closed, number, failing=()):
        self.closed, self.number, self.failing = closed, number, failing

    def reset(self, *, seed=None, options=None):
        if "reset" in self.failing:
            sys.exit(5)
        return np.zeros(3, np.float32), {}

    def close(self):
        self.closed.append(self.number)
        if "close" in self.failing:
            raise OSError(f"socket {self.number}")


def world_of(closed, failing):
    numbers = iter(range(9))
    return ReplayedWorld(lambda: Closed(closed, next(numbers), failing), 3, seed=0)


def test_all_are_closed_whatever_one_of_them_fails_with():
    closed = []
    world = world_of(closed, ["close"])
    world.reset()
    with pytest.raises(DataError, match="environment 0 failed with OSError: socket 0"):
        world.close()
    assert closed == [0, 1, 2]
    # Python closes it once more, of which there is nothing to tell.
    world.close()
    assert closed == [0, 1, 2]


def test_what_failed_first_is_told():
    closed = []
    world = world_of(closed, ["close", "reset"])
    with pytest.raises(DataError, match="environment 0 failed with SystemExit: 5"):
        world.reset()
    world.close()
    assert closed == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError("full"), SystemExit(6)])
def test_those_that_were_made_are_closed_where_another_cannot_be(error):
    closed, made = [], iter([Closed([], 0), Closed([], 1)])

    def make():
        env = next(made, None)
        if env is None:
            raise error
        env.closed = closed
        return env

    with pytest.raises(DataError, match=f"environment 6 failed with {type(error).__name__}: {error}; mend it"):
        ReplayedWorld(make, 3, seed=0, first=4)
    assert closed == [0, 1]
