"""Environments of gymnasium: kept and resumed by doing again what was done, spaces, and what is refused. And ready runs of them."""

import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from anabranch.config import configclass  # noqa: E402
from anabranch.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from anabranch.rl import (  # noqa: E402
    PPO,
    Film,
    Gymnasium,
    LaneWorld,
    Rollouts,
    episode_seed,
    judge,
    load_agent,
    record,
    training,
)
from anabranch.rl.environment import flat, in_numbers, layout_of  # noqa: E402
from anabranch.rl.evaluation import evaluation_seed  # noqa: E402
from anabranch.rl.laneworld import Settings  # noqa: E402
from anabranch.rl.runs import PRESETS, samples_of  # noqa: E402
from anabranch.train import Trainer  # noqa: E402
from guide_worlds import MAZE  # noqa: E402

spaces = gymnasium.spaces
CARTPOLE = Gymnasium.Config(id="CartPole-v1").build()
PENDULUM = Gymnasium.Config(id="Pendulum-v1", arguments={"max_episode_steps": 5}).build()


def test_an_episode_follows_from_its_seed_and_what_is_done():
    """Environment 3 of a world is environment 1 of the part that begins at 2, and gymnasium's own from that seed."""
    whole, part = CARTPOLE.make(4, seed=9), CARTPOLE.make(2, seed=9, first=2)
    own = gymnasium.make("CartPole-v1")
    seen, _ = own.reset(seed=episode_seed(9, 3, 0))
    observations, others = whole.reset()[0], part.reset()[0]
    rng = np.random.default_rng(0)
    for _ in range(60):
        assert np.array_equal(observations[3], seen)
        assert np.array_equal(observations[2:], others)
        action = rng.integers(0, 2, 4)
        observations, _, over, _, infos = whole.step(action)
        others = part.step(action[2:])[0]
        seen, _, ended, _, _ = own.step(int(action[3]))
        if ended:
            assert over[3]
            assert np.array_equal(infos["final_obs"][3], seen)
            assert infos["_final_obs"][3]
            break
    assert ended
    seen, _ = own.reset(seed=episode_seed(9, 3, 1))
    assert np.array_equal(observations[3], seen)


def test_a_place_is_kept_and_found_again():
    for environment, draw in (
        (CARTPOLE, lambda rng: rng.integers(0, 2, 3)),
        (PENDULUM, lambda rng: rng.uniform(-2, 2, (3, 1)).astype(np.float32)),
    ):
        rng = np.random.default_rng(1)
        world, other = environment.make(3, seed=2), environment.make(3, seed=2)
        world.reset()
        for _ in range(13):
            observations = world.step(draw(rng))[0]
        found = other.load_state_dict(world.state_dict())
        assert np.array_equal(found, observations)
        for _ in range(20):
            action = draw(rng)
            mine, theirs = world.step(action), other.step(action)
            for one, two in zip(mine[:4], theirs[:4], strict=True):
                assert np.array_equal(one, two)


def test_a_place_that_does_not_fit_is_refused():
    world = CARTPOLE.make(2, seed=0)
    world.reset()
    with pytest.raises(CheckpointError, match="of 2 environments, and there are 3"):
        CARTPOLE.make(3, seed=0).load_state_dict(world.state_dict())
    state = {"episode": np.zeros(2, int), "length": np.array([60, 0]), "action": np.ones((2, 60, 1), int)}
    with pytest.raises(CheckpointError, match=r"environment 0 ended its episode after step \d+ of 60"):
        world.load_state_dict(state)


def test_layouts_of_spaces():
    box = spaces.Box(-1, 1, (2, 3))
    found = layout_of(spaces.Dict(policy=box, critic=spaces.Box(0, 1, (4,))), spaces.Discrete(5))
    assert (found.num_observed, found.num_private, found.actions.choices) == (6, 4, 5)
    found = layout_of(box, spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64))
    assert found.actions.low_A == (-1.0, 0.0)
    assert not found.actions.is_bounded
    seen = {"policy": np.ones((3, 2, 3)), "critic": np.zeros((3, 4))}
    assert flat(seen).shape == (3, 10)
    assert flat(seen).dtype == np.float32
    found = layout_of(box, spaces.MultiDiscrete([3, 2]))
    assert (found.actions.several, found.actions.num_choices, found.actions.num_numbers) == ((3, 2), 5, 2)
    assert layout_of(box, spaces.MultiBinary(3)).actions.several == (2, 2, 2)


