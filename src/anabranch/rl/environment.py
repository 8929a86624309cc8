"""`Environment`: where an agent acts, as part of a config, and what PPO asks of one while it runs (`World`).

    class Maze(Environment):                            # in a package of yours: an entry point in the group anabranch.environment
        def make(self, num, *, seed, first=0): ...      # a `World`

Whatever gymnasium (Towers et al., arXiv 2407.17032) can make is `Gymnasium`. Worlds are gymnasium's vector environments that begin an
ended episode anew in the same step, and that can say where they are.
"""
# Shapes: N environments, D numbers of an observation, A numbers of an action

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.machine import usable_cores
from anabranch.own_code import own_module
from anabranch.rl.network import Layout
from anabranch.rl.policies import Actions

__all__ = [
    "CRITIC",
    "OUTCOME",
    "PICTURE",
    "POLICY",
    "Environment",
    "Gymnasium",
    "World",
    "episode_seed",
    "flat",
    "layout_of",
]

# Of an observation that is a dict: numbers and a picture that the policy sees, one of them at least, and what only the critic does.
POLICY, PICTURE, CRITIC = "policy", "picture", "critic"
_PARTS = (POLICY, PICTURE, CRITIC)
# What the numbers of a picture of whole numbers go up to.
_BRIGHTEST = 255.0
# In what a step tells beside its reward: numbers about an episode by name, ``[N]`` each, good where it has ended.
OUTCOME = "outcome"


