"""`Actor`: acts in the environments of one process with the policy as it is, and makes samples of what happened in all processes.

What is tried out is a function of the run's seed and the number of the rollout. Processes act in a part of the environments each and
then exchange what happened, so that all of them have the same samples.
"""
# Shapes: T steps of a rollout, N environments of all processes, n of this one, S = T N samples, D numbers of an observation, A of an
# action, P parameters of its distribution

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.errors import DataError
from anabranch.rl.averages import Averages
from anabranch.rl.environment import Environment, World, flat
from anabranch.rl.network import ActorCritic
from anabranch.rl.preemption import Stragglers
from anabranch.rl.returns import Ends, advantages

__all__ = ["Actor", "Collecting", "Played", "Samples", "generator_of", "joined_states"]

# Stands beside a rollout's number where a generator is seeded.
_ACTING = 1
# Of so many steps noise is drawn at once.
_DRAWN_STEPS = 32
# The size of a reward, as learned from: sums of some thousands of these are still numbers in float32 when squared, as a critic's error is.
_MOST_REWARD = 1e15


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
        reward_clip: rewards are divided by the running deviation of discounted returns, and cut off at this; None for as they are.
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
    reward_clip: float | None = None

    @property
    def num_samples(self) -> int:
        """S."""
        return self.num_envs * self.steps


@dataclass(frozen=True)
class Played:
    """What all processes did in a rollout.

    Attributes:
        samples: all of it, in the order [step, environment]; advantages as they are.
        ended: return, by the environment's own rewards, and length of every episode that ended.
    """

    samples: Samples
    ended: list[tuple[float, int]]