class Odd(gymnasium.Env):
    """Sees what it is told to, and tells what was done as the reward; five steps long."""

    def __init__(self, seen, done):
        self.observation_space, self.action_space, self.steps = seen, done, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self.steps == 5, {}


class MadeOdd(Gymnasium, kind="odd"):
    seen, done = spaces.Discrete(3), spaces.Discrete(2)

    def single(self, **drawing):
        return in_numbers(Odd(self.seen, self.done))


NESTED = spaces.Dict(
    where=spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)]),
    far=spaces.Box(0, 1, (2, 2)),
    what=spaces.MultiDiscrete([2, 4]),
)


@pytest.mark.parametrize(
    ("seen", "done", "numbers"),
    [
        (spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), 3),
        (spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (3,))]), spaces.MultiBinary(3), 5),
        (NESTED, spaces.Discrete(4), 3 + 2 + 4 + 2 + 4),
        (spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,), np.float32), 5),
    ],
)
def test_any_space_of_numbers_is_learned_in_and_resumed(tmp_path, monkeypatch, seen, done, numbers):
    """Actions are what the space has, and observations one row of what gymnasium's own flatten gives."""
    monkeypatch.setattr(MadeOdd, "seen", seen)
    monkeypatch.setattr(MadeOdd, "done", done)
    environment = MadeOdd.Config().build()
    assert environment.layout.num_observed == numbers
    task = PPO.Config(
        environment=environment.config, num_envs=2, rollout_steps=8, epochs=1, hidden=(4,), eval_episodes=2
    )
    stream = Rollouts(environment, task.collecting, batch_size=16, seed=1)
    torch.manual_seed(0)
    stream.model = task.build().network()
    stream.next_batch(16)
    world = environment.make(2, seed=1)
    first, _ = world.reset()
    assert np.array_equal(stream.rollout.samples.observation_BD[:2].numpy(), flat(first))
    assert first.shape == (2, numbers)
    kept = environment.make(2, seed=1)
    kept.load_state_dict({name: array for name, array in stream.actor.state.items() if not name.startswith("own_")})
    assert kept.state_dict()["action"].tolist() == stream.actor.state["action"].tolist()


def test_what_is_no_row_of_numbers_is_refused():
    for space, name in ((spaces.Text(5), "Text"), (spaces.Sequence(spaces.Discrete(2)), "Sequence")):
        with pytest.raises(ConfigError, match=f"observations have a {name}, which is no row of numbers"):
            in_numbers(Odd(spaces.Dict(a=space), spaces.Discrete(2)))
    # Ours are left as they are, and so is a box.
    for space in (spaces.Dict(policy=spaces.Box(0, 1, (2,))), spaces.Box(0, 1, (2,))):
        env = Odd(space, spaces.Discrete(2))
        assert in_numbers(env) is env


@pytest.mark.parametrize(
    ("seen", "done", "message"),
    [
        (spaces.Discrete(3), spaces.Discrete(2), "observations are Discrete"),
        (
            spaces.Dict(a=spaces.Box(0, 1, (1,))),
            spaces.Discrete(2),
            "a dict of a; use boxes called 'policy' and 'critic'",
        ),
        (spaces.Box(0, 1, (1,)), spaces.Discrete(2, start=1), "actions begin at 1"),
        (spaces.Box(0, 1, (1,)), spaces.MultiDiscrete([2, 2], start=[0, 1]), r"actions begin at \[0, 1\]"),
        (spaces.Box(0, 1, (1,)), spaces.MultiDiscrete([[2, 2]]), "several of them, or a box with one axis"),
        (spaces.Box(0, 1, (1,)), spaces.Box(0, 1, (2, 2)), "several of them, or a box with one axis"),
    ],
)
def test_spaces_that_are_not_for_us(seen, done, message):
    with pytest.raises(ConfigError, match=message):
        layout_of(seen, done)


@pytest.mark.parametrize(
    "config",
    [
        Gymnasium.Config(id="Nothing-v7"),
        Gymnasium.Config(id="no_such_package:Nothing-v7"),
        Gymnasium.Config(id="CartPole-v1", arguments={"colour": "red"}),
        Gymnasium.Config(id="a b"),
    ],
)
def test_what_gymnasium_does_not_make_is_one_line(config):
    with pytest.raises(ConfigError, match=r"environment\.id is") as caught:
        config.build().make(1, seed=0)
    assert "\n" not in str(caught.value)


