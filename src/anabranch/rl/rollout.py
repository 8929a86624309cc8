"""`Rollouts`: the stream of mini-batches that PPO learns from. It lets an `Actor` act with the policy as it is, and hands out what happened
in mini-batches, several times over; then it lets it act again.

What is random in it is a function of the run's seed and the number of the rollout: what is tried out, and the order of mini-batches. So
it goes on after any of its mini-batches, to the bit, from the rollout and the place in the environments that a checkpoint keeps.

All processes have the same rollout, and the mini-batches of one process are those of several put together.
"""
# Shapes: M samples of a mini-batch, B of a micro-batch

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.errors import CapacityError, CheckpointError, ConfigError, DataError
from anabranch.machine import room_bytes
from anabranch.rl.acting import Actor, Collecting, Samples, generator_of
from anabranch.rl.environment import Environment
from anabranch.rl.network import ActorCritic
from anabranch.rl.preemption import Stragglers

__all__ = ["Rollout", "Rollouts", "normalised"]

FILE = "rollout.safetensors"
_WORLD, _RETURNS = "world/", "returns/"
# Stands beside a rollout's number where a generator is seeded.
_ORDER = 2


@dataclass
class Rollout:
    """What happened.

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
        actor: acts.
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
        if collecting.num_envs % world_size:
            raise ConfigError(
                f"num_envs is {collecting.num_envs}, which {world_size} processes cannot share evenly; use a multiple of {world_size}"
            )
        _check_room(environment, collecting)
        self.actor = Actor(
            environment,
            collecting,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
            stragglers=stragglers,
        )
        self.collecting, self.batch_size = collecting, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.model: nn.Module | None = None
        self.position = 0
        self.rollout: Rollout | None = None
        self._order: tuple[tuple[int, int], Tensor] | None = None

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

    def _collect(self, number: int) -> None:
        model = self.model
        assert isinstance(model, ActorCritic), "the policy must be given first"
        # Averages of observations move between two rollouts, so that a policy is the one that acted until it learns.
        if self.rollout is not None:
            model.take_in(self.rollout.samples.observation_BD, self.rollout.number)
        played = self.actor.play(number, model)
        if number == 0:
            # Nothing is known before; what is done then hangs little on what is seen.
            model.take_in(played.samples.observation_BD, number)
        returns, lengths = (sum(values) for values in zip((0.0, 0), *played.ended, strict=True))
        self.rollout = Rollout(number, played.samples, len(played.ended), float(returns), float(lengths))

    @property
    def epochs_done(self) -> float:
        """How often the rollout that is held was gone through; 0 where there is none."""
        if self.rollout is None:
            return 0.0
        return (self.position - self.rollout.number * self._per_rollout) / self.collecting.num_samples

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(policy that acted || policy now), a mean over the rollout in nats: the same in all processes, which share the work."""
        model, rollout = self.model, self.rollout
        assert isinstance(model, ActorCritic)
        assert rollout is not None
        samples = rollout.samples
        own = slice(self.rank, None, self.world_size)
        parameter_BP = model(samples.observation_BD[own].to(self.actor.device), "policy").cpu()
        old, new = (model.kind.distribution(each_BP) for each_BP in (samples.parameter_BP[own], parameter_BP))
        total = old.divergence(new).double().sum().to(self.actor.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return float(total) / len(samples.value_B)

    def _permutation(self, number: int, epoch: int, samples: int) -> Tensor:
        key = (number, epoch)
        if self._order is None or self._order[0] != key:
            generator = generator_of(self.seed, _ORDER, *key)
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
        tensors |= {
            _WORLD + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.actor.state.items()
        }
        if self.actor.returns is not None:
            tensors |= {_RETURNS + name: tensor for name, tensor in self.actor.returns.state_dict().items()}
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
            returns = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_RETURNS)}
            if self.actor.returns is not None:
                self.actor.returns.load_state_dict(
                    {name.removeprefix(_RETURNS): tensor for name, tensor in returns.items()}
                )
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from None
        fewest = 1 if self.actor.stragglers is not None else self.collecting.num_samples
        if not all(fewest <= len(tensor) == len(samples.value_B) <= self.collecting.num_samples for tensor in samples):
            raise CheckpointError(
                f"{path} has {len(samples.value_B)} samples, and a rollout {self.collecting.num_samples}"
            )
        self.rollout = Rollout(int(number), samples, int(num_ended), sum_return, sum_length)
        self.actor.state = {name.removeprefix(_WORLD): tensor.numpy() for name, tensor in tensors.items()}
        self.actor.close()

    def close(self) -> None:
        """Free the environments."""
        self.actor.close()


def _check_room(environment: Environment, collecting: Collecting) -> None:
    """Raise CapacityError where a rollout takes more memory than there is. Observations are held twice while it is made."""
    layout = environment.layout
    numbers = 2 * (layout.num_observed + layout.num_private) + 3 * max(
        layout.actions.num_numbers, layout.actions.num_choices
    )
    needed, room = 4 * (numbers + 8) * collecting.num_samples, room_bytes()
    if needed > room:
        raise CapacityError(
            f"a rollout of {collecting.num_envs:,} environments x {collecting.steps:,} steps takes {needed / 1e9:.1f} GB, and there are "
            f"{room / 1e9:.1f}; make num_envs or rollout_steps smaller"
        )
