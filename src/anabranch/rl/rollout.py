"""`Rollouts`: the stream of mini-batches that PPO learns from. It acts in the environments with the policy as it is, and hands out what
happened in mini-batches, several times over; then it acts again.

What is random in it is a function of the run's seed and the number of the rollout: what is tried out, and the order of mini-batches. So
it goes on after any of its mini-batches, to the bit, from the rollout and the place in the environments that a checkpoint keeps.

Processes act in a part of the environments each and then exchange what happened. From there on all have the same rollout, and the
mini-batches of one process are those of several put together.
"""
# Shapes: T steps of a rollout, N environments of all processes, n of this one, S = T N samples, M of a mini-batch, B of a micro-batch,
# D numbers of an observation, A of an action, P parameters of its distribution

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.errors import CapacityError, CheckpointError, ConfigError, DataError
from anabranch.machine import room_bytes
from anabranch.rl.environment import Environment, World, flat
from anabranch.rl.network import ActorCritic
from anabranch.rl.preemption import Stragglers
from anabranch.rl.returns import Ends, advantages

__all__ = ["Collecting", "Rollout", "Rollouts", "Samples", "joined_states", "normalised"]

FILE = "rollout.safetensors"
_WORLD = "world/"
# Stand beside a rollout's number where generators are seeded.
_ACTING, _ORDER = 1, 2


class Samples(NamedTuple):
    """A mini-batch, or a part of one.

    Attributes:
        observation_BD: what was seen.
        action_BA: what was done, as the policy has it.
        parameter_BP: of the distribution that it was drawn from.
        log_prob_B: of the action under that.
        value_B: what the critic held the observation for.
        advantage_B: of the action; normalised as the config says.
        return_B: what the critic should have held the observation for.
    """

    observation_BD: Tensor
    action_BA: Tensor
    parameter_BP: Tensor
    log_prob_B: Tensor
    value_B: Tensor
    advantage_B: Tensor
    return_B: Tensor


@dataclass(frozen=True)
class Collecting:
    """How samples are made and handed out.

    Attributes:
        num_envs: N.
        steps: T.
        epochs: how often a rollout is gone through.
        gamma, gae_lambda, bootstrap_truncated: see `advantages`.
        reward_scale: rewards are multiplied by it before anything is made of them.
        normalize: advantages get mean 0 and deviation 1 in each mini-batch, in each rollout (``batch``), or not at all.
    """

    num_envs: int
    steps: int
    epochs: int
    gamma: float
    gae_lambda: float
    bootstrap_truncated: bool
    reward_scale: float
    normalize: Literal["minibatch", "batch", "none"]

    @property
    def num_samples(self) -> int:
        """S."""
        return self.num_envs * self.steps


@dataclass
class Rollout:
    """What happened in T steps.

    Attributes:
        number: of rollouts before it.
        samples: all of it, in the order [step, environment]; advantages as they are.
        num_ended: how many episodes ended in it.
        sum_return: of these, by the environment's own rewards.
        sum_length: of these, in steps.
    """

    number: int
    samples: Samples
    num_ended: int
    sum_return: float
    sum_length: float

    @property
    def mean_return(self) -> float:
        """Of the episodes that ended; nan where none did."""
        return self.sum_return / self.num_ended if self.num_ended else math.nan

    @property
    def mean_length(self) -> float:
        """Of the episodes that ended, in steps; nan where none did."""
        return self.sum_length / self.num_ended if self.num_ended else math.nan

    @cached_property
    def explained_variance(self) -> float:
        """1 - Var(return - value) / Var(return): how much of the returns the critic foretold; nan where all are the same."""
        variance = float(self.samples.return_B.var(correction=0))
        rest = float((self.samples.return_B - self.samples.value_B).var(correction=0))
        return 1 - rest / variance if variance > 0 else math.nan