class Broken(gymnasium.Env):
    """Fails in one of many ways after four steps of its second episode, or before."""

    observation_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)

    def __init__(self, how):
        if how == "made":
            raise RuntimeError("no\nlicence")
        self.how, self.steps, self.episodes = how, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episodes = 0, self.episodes + 1
        if self.how == "reset" and self.episodes == 2:
            raise OSError("no file")
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        answer = [np.zeros(3, np.float32), 1.0, False, self.steps == 6, {}]
        if self.episodes == 2 and self.steps == 4:
            return self.wrong(answer)
        return tuple(answer)

    def wrong(self, answer):
        if self.how == "raises":
            raise RuntimeError("the road\nis gone")
        if self.how == "leaves":
            raise SystemExit(3)
        others = {
            "four": answer[:4],
            "shape": [np.zeros(4), *answer[1:]],
            "text": [np.array(["a", "b", "c"]), *answer[1:]],
        }
        others |= {"word": [answer[0], "much", *answer[2:]], "info": [*answer[:3], True, None]}
        return tuple(others[self.how])


class MadeBroken(Gymnasium, kind="broken"):
    @configclass
    class Config(Gymnasium.Config):
        how: str = "raises"

    def single(self, **drawing):
        return Broken(self.config.how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "environment 7 failed with RuntimeError: the road is gone; mend it"),
        ("leaves", "environment 7 failed with SystemExit: 3"),
        ("reset", "environment 7 failed with OSError: no file"),
        ("four", "environment 7 failed with ValueError: not enough values"),
        ("word", "environment 7 failed with ValueError: could not convert string to float: 'much'"),
        ("info", "environment 7 failed with AttributeError"),
        ("shape", r"environment 7 gave an observation of shape \[4\] \(float64\), and its space is \[3\]"),
        ("text", r"environment 7 gave an observation of shape \[3\] \(<U1\)"),
    ],
)
def test_a_fault_of_an_environment_is_told_as_its_own(how, message):
    world = MadeBroken.Config(how=how).build().make(1, seed=0, first=7)
    world.reset()
    for _ in range(5):
        world.step(np.zeros(1, int))
    steps = 1 if how == "reset" else 5
    for _ in range(steps - 1):
        world.step(np.zeros(1, int))
    with pytest.raises(DataError, match=message) as caught:
        world.step(np.zeros(1, int))
    assert "\n" not in str(caught.value)


def test_an_environment_that_cannot_be_made_says_why():
    gymnasium.register("Broken-v0", entry_point=Broken)
    try:
        with pytest.raises(ConfigError, match=r"environment.id is 'Broken-v0': no licence"):
            Gymnasium.Config(id="Broken-v0", arguments={"how": "made"}).build().make(1, seed=0)
    finally:
        del gymnasium.registry["Broken-v0"]


# Ready runs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_divide_any_number_of_samples(name):
    for samples in (None, 130, 2_000, 50_001):
        run = training(name, samples=samples)
        assert run.task.collecting.num_samples % run.train.batch_size == 0
        made = samples_of(run, run.train.steps)
        assert made <= (PRESETS[name]().samples if samples is None else samples)
        # No more than a rollout is left over.
        assert made > 0 if samples is None else samples - made < max(run.task.collecting.num_samples, run.task.num_envs)


def test_what_is_set_leaves_the_samples_as_they_are():
    run = training("cartpole", samples=2_560, settings={"task.epochs": 2, "train.batch_size": 64, "task.gamma": 0.9})
    assert samples_of(run, run.train.steps) == 2_560
    assert (run.task.gamma, run.train.batch_size, run.train.log_every) == (0.9, 64, 8)
    assert training("cartpole", settings={"train.steps": 3}).train.steps == 3