class World(Protocol):
    """N environments that run side by side: a ``gymnasium.vector.VectorEnv`` in the mode ``SAME_STEP``, whose place can be kept.

    Episode e of environment n begins as `episode_seed` says, so an episode is a function of the seed, n and e, and of what is done in it.
    Where an episode ends, the observation that comes back is the next one's first, and ``infos["final_obs"]`` has its last.
    """

    num_envs: int
    single_observation_space: Any
    single_action_space: Any

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin the first episode in every environment; ``seed`` is not looked at."""
        ...

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Observations, rewards, terminations, truncations, infos."""
        ...

    def state_dict(self) -> dict[str, np.ndarray]:
        """Where it is: arrays whose first axis are the environments, and whose second, if lengths differ, is filled up with 0."""
        ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> Any:
        """Go to where ``state`` says; the observations of there."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Environment(Part, family="environment"):
    """Interface: makes worlds of one kind. What its config says is saved with the run.

    Attributes:
        is_for_training: whether one may learn there; others judge only.
    """

    is_for_training: ClassVar[bool] = True

    @configclass
    class Config(BaseConfig):
        """Without fields of its own."""

    def __init__(self, config: Environment.Config) -> None:
        self.config = config
        self._layout: Layout | None = None

    def make(self, num: int, *, seed: int, first: int = 0) -> World:
        """The environments ``first`` to ``first + num - 1`` of a world with this seed.

        Raises ConfigError if there is no such environment, MissingExtraError if a package is missing.
        """
        raise NotImplementedError  # abstract

    def frame(self, world: World) -> np.ndarray:
        """A picture of the first environment of ``world``: ``[height, width, 3]``, red, green and blue from 0 to 255.

        Raises ConfigError where there is none.
        """
        raise ConfigError(f"{type(self).__name__} draws no pictures")

    @property
    def layout(self) -> Layout:
        """What an agent sees and does there."""
        if self._layout is None:
            world = self.make(1, seed=0)
            try:
                self._layout = layout_of(world.single_observation_space, world.single_action_space)
            finally:
                world.close()
        return self._layout


class Gymnasium(Environment, kind="gymnasium"):
    """An environment that ``gymnasium.make`` knows; needs the extra ``rl``.

    A place in it is kept as the actions since the episode began, which are done again where a run is resumed: so any environment will do
    whose episodes follow from the seed of its ``reset`` and what is done.
    """

    @configclass
    class Config(Environment.Config):
        """Which environment.

        Attributes:
            id: of gymnasium's registry: ``CartPole-v1``, or ``package:Name-v0``, which imports ``package`` first; that is installed,
                or lies in the working folder.
            arguments: of ``gymnasium.make``.
            workers: processes that environments are spread over; what happens is the same, and slow ones take less time. 0 takes one for
                each processor.
        """

        id: str = Field(default="CartPole-v1", min_length=1)
        arguments: dict[str, Any] = Field(default_factory=dict)
        workers: int = Field(default=1, ge=0, le=1024)

    config: Config

    def make(self, num: int, *, seed: int, first: int = 0, **drawing: Any) -> World:
        """See `Environment`."""
        require("gymnasium", by=f"the environment {self.config.id}")
        from anabranch.rl.replayed import ReplayedWorld

        workers = min(self.config.workers or usable_cores(), num)
        if workers > 1 and not drawing:
            from anabranch.rl.parallel import ParallelWorld

            return ParallelWorld(self.config.replace(workers=1), num, workers=workers, seed=seed, first=first)
        return ReplayedWorld(lambda: self.single(**drawing), num, seed=seed, first=first)

    def single(self, **drawing: Any) -> Any:
        """One environment as gymnasium makes it. Raises ConfigError if it makes none of this name and these arguments, and why."""
        import gymnasium

        self.register()
        package, colon, _ = self.config.id.partition(":")
        try:
            if colon:
                # One in the working folder as well, where gymnasium looks only if Python was started so.
                own_module(package)
            return in_numbers(gymnasium.make(self.config.id, **self.config.arguments, **drawing))
        except (Exception, SystemExit) as error:
            # Its package and its constructor are somebody's code, which may fail with anything, or want to end the process.
            raise ConfigError(f"environment.id is {self.config.id!r}: {_one_line(error)}") from None

    def register(self) -> None:
        """Make a package tell gymnasium what it has. Default: nothing to do."""

    def frame(self, world: World) -> np.ndarray:
        """See `Environment`; the world must have been made with ``render_mode="rgb_array"``."""
        from anabranch.rl.replayed import ReplayedWorld

        picture = world.drawn(0) if isinstance(world, ReplayedWorld) else None
        if not isinstance(picture, np.ndarray) or picture.ndim != 3:
            raise ConfigError(f"{self.config.id} draws no pictures (render_mode 'rgb_array')")
        return picture


def episode_seed(seed: int, environment: int, episode: int) -> int:
    """What episode number ``episode`` of an environment begins from: below 2**31, and no two are related."""
    return int(np.random.SeedSequence([seed, environment, episode]).generate_state(1, np.uint32)[0] >> 1)


def layout_of(observation_space: Any, action_space: Any) -> Layout:
    """What an agent needs to be for these spaces of gymnasium, of one environment.

    Observations are boxes, flattened, as `in_numbers` makes them of others, or a dict of them: ``policy``, ``critic``, ``picture``. A
    picture is a box of three axes, channels first or last, whichever are fewer; one that stands alone is one if its numbers are uint8.
    Raises ConfigError for any others.
    """
    import gymnasium

    spaces = gymnasium.spaces
    if isinstance(observation_space, spaces.Dict):
        parts = dict(observation_space.spaces)
        if not parts or not set(parts) <= set(_PARTS) or set(parts) == {CRITIC}:
            raise ConfigError(
                f"observations are a dict of {', '.join(parts)}; use boxes called {POLICY!r} and {CRITIC!r}, or {PICTURE!r}, or one box"
            )
    else:
        parts = {PICTURE if _is_picture(observation_space) else POLICY: observation_space}
    sizes = {name: _size(space) for name, space in parts.items()}
    picture, brightest = None, 1.0
    if PICTURE in parts:
        shape, dtype = parts[PICTURE].shape or (), parts[PICTURE].dtype
        if len(shape) != 3:
            raise ConfigError(f"a picture is {list(shape)}; it must have three axes: channels, height and width")
        picture = (shape[2], shape[0], shape[1]) if _is_channels_last(shape) else shape
        brightest = _BRIGHTEST if np.issubdtype(dtype, np.integer) else 1.0
    observed, private = sizes.get(POLICY, 0) + sizes.get(PICTURE, 0), sizes.get(CRITIC, 0)
    actions = _actions_of(action_space)
    return Layout(observed, private, actions, picture, brightest)


def _actions_of(action_space: Any) -> Actions:
    import gymnasium

    spaces = gymnasium.spaces
    if isinstance(action_space, spaces.Discrete):
        if int(action_space.start) != 0:
            raise ConfigError(f"actions begin at {action_space.start}; they must begin at 0")
        return Actions(int(action_space.n))
    if isinstance(action_space, spaces.MultiDiscrete | spaces.MultiBinary) and len(action_space.shape) == 1:
        start = np.asarray(getattr(action_space, "start", 0))
        if start.any():
            raise ConfigError(f"actions begin at {start.tolist()}; they must begin at 0")
        of_each = getattr(action_space, "nvec", np.full(action_space.shape, 2))
        return Actions(several=tuple(int(choices) for choices in of_each))
    if isinstance(action_space, spaces.Box) and len(action_space.shape) == 1:
        low, high = (tuple(float(bound) for bound in side) for side in (action_space.low, action_space.high))
        return Actions(0, low, high)
    raise ConfigError(f"actions are {action_space}; use a discrete space, several of them, or a box with one axis")


def in_numbers(env: Any) -> Any:
    """An environment of gymnasium whose observations are a box, or a dict of `POLICY`, `PICTURE` and `CRITIC`.

    Choices become numbers of which one is 1; tuples, and dicts with other names, one row of all that they hold. Raises ConfigError where
    they hold what is no number.
    """
    import gymnasium

    spaces, seen = gymnasium.spaces, env.observation_space
    if isinstance(seen, spaces.Box) or (isinstance(seen, spaces.Dict) and set(seen.spaces) <= set(_PARTS)):
        return env
    for space in _leaves(seen):
        if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise ConfigError(
                f"observations have a {type(space).__name__}, which is no row of numbers; wrap the environment"
            )
    return gymnasium.wrappers.FlattenObservation(env)


def _leaves(space: Any) -> list[Any]:
    """What a space is made of."""
    inner = getattr(space, "spaces", None)
    if inner is None:
        return [space]
    return [leaf for each in (inner.values() if isinstance(inner, Mapping) else inner) for leaf in _leaves(each)]


def _size(space: Any) -> int:
    import gymnasium

    if not isinstance(space, gymnasium.spaces.Box):
        raise ConfigError(f"observations are {space}; use a box, or a dict of two boxes")
    return int(np.prod(space.shape))


def _is_picture(space: Any) -> bool:
    return len(space.shape or ()) == 3 and space.dtype == np.uint8


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Of a picture: whether its last axis is the shortest."""
    return shape[2] < min(shape[:2])


def flat(observations: Any) -> np.ndarray:
    """Observations of N environments as float32 ``[N, D]``: numbers of the policy, its picture (channels first), numbers of the critic."""
    if isinstance(observations, Mapping):
        parts = [(name, np.asarray(observations[name])) for name in _PARTS if name in observations]
        flats = [_pictured(array) if name == PICTURE else array for name, array in parts]
        return np.concatenate([array.reshape(len(array), -1) for array in flats], axis=1, dtype=np.float32)
    array = np.asarray(observations)
    array = _pictured(array) if array.ndim == 4 and array.dtype == np.uint8 else array
    return array.reshape(len(array), -1).astype(np.float32, copy=False)


def _pictured(picture_NXXX: np.ndarray) -> np.ndarray:
    """With channels first."""
    return np.moveaxis(picture_NXXX, -1, 1) if _is_channels_last(picture_NXXX.shape[1:]) else picture_NXXX


def _one_line(error: BaseException) -> str:
    told = " ".join(str(error).split())
    # The code alone would tell nothing.
    return f"SystemExit: {told}" if isinstance(error, SystemExit) else told or type(error).__name__