def normalised(advantage_B: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1. Raises ConfigError for a single one, which has no deviation."""
    if len(advantage_B) < 2:
        raise ConfigError("a mini-batch of 1 has no deviation to normalise advantages by; make train.batch_size larger")
    return (advantage_B - advantage_B.mean()) / (advantage_B.std() + 1e-8)


class Rollouts:
    """See the module. A `Stream` of the trainer's, whose batches are `Samples`.

    Args:
        environment: where to act.
        collecting: how.
        batch_size: M, of all processes and micro-batches together.
        seed: of the run.
        rank, world_size: of so many processes this is number ``rank``.
        device: of the model.
        stragglers: stops this process where most others have acted enough; None to let it make all steps.

    Attributes:
        model: whose policy acts; it must be set before the first batch is asked for.
        rollout: the one that mini-batches come from; None before the first.
        position: samples that were handed out so far, in all processes.

    Raises ConfigError if mini-batches do not divide a rollout, or processes the environments, CapacityError if there is no room for one.
    """

    def __init__(
        self,
        environment: Environment,
        collecting: Collecting,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        stragglers: Stragglers | None = None,
    ) -> None:
        if collecting.num_samples % batch_size:
            raise ConfigError(
                f"train.batch_size is {batch_size}, which does not divide the {collecting.num_samples} samples of a rollout "
                f"({collecting.num_envs} environments x {collecting.steps} steps)"
            )
        if collecting.normalize == "minibatch" and batch_size < 2:
            raise ConfigError(
                "train.batch_size is 1, and advantages of one sample cannot be normalised; use at least 2, or normalize_advantage='batch'"
            )
        num_own, rest = divmod(collecting.num_envs, world_size)
        if rest:
            raise ConfigError(
                f"num_envs is {collecting.num_envs}, which {world_size} processes cannot share evenly; use a multiple of {world_size}"
            )
        _check_room(environment, collecting)
        self.environment, self.collecting, self.batch_size = environment, collecting, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device, self.stragglers = device or torch.device("cpu"), stragglers
        self.model: nn.Module | None = None
        self.position = 0
        self.rollout: Rollout | None = None
        self._num_own, self._first = num_own, rank * num_own
        self._world: World | None = None
        # Where the world was after the rollout, for all environments; nothing before the first.
        self._state: dict[str, np.ndarray] = {}
        self._observation_nD = np.zeros((0, 0), np.float32)
        self._return_n, self._length_n = np.zeros(num_own), np.zeros(num_own, np.int64)
        self._order: tuple[tuple[int, int], Tensor] | None = None

    # Handing out

    @property
    def _per_rollout(self) -> int:
        return self.collecting.num_samples * self.collecting.epochs

    def next_batch(self, batch_size: int) -> Samples:
        """The next part of a mini-batch for this process; acts first where the last rollout is used up.

        Raises DataError if an environment gives a reward or an observation that is not finite.
        """
        number, place = divmod(self.position, self._per_rollout)
        if self.rollout is None or self.rollout.number != number:
            self._collect(number)
        assert self.rollout is not None
        epoch, within = divmod(place, self.collecting.num_samples)
        batch, offset = divmod(within, self.batch_size)
        samples = self.rollout.samples
        # A rollout whose stragglers were stopped has fewer samples: as many mini-batches, in as many parts, each smaller.
        held = len(samples.value_B)
        size = max(batch_size * held // self.collecting.num_samples, 1)
        whole = size * (self.batch_size // batch_size)
        index_M = self._permutation(number, epoch, held)[batch * whole : (batch + 1) * whole]
        begin = (offset // batch_size + self.rank) * size
        row_B = index_M[begin : begin + size]
        picked = Samples(*(tensor[row_B] for tensor in samples))
        if self.collecting.normalize != "none":
            # Of the whole mini-batch, whichever part of it this process has.
            rows = index_M if self.collecting.normalize == "minibatch" else slice(None)
            of_whole = normalised(samples.advantage_B[rows])
            picked = picked._replace(
                advantage_B=of_whole[begin : begin + size] if isinstance(rows, Tensor) else of_whole[row_B]
            )
        self.position += batch_size * self.world_size
        return picked

    def _permutation(self, number: int, epoch: int, samples: int) -> Tensor:
        key = (number, epoch)
        if self._order is None or self._order[0] != key:
            generator = _generator(self.seed, _ORDER, *key)
            self._order = key, torch.randperm(samples, generator=generator)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """How far it is; the rollout itself and the place in the environments are in a file, see `save`."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` says. Raises DataError if the rollout that is held is another one than that needs."""
        position = state["position"]
        needed, place = divmod(position, self._per_rollout)
        held = -1 if self.rollout is None else self.rollout.number
        # Between two rollouts the next may have been made already, by the same weights.
        if held not in ((needed,) if place else (needed - 1, needed)):
            raise DataError(
                f"cannot go on after {position} samples: that needs rollout {needed}, and number {held} is held; the checkpoint is damaged"
            )
        self.position = position

    def save(self, folder: Path) -> None:
        """Write the rollout and the place in the environments into a checkpoint's folder; nothing before the first."""
        if self.rollout is None:
            return
        rollout = self.rollout
        told = [float(rollout.number), float(rollout.num_ended), rollout.sum_return, rollout.sum_length]
        tensors = {name: tensor.contiguous() for name, tensor in rollout.samples._asdict().items()}
        tensors |= {_WORLD + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self._state.items()}
        save_file(tensors | {"rollout": torch.tensor(told, dtype=torch.float64)}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote. Raises CheckpointError if it cannot be read or does not fit."""
        path = folder / FILE
        if not path.exists():
            return
        try:
            tensors = load_file(path)
            number, num_ended, sum_return, sum_length = tensors.pop("rollout").tolist()
            samples = Samples(*(tensors.pop(name) for name in Samples._fields))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        fewest = 1 if self.stragglers is not None else self.collecting.num_samples
        if not all(fewest <= len(tensor) == len(samples.value_B) <= self.collecting.num_samples for tensor in samples):
            raise CheckpointError(
                f"{path} has {len(samples.value_B)} samples, and a rollout {self.collecting.num_samples}"
            )
        self.rollout = Rollout(int(number), samples, int(num_ended), sum_return, sum_length)
        self._state = {name.removeprefix(_WORLD): tensor.numpy() for name, tensor in tensors.items()}
        self._drop_world()

    def close(self) -> None:
        """Free the environments."""
        self._drop_world()

    # Acting

    def _drop_world(self) -> None:
        if self._world is not None:
            self._world.close()
        self._world = None

    def _open_world(self) -> World:
        """The environments, where they were after the last whole rollout."""
        if self._world is not None:
            return self._world
        # Kept at once: whatever fails from here on, it is closed.
        world = self._world = self.environment.make(self._num_own, seed=self.seed, first=self._first)
        own = slice(self._first, self._first + self._num_own)
        state = {name: array[own] for name, array in self._state.items()}
        if state:
            self._return_n, self._length_n = state.pop("own_return").copy(), state.pop("own_length").copy()
            seen = world.load_state_dict(state)
        else:
            self._return_n[:], self._length_n[:] = 0.0, 0
            seen, _ = world.reset()
        self._observation_nD = flat(seen)
        self._check("observation", self._observation_nD)
        return world

    @torch.no_grad()
    def _collect(self, number: int) -> None:
        """Act for T steps, and make `rollout` of what happened."""
        assert self.model is not None, "the policy must be given first"
        try:
            world = self._open_world()
            self._finish(number, self._act(number, world), world)
        except BaseException:
            # The environments have moved on from what is kept; whoever goes on begins from there.
            self._drop_world()
            raise

    def _act(self, number: int, world: World) -> _Acted:
        network = _network(self.model)
        kind, own = network.kind, slice(self._first, self._first + self._num_own)
        generator = _generator(self.seed, _ACTING, number)
        acted = _Acted.empty(
            self.collecting.steps, self._num_own, self._observation_nD.shape[1], kind.actions.num_numbers
        )
        for step in range(self.collecting.steps):
            seen_nD = torch.from_numpy(self._observation_nD)
            parameter_nP = self.model(seen_nD.to(self.device), "policy").cpu()  # type: ignore[misc]
            noise = kind.noise(generator, self.collecting.num_envs)[own]
            action_nA = kind.distribution(parameter_nP).sample(noise)
            acted.observation_TnD[step], acted.action_TnA[step] = seen_nD, action_nA
            observations, reward_n, terminated_n, truncated_n, infos = world.step(
                kind.to_environment(action_nA).numpy()
            )
            self._check("reward", np.asarray(reward_n)[:, None])
            acted.reward_Tn[step] = torch.as_tensor(np.asarray(reward_n, np.float32))
            acted.terminated_Tn[step], acted.truncated_Tn[step] = (
                torch.as_tensor(np.asarray(each, bool)) for each in (terminated_n, truncated_n)
            )
            self._note_ends(step, acted, np.asarray(reward_n, np.float64), infos)
            self._observation_nD = flat(observations)
            self._check("observation", self._observation_nD)
            if self.stragglers is not None and self.stragglers.is_over(number, step + 1):
                acted = acted.first(step + 1)
                break
        else:
            if self.stragglers is not None:
                self.stragglers.finished(number)
        acted.last_nD[:] = torch.from_numpy(self._observation_nD)
        return acted

    def _note_ends(self, step: int, acted: _Acted, reward_n: np.ndarray, infos: Mapping[str, Any]) -> None:
        self._return_n += reward_n
        self._length_n += 1
        done_n = (acted.terminated_Tn[step] | acted.truncated_Tn[step]).numpy()
        if not done_n.any():
            return
        final = infos["final_obs"]
        for place in np.flatnonzero(done_n):
            acted.ended.append((float(self._return_n[place]), int(self._length_n[place])))
            if acted.truncated_Tn[step, place]:
                last_1D = flat(_row(final, int(place)))
                self._check("observation", last_1D, first=self._first + int(place))
                acted.final_TnD[step, place] = torch.from_numpy(last_1D[0])
        self._return_n[done_n] = 0.0
        self._length_n[done_n] = 0

    def _check(self, what: str, array_nX: np.ndarray, *, first: int | None = None) -> None:
        """Raise DataError for what is no number."""
        finite_n = np.isfinite(array_nX).all(axis=1)
        if not finite_n.all():
            place = int(np.flatnonzero(~finite_n)[0])
            bad = array_nX[place][~np.isfinite(array_nX[place])][0]
            raise DataError(
                f"environment {(self._first if first is None else first) + place} gave the {what} {bad}; mend it, and resume"
            )

    def _finish(self, number: int, acted: _Acted, world: World) -> None:
        """Exchange what processes did, and work out advantages: all processes do the same from here on."""
        state = {**world.state_dict(), "own_return": self._return_n.copy(), "own_length": self._length_n.copy()}
        parts = [acted]
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, (acted, state))
            parts, state = [part for part, _ in gathered], joined_states([each for _, each in gathered])
        if len({part.num_steps for part in parts}) == 1:
            # In the order of one process, so that as many processes as there may be learn the same.
            parts = [_Acted.joined(parts)]
        made = [self._samples(part) for part in parts]
        samples = Samples(*(torch.cat(tensors) for tensors in zip(*made, strict=True))) if len(made) > 1 else made[0]
        ended = [pair for part in parts for pair in part.ended]
        sum_return, sum_length = sum(each for each, _ in ended), sum(each for _, each in ended)
        self.rollout = Rollout(number, samples, len(ended), float(sum_return), float(sum_length))
        self._state = state

    def _samples(self, acted: _Acted) -> Samples:
        kind = _network(self.model).kind
        observation_SD = acted.observation_TnD.flatten(0, 1)
        parameter_SP, value_S = self._judged(observation_SD)
        shape = acted.reward_Tn.shape
        value_TN, final_value_TN = value_S.view(shape), torch.zeros(shape)
        cut_TN = acted.truncated_Tn & ~acted.terminated_Tn
        if bool(cut_TN.any()):
            final_value_TN[cut_TN] = self._judged(acted.final_TnD[cut_TN])[1]
        advantage_TN = advantages(
            acted.reward_Tn * self.collecting.reward_scale,
            value_TN,
            self._judged(acted.last_nD)[1],
            Ends(acted.terminated_Tn, acted.truncated_Tn, final_value_TN),
            gamma=self.collecting.gamma,
            gae_lambda=self.collecting.gae_lambda,
            bootstrap_truncated=self.collecting.bootstrap_truncated,
        )
        action_SA, advantage_S = acted.action_TnA.flatten(0, 1), advantage_TN.flatten()
        log_prob_S = kind.distribution(parameter_SP).log_prob(action_SA)
        return Samples(observation_SD, action_SA, parameter_SP, log_prob_S, value_S, advantage_S, advantage_S + value_S)

    def _judged(self, observation_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(parameters, values) on the CPU."""
        parameter_BP, value_B = self.model(observation_BD.to(self.device))  # type: ignore[misc]
        return parameter_BP.cpu(), value_B.cpu()


@dataclass
class _Acted:
    """What happened in T steps of n environments; ``ended`` has return and length of every episode that ended."""

    observation_TnD: Tensor
    action_TnA: Tensor
    reward_Tn: Tensor
    terminated_Tn: Tensor
    truncated_Tn: Tensor
    final_TnD: Tensor
    last_nD: Tensor
    ended: list[tuple[float, int]]

    @classmethod
    def empty(cls, steps: int, num: int, observed: int, numbers: int) -> _Acted:
        return cls(
            torch.zeros(steps, num, observed),
            torch.zeros(steps, num, numbers),
            torch.zeros(steps, num),
            torch.zeros(steps, num, dtype=torch.bool),
            torch.zeros(steps, num, dtype=torch.bool),
            torch.zeros(steps, num, observed),
            torch.zeros(num, observed),
            [],
        )

    @property
    def num_steps(self) -> int:
        return len(self.reward_Tn)

    def first(self, steps: int) -> _Acted:
        """The first steps alone."""
        kept = {name: each for name, each in vars(self).items() if name in ("last_nD", "ended")}
        return _Acted(**{name: each[:steps] for name, each in vars(self).items() if name not in kept}, **kept)

    @classmethod
    def joined(cls, parts: list[_Acted]) -> _Acted:
        """Those of all processes, in the order of environments."""
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts], dim=0 if name == "last_nD" else 1)
            for name in vars(parts[0])
            if name != "ended"
        }
        return cls(**tensors, ended=[pair for part in parts for pair in part.ended])