class Actor:
    """See the module.

    Args:
        environment: where to act.
        collecting: how.
        seed: of the run.
        rank, world_size: of so many processes this is number ``rank``; they share the environments evenly.
        device: of the model.
        stragglers: stops this process where most others have acted enough; None to let it make all steps.

    Attributes:
        state: where the environments were after the last whole rollout, and return and length of their episodes so far; of all processes.
            Nothing before the first. Whoever sets it calls `close`, and the next rollout begins from there.
        returns: averages of discounted returns, of all processes; None where rewards are not normalised.
    """

    def __init__(
        self,
        environment: Environment,
        collecting: Collecting,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        stragglers: Stragglers | None = None,
    ) -> None:
        self.environment, self.collecting, self.seed = environment, collecting, seed
        self.world_size, self.device, self.stragglers = world_size, device or torch.device("cpu"), stragglers
        self.state: dict[str, np.ndarray] = {}
        self._num_own = collecting.num_envs // world_size
        self._first = rank * self._num_own
        self._world: World | None = None
        self._observation_nD = np.zeros((0, 0), np.float32)
        self._return_n, self._length_n = np.zeros(self._num_own), np.zeros(self._num_own, np.int64)
        self._discounted_n = np.zeros(self._num_own)
        self.returns = None if collecting.reward_clip is None else Averages(1, collecting.reward_clip)

    @torch.no_grad()
    def play(self, number: int, model: nn.Module) -> Played:
        """Act for the T steps of rollout ``number``.

        Raises DataError if an environment gives a reward or an observation that is not finite; the next call begins where this one did.
        """
        network = _network(model)
        try:
            world = self.open()
            return self._put_together(network, self.act(number, network, world), world, number)
        except BaseException:
            # The environments have moved on from what is kept; whoever goes on begins from there.
            self.close()
            raise

    def close(self) -> None:
        """Free the environments."""
        world, self._world = self._world, None
        if world is not None:
            world.close()

    def open(self) -> World:
        """The environments, where they were after the last whole rollout."""
        if self._world is not None:
            return self._world
        # Kept at once: whatever fails from here on, it is closed.
        world = self._world = self.environment.make(self._num_own, seed=self.seed, first=self._first)
        own = slice(self._first, self._first + self._num_own)
        state = {name: array[own] for name, array in self.state.items()}
        if state:
            self._return_n, self._length_n = state.pop("own_return").copy(), state.pop("own_length").copy()
            # A checkpoint of before returns were looked at has none.
            self._discounted_n = state.pop("own_discounted", np.zeros(self._num_own)).copy()
            seen = world.load_state_dict(state)
        else:
            self._return_n[:], self._length_n[:], self._discounted_n[:] = 0.0, 0, 0.0
            seen, _ = world.reset()
        self._observation_nD = flat(seen)
        self._check("observation", self._observation_nD)
        return world

    def act(self, number: int, network: ActorCritic, world: World) -> Acted:
        """The steps of this process."""
        kind, own = network.kind, slice(self._first, self._first + self._num_own)
        generator = generator_of(self.seed, _ACTING, number)
        acted = Acted.empty(
            self.collecting.steps, self._num_own, self._observation_nD.shape[1], kind.actions.num_numbers
        )
        for step in range(self.collecting.steps):
            if step % _DRAWN_STEPS == 0:
                # For the environments of all processes, so that what is done does not hang on how many there are.
                drawn = kind.noise(generator, _DRAWN_STEPS * self.collecting.num_envs)
                noise = drawn.unflatten(0, (_DRAWN_STEPS, self.collecting.num_envs))[:, own]
            seen_nD = torch.from_numpy(self._observation_nD)
            parameter_nP = network(seen_nD.to(self.device), "policy").cpu()
            action_nA = kind.distribution(parameter_nP).sample(noise[step % _DRAWN_STEPS])
            acted.observation_TnD[step], acted.action_TnA[step] = seen_nD, action_nA
            observations, reward_n, terminated_n, truncated_n, infos = world.step(
                kind.to_environment(action_nA).numpy()
            )
            self._check_reward(np.asarray(reward_n))
            acted.reward_Tn[step] = torch.as_tensor(np.asarray(reward_n, np.float32))
            acted.terminated_Tn[step], acted.truncated_Tn[step] = (
                torch.as_tensor(np.asarray(each, bool)) for each in (terminated_n, truncated_n)
            )
            self._discounted_n = self.collecting.gamma * self._discounted_n + np.asarray(reward_n, np.float64)
            acted.discounted_Tn[step] = torch.from_numpy(self._discounted_n)
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

    def _note_ends(self, step: int, acted: Acted, reward_n: np.ndarray, infos: Mapping[str, Any]) -> None:
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
        self._return_n[done_n] = self._discounted_n[done_n] = 0.0
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

    def _check_reward(self, reward_n: np.ndarray) -> None:
        """Raise DataError for what is no number, or one that nothing can be learned from."""
        self._check("reward", reward_n[:, None])
        is_huge_n = np.abs(reward_n) * self.collecting.reward_scale > _MOST_REWARD
        if is_huge_n.any():
            place = int(is_huge_n.argmax())
            raise DataError(
                f"environment {self._first + place} gave the reward {reward_n[place]:g}, and {_MOST_REWARD:g} is the most that can be "
                "learned from (times task.reward_scale); mend it, and resume"
            )

    def _put_together(self, network: ActorCritic, acted: Acted, world: World, number: int) -> Played:
        """Exchange what processes did, and work out advantages: all processes do the same from here on."""
        own = {"return": self._return_n, "length": self._length_n, "discounted": self._discounted_n}
        state = {**world.state_dict(), **{f"own_{name}": array.copy() for name, array in own.items()}}
        parts = [acted]
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, (acted, state))
            parts, state = [part for part, _ in gathered], joined_states([each for _, each in gathered])
        if len({part.num_steps for part in parts}) == 1:
            # In the order of one process, so that as many processes as there may be learn the same.
            parts = [Acted.joined(parts)]
        if self.returns is not None:
            self.returns.take_in(torch.cat([part.discounted_Tn.flatten() for part in parts])[:, None], number)
        made = [self.samples(network, part) for part in parts]
        samples = Samples(*(torch.cat(tensors) for tensors in zip(*made, strict=True))) if len(made) > 1 else made[0]
        ended = [pair for part in parts for pair in part.ended]
        self.state = state
        return Played(samples, ended)

    def samples(self, network: ActorCritic, acted: Acted) -> Samples:
        """With log-probabilities, values and advantages, by the weights that acted."""
        observation_SD = acted.observation_TnD.flatten(0, 1)
        parameter_SP, value_S = self.judged(network, observation_SD)
        shape = acted.reward_Tn.shape
        value_TN, final_value_TN = value_S.view(shape), torch.zeros(shape)
        cut_TN = acted.truncated_Tn & ~acted.terminated_Tn
        if bool(cut_TN.any()):
            final_value_TN[cut_TN] = self.judged(network, acted.final_TnD[cut_TN])[1]
        reward_TN = acted.reward_Tn * self.collecting.reward_scale
        advantage_TN = advantages(
            reward_TN if self.returns is None else self.returns.scaled(reward_TN),
            value_TN,
            self.judged(network, acted.last_nD)[1],
            Ends(acted.terminated_Tn, acted.truncated_Tn, final_value_TN),
            gamma=self.collecting.gamma,
            gae_lambda=self.collecting.gae_lambda,
            bootstrap_truncated=self.collecting.bootstrap_truncated,
        )
        action_SA, advantage_S = acted.action_TnA.flatten(0, 1), advantage_TN.flatten()
        log_prob_S = network.kind.distribution(parameter_SP).log_prob(action_SA)
        return Samples(observation_SD, action_SA, parameter_SP, log_prob_S, value_S, advantage_S, advantage_S + value_S)

    def judged(self, network: ActorCritic, observation_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(parameters, values) on the CPU."""
        parameter_BP, value_B = network(observation_BD.to(self.device))
        return parameter_BP.cpu(), value_B.cpu()


@dataclass
class Acted:
    """What happened in T steps of n environments; ``ended`` has return and length of every episode that ended.

    ``discounted_Tn`` is the discounted sum of an episode's rewards up to a step.
    """

    observation_TnD: Tensor
    action_TnA: Tensor
    reward_Tn: Tensor
    discounted_Tn: Tensor
    terminated_Tn: Tensor
    truncated_Tn: Tensor
    final_TnD: Tensor
    last_nD: Tensor
    ended: list[tuple[float, int]]

    @classmethod
    def empty(cls, steps: int, num: int, observed: int, numbers: int) -> Acted:
        """Nothing yet: T = ``steps``, n = ``num``, D = ``observed``, A = ``numbers``."""
        return cls(
            torch.zeros(steps, num, observed),
            torch.zeros(steps, num, numbers),
            torch.zeros(steps, num),
            torch.zeros(steps, num, dtype=torch.float64),
            torch.zeros(steps, num, dtype=torch.bool),
            torch.zeros(steps, num, dtype=torch.bool),
            torch.zeros(steps, num, observed),
            torch.zeros(num, observed),
            [],
        )

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.reward_Tn)

    def first(self, steps: int) -> Acted:
        """The first steps alone."""
        kept = {name: each for name, each in vars(self).items() if name in ("last_nD", "ended")}
        return Acted(**{name: each[:steps] for name, each in vars(self).items() if name not in kept}, **kept)

    @classmethod
    def joined(cls, parts: list[Acted]) -> Acted:
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


def _network(model: nn.Module | None) -> ActorCritic:
    assert isinstance(model, ActorCritic), model
    return model


def generator_of(*numbers: int) -> torch.Generator:
    """A generator of torch that is a function of these numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))