def test_any_environment_of_gymnasium_by_its_id():
    choices, vector = training("Acrobot-v1"), training("Pendulum-v1", samples=10_000)
    assert (choices.task.environment.id, choices.task.num_envs, choices.task.epochs) == ("Acrobot-v1", 4, 4)
    assert (samples_of(choices, choices.train.steps), choices.train.batch_size) == (499_712, 128)
    assert (vector.task.epochs, vector.train.batch_size, vector.train.learning_rate) == (10, 64, 3e-4)
    for run in (choices, vector):
        assert run.task.normalize_observations
        assert run.task.normalize_rewards
    # What is said of the environment is part of it: here, what is done there.
    slow = training("Acrobot-v1", settings={"task.environment.arguments": {"max_episode_steps": 7}})
    assert slow.task.environment.arguments == {"max_episode_steps": 7}
    for name, message in (
        ("Acrobat-v1", "Did you mean: `Acrobot`"),
        ("nothing", "or the id of a gymnasium environment, such as Acrobot-v1"),
        ("no_such_package:Maze-v0", "no_such_package"),
    ):
        with pytest.raises(ConfigError, match=message):
            training(name)


def test_a_package_in_the_working_folder_is_found_whoever_started_python(tmp_path, monkeypatch):
    """The script of an installed command has its own folder in the path, not the working one."""
    (tmp_path / "package_of_a_maze.py").write_text(MAZE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    run = training("package_of_a_maze:Maze-v0", settings={"task.environment.arguments": {"size": 9}})
    assert run.task.environment.build().single().observation_space.shape == (9,)
    with pytest.raises(
        ConfigError, match=r"environment\.id is 'gone:Maze-v0': no module 'gone' is installed, or lies in"
    ):
        training("gone:Maze-v0")


def test_what_is_not_there_to_be_learned():
    with pytest.raises(ConfigError, match="did you mean 'pendulum'"):
        training("pendulun")
    with pytest.raises(ConfigError, match="samples is 3, and cartpole has 8 environments side by side; use at least 8"):
        training("cartpole", samples=3)


def test_an_agent_comes_back_from_its_run(tmp_path):
    trainer = Trainer(training("cartpole", samples=512, seed=4), tmp_path / "run")
    result = trainer.fit()
    agent = load_agent(tmp_path / "run")
    assert agent.step == result.step
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(agent.model.state_dict()[name], value)
    found = judge(agent.model, agent.task.environment, episodes=20, seed=4)
    assert found.measures()["mean_return"] == result.headline
    with pytest.raises(DataError, match="no training run"):
        load_agent(tmp_path)


def test_a_film_of_an_episode(tmp_path):
    pytest.importorskip("pygame")
    image = pytest.importorskip("PIL.Image")
    task = training("cartpole").task.build()
    film = record(task.network(), task.environment, every=3, most=4)
    assert len(film.frames) == min(4, (film.steps - 1) // 3 + 1)
    assert film.total == film.steps
    film.write_gif(tmp_path / "a.gif")
    with image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames >= 1
        assert picture.size == film.frames[0].shape[1::-1]
    files = film.write_png(tmp_path / "a.png")
    assert [file.name for file in files] == [f"a-{number:04}.png" for number in range(len(film.frames))]
    with image.open(files[-1]) as picture:
        assert np.array_equal(np.asarray(picture), film.frames[-1])


def test_pictures_of_frames_are_of_one_film(tmp_path):
    """Those of an earlier one with more frames go; nothing else does that has such a name."""
    image = pytest.importorskip("PIL.Image")
    frames = [np.full((4, 6, 3), number, np.uint8) for number in range(6)]
    others = ["a.png", "a-1.png", "a-00005.png", "aa-0003.png", "b-0003.png", "a-0003.gif", "a-0007.png"]
    for name in others:
        image.fromarray(frames[0]).save(tmp_path / name)
    (tmp_path / "a-0006.png").write_text("no picture")
    Film(frames, 6, 0.0).write_png(tmp_path / "a.png")
    Film(frames[3:5], 2, 0.0).write_png(tmp_path / "a.png")
    assert {file.name for file in tmp_path.iterdir()} == {*others, "a-0000.png", "a-0001.png", "a-0006.png"}
    # No film wrote it.
    image.fromarray(frames[0]).save(tmp_path / "a-0002.png")
    Film(frames[3:5], 2, 0.0).write_png(tmp_path / "a.png")
    assert (tmp_path / "a-0002.png").is_file()


def test_a_picture_of_others_that_cannot_be_opened_fails_no_film(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    huge = []
    # Too large for pillow, and so large that it warns.
    for side in (1_000_000, 10_000):
        sizes = b"IHDR" + struct.pack(">II", side, side) + whole[24:29]
        huge.append(whole[:12] + sizes + struct.pack(">I", zlib.crc32(sizes)) + whole[33:])
    for content in (*huge, whole[:20], whole[:40]):
        (tmp_path / "a-0001.png").write_bytes(content)
        with warnings.catch_warnings(action="error"):
            Film([np.zeros((4, 6, 3), np.uint8)], 1, 0.0).write_png(tmp_path / "a.png")
        assert (tmp_path / "a-0001.png").read_bytes() == content


def test_a_film_shows_what_ended_the_episode():
    """The last frame is of the last step, and not of the beginning of the next episode."""
    pytest.importorskip("PIL")
    settings = Settings(maps=1, routes=4, traffic=8, walkers=0, longest_m=400.0, timeout_s=1.0)
    environment = LaneWorld.Config(world=settings).build()
    model = PPO.Config(environment=environment.config, hidden=(8,)).build().network()
    film = record(model, environment, every=4)
    assert film.steps == 10
    assert len(film.frames) == 3
    world = environment.make(1, seed=evaluation_seed(0))
    seen, pictures = world.reset()[0], []
    world.on_end = lambda place: pictures.append(environment.frame(world))
    for _ in range(10):
        with torch.no_grad():
            parameters = model(torch.from_numpy(flat(seen)), "policy")
        action = model.kind.to_environment(model.kind.distribution(parameters).mode()).numpy()
        seen = world.step(action)[0]
    assert np.array_equal(film.frames[-1], pictures[0])
    assert not np.array_equal(film.frames[-1], environment.frame(world))


def test_a_film_of_any_episode_of_an_evaluation():
    pytest.importorskip("pygame")
    task = training("cartpole").task.build()
    model = task.network()
    # More than are played side by side, so that environments have a second.
    found = judge(model, task.environment, episodes=70, seed=3)
    for number in (0, 1, 34, 35, 69):
        film = record(model, task.environment, seed=3, most=1, episode=number, episodes=70)
        assert (film.total, film.steps) == (found.return_E[number], found.length_E[number])
    with pytest.raises(ConfigError, match="episode is 70; an evaluation of 70 has 0 to 69"):
        record(model, task.environment, episode=70, episodes=70)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "samples", "least"), [("cartpole", 100_000, 475.0), ("pendulum", 300_000, -250.0)])
def test_it_learns_what_others_do(tmp_path, name, samples, least):
    assert Trainer(training(name, samples=samples), tmp_path / "run").fit().headline >= least


# Several processes


@pytest.fixture(scope="module")
def spread():
    """Five environments in two processes."""
    world = Gymnasium.Config(id="CartPole-v1", workers=2).build().make(5, seed=3)
    yield world
    world.close()


@pytest.mark.slow
def test_processes_do_what_one_does(spread):
    alone = CARTPOLE.make(5, seed=3)
    rng = np.random.default_rng(4)
    assert np.array_equal(spread.reset()[0], alone.reset()[0])
    ended = 0
    for _ in range(60):
        action = rng.integers(0, 2, 5)
        ours, theirs = spread.step(action), alone.step(action)
        for one, two in zip(ours[:4], theirs[:4], strict=True):
            assert np.array_equal(one, two)
        done = theirs[2] | theirs[3]
        ended += int(done.sum())
        if done.any():
            assert np.array_equal(ours[4]["_final_obs"], done)
            for place in np.flatnonzero(done):
                assert np.array_equal(ours[4]["final_obs"][place], theirs[4]["final_obs"][place])
    assert ended > 2
    state = alone.state_dict()
    for name, array in spread.state_dict().items():
        assert np.array_equal(array, state[name]), name
    assert np.array_equal(spread.load_state_dict(state), ours[0])


@pytest.mark.slow
def test_an_error_of_a_process_is_told_here(spread):
    state = {"episode": np.zeros(5, int), "length": np.full(5, 60), "action": np.ones((5, 60, 1), int)}
    with pytest.raises(CheckpointError, match="environment 0 ended its episode"):
        spread.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"environment\.id is 'Nothing-v7'"):
        Gymnasium.Config(id="Nothing-v7", workers=2).build().make(2, seed=0)


@pytest.mark.slow
def test_a_process_that_is_gone_is_told():
    world = Gymnasium.Config(id="CartPole-v1", workers=2).build().make(2, seed=0)
    try:
        world.reset()
        world._workers[1]._process.kill()
        world._workers[1]._process.wait()
        with pytest.raises(DataError, match=r"a process that ran environments has ended \(code -9\)"):
            world.step(np.zeros(2, int))
    finally:
        world.close()