def joined_states(states: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """States of worlds as one; where second axes differ, the shorter are filled up with 0."""
    made = {}
    for name in states[0]:
        arrays = [state[name] for state in states]
        if arrays[0].ndim > 1:
            longest = max(array.shape[1] for array in arrays)
            rest = [(0, 0)] * (arrays[0].ndim - 2)
            arrays = [np.pad(array, [(0, 0), (0, longest - array.shape[1]), *rest]) for array in arrays]
        made[name] = np.concatenate(arrays)
    return made


def _row(final: Any, place: int) -> Any:
    """The last observation of one environment, as a batch of one."""
    if isinstance(final, Mapping):
        return {name: np.asarray(array[place])[None] for name, array in final.items()}
    one = final[place]
    if isinstance(one, Mapping):
        return {name: np.asarray(array)[None] for name, array in one.items()}
    return np.asarray(one)[None]


def _check_room(environment: Environment, collecting: Collecting) -> None:
    """Raise CapacityError where a rollout takes more memory than there is. Observations are held twice while it is made."""
    layout = environment.layout
    numbers = 2 * (layout.num_observed + layout.num_private) + 3 * max(
        layout.actions.num_numbers, layout.actions.choices
    )
    needed, room = 4 * (numbers + 8) * collecting.num_samples, room_bytes()
    if needed > room:
        raise CapacityError(
            f"a rollout of {collecting.num_envs:,} environments x {collecting.steps:,} steps takes {needed / 1e9:.1f} GB, and there are "
            f"{room / 1e9:.1f}; make num_envs or rollout_steps smaller"
        )


def _network(model: nn.Module | None) -> ActorCritic:
    assert isinstance(model, ActorCritic), model
    return model


def _generator(*numbers: int) -> torch.Generator:
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))
