"""`TokenRollouts`: the stream of mini-batches that policies of tokens learn from. It plays episodes with the policy as it is, works out
what each token was worth, and hands episodes out in mini-batches, as often as they are to be gone through; then it plays again.

All that is random in it is a function of the run's seed and the number of the rollout: questions, what is drawn, the order of mini-batches.
So it goes on after any of its mini-batches, to the bit, from the rollout that a checkpoint keeps.
"""
# Shapes: Q questions, G episodes of each, B = Q G episodes, L tokens, M of a mini-batch

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.files import atomic_write_json, parse_json
from anabranch.rl.tokens.engine import Drawn, PolicyEngine
from anabranch.rl.tokens.trajectory import Samples, Trajectory, padded
from anabranch.rl.tokens.world import Play, Split, TokenWorld

__all__ = ["Playing", "Rollout", "TokenRollouts"]

logger = logging.getLogger(__name__)

FILE, NOTES = "rollout.safetensors", "rollout.json"
# Stand beside a rollout's number where generators are seeded.
_ORDER, _QUESTIONS, _DRAW, _WORLD = 1, 2, 3, 4


@dataclass(frozen=True)
class Playing:
    """How episodes are played and handed out.

    Attributes:
        questions: Q of a rollout.
        group: G.
        epochs: how often a rollout is gone through.
        drawn: how tokens are drawn.
    """

    questions: int
    group: int
    epochs: int
    drawn: Drawn

    @property
    def episodes(self) -> int:
        """B."""
        return self.questions * self.group


@dataclass
class Rollout:
    """Episodes that were played with the same weights.

    Attributes:
        number: of rollouts before it.
        samples: what is learned from.
        notes: numbers about it, by name.
        world: what later rewards hang on, see `TokenWorld.state_dict`.
    """

    number: int
    samples: Samples
    notes: dict[str, float]
    world: dict[str, Any]


# (samples as they were played, reward of each): with log probabilities, advantages and returns; and more numbers about them.
Finish = Callable[[Samples, Tensor], tuple[Samples, dict[str, float]]]


class TokenRollouts:
    """See the module. A `Stream` of the trainer's, whose batches are `Samples`.

    Args:
        world: where to act.
        playing: how.
        finish: works out what tokens were worth, with the model that learns.
        engine: makes the engine, once it is needed.
        batch_size: M, of all processes and micro-batches together.
        seed: of the run.
        rank, world_size: of so many processes this is number ``rank``.

    Attributes:
        rollout: the one that mini-batches come from; None before the first.
        position: episodes that were handed out so far, in all processes.

    Raises ConfigError if mini-batches do not divide a rollout, or processes the questions.
    """

    def __init__(
        self,
        world: TokenWorld,
        playing: Playing,
        *,
        finish: Finish,
        engine: Callable[[], PolicyEngine],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if playing.episodes % batch_size:
            raise ConfigError(
                f"train.batch_size is {batch_size}, which does not divide the {playing.episodes} episodes of a rollout "
                f"({playing.questions} questions x {playing.group})"
            )
        if playing.questions % world_size:
            raise ConfigError(
                f"questions is {playing.questions}, which {world_size} processes cannot share evenly; use a multiple of {world_size}"
            )
        self.world, self.playing, self.batch_size, self.seed = world, playing, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self.rollout: Rollout | None = None
        self._finish, self._make_engine = finish, engine
        self._engine: PolicyEngine | None = None
        self._order: tuple[tuple[int, int], Tensor] | None = None

    # Handing out

    @property
    def _per_rollout(self) -> int:
        return self.playing.episodes * self.playing.epochs

    def next_batch(self, batch_size: int) -> Samples:
        """The next part of a mini-batch for this process; plays first where the last rollout is used up."""
        number, place = divmod(self.position, self._per_rollout)
        if self.rollout is None or self.rollout.number != number:
            self._collect(number)
        assert self.rollout is not None
        epoch, within = divmod(place, self.playing.episodes)
        batch, offset = divmod(within, self.batch_size)
        index_M = self._permutation(number, epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        begin = offset + self.rank * batch_size
        self.position += batch_size * self.world_size
        return self.rollout.samples.rows(index_M[begin : begin + batch_size])

    def _permutation(self, number: int, epoch: int) -> Tensor:
        key = (number, epoch)
        if self._order is None or self._order[0] != key:
            generator = torch.Generator().manual_seed(_seed(self.seed, _ORDER, *key))
            self._order = key, torch.randperm(self.playing.episodes, generator=generator)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """How far it is; the rollout itself, and what later rewards hang on, are in files, see `save`."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` says. Raises DataError if the rollout that is held is another one than that needs."""
        needed, place = divmod(state["position"], self._per_rollout)
        held = -1 if self.rollout is None else self.rollout.number
        # Between two rollouts the next may have been made already, by the same weights.
        if held not in ((needed,) if place else (needed - 1, needed)):
            raise DataError(
                f"cannot go on after {state['position']} episodes: that needs rollout {needed}, and number {held} is held; "
                "the checkpoint is damaged"
            )
        self.position = state["position"]

    def save(self, folder: Path) -> None:
        """Write the rollout into a checkpoint's folder; nothing before the first."""
        if self.rollout is None:
            return
        save_file({name: tensor.contiguous() for name, tensor in self.rollout.samples._asdict().items()}, folder / FILE)
        atomic_write_json(
            folder / NOTES, {"number": self.rollout.number, "notes": self.rollout.notes, "world": self.rollout.world}
        )

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote. Raises CheckpointError if it cannot be read or does not fit."""
        path = folder / FILE
        if not path.exists():
            return
        try:
            tensors, told = load_file(path), parse_json((folder / NOTES).read_text("utf-8"))
            samples = Samples(*(tensors[name] for name in Samples._fields))
            self.rollout = Rollout(int(told["number"]), samples, dict(told["notes"]), dict(told["world"]))
            self.world.load_state_dict(self.rollout.world)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if len(samples.token_BL) != self.playing.episodes:
            raise CheckpointError(
                f"{path} has {len(samples.token_BL)} episodes, and a rollout {self.playing.episodes}; the checkpoint is damaged"
            )

    @staticmethod
    def judged_by(folder: Path) -> dict[str, Any] | None:
        """What rewards hung on in a checkpoint's rollout, for `TokenWorld.judge_as`; None before the first. Raises CheckpointError."""
        path = folder / NOTES
        if not path.exists():
            return None
        try:
            return dict(parse_json(path.read_text("utf-8"))["world"])
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None

    def close(self) -> None:
        """Free the engine, and what the world holds."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self.world.close()

    # Playing

    def play(
        self, questions: list[int], seeds: list[int], drawn: Drawn, *, split: Split, draws: list[int] | None = None
    ) -> list[Trajectory]:
        """Episodes of these questions, with the weights as they are.

        Args:
            questions: of the split, each as often as it is to be played.
            seeds: of each episode's world.
            drawn: how tokens are drawn.
            split: which questions.
            draws: seeds of what is drawn; None for those of the world.
        """
        plays = [self.world.play(each, seed=seed, split=split) for each, seed in zip(questions, seeds, strict=True)]
        return self.played(plays, draws or seeds, drawn)

    def played(self, plays: Sequence[Play], draws: Sequence[int], drawn: Drawn) -> list[Trajectory]:
        """Episodes that have been begun, with the weights as they are; ``draws`` are seeds of what is drawn."""
        try:
            if self._engine is None:
                self._engine = self._make_engine()
            else:
                self._engine.refresh()
            return self._engine.play(plays, draws, drawn, waits=self.world.waits, over=self.world.broken_off)
        except BaseException as error:
            # An engine that has failed stays so; and whoever is still in the world, since an interruption waits for nobody, ends.
            self._engine = None
            if self.world.waits and not isinstance(error, Exception):
                logger.warning("interrupted: ending calls that are out")
            self.world.close()
            raise

    def _collect(self, number: int) -> None:
        """Play a rollout, and work out what it was worth."""
        questions, group = self.playing.questions, self.playing.group
        own = range(self.rank * questions // self.world_size, (self.rank + 1) * questions // self.world_size)
        asked = [self._question(number * questions + place) for place in own for _ in range(group)]
        seeds = [_seed(self.seed, _WORLD, number, place) for place in own for _ in range(group)]
        draws = [_seed(self.seed, _DRAW, number, place, each) for place in own for each in range(group)]
        played = self.play(asked, seeds, self.playing.drawn, split="train", draws=draws)
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, played)
            played = [each for part in gathered for each in part]
        outcomes = [each.outcome for each in played if each.outcome is not None]
        rewards = self.world.rewards(outcomes)
        for place, reward in enumerate(rewards):
            if not np.isfinite(reward):
                raise DataError(
                    f"episode {place} of rollout {number} was given the reward {reward}; mend the world, and resume"
                )
        samples = padded(played, () if self._engine is None else self._engine.layers)
        samples, notes = self._finish(samples, torch.tensor(rewards, dtype=torch.float32))
        measured = {f"episode_{name}": float(value) for name, value in self.world.measured(outcomes).items()}
        self.rollout = Rollout(
            number, samples, {**notes, **_notes(played, rewards), **measured}, self.world.state_dict()
        )

    def _question(self, place: int) -> int:
        """The n-th question that is asked: each once before any is asked again, in an order drawn anew each time."""
        epoch, within = divmod(place, self.world.num_questions)
        order = np.random.default_rng([self.seed, _QUESTIONS, epoch]).permutation(self.world.num_questions)
        return int(order[within])


def _notes(played: list[Trajectory], rewards: list[float]) -> dict[str, float]:
    """Numbers about a rollout."""
    return {
        "reward": float(np.mean(rewards)),
        "reward_deviation": float(np.std(rewards)),
        "response_tokens": float(np.mean([len(each.tokens) for each in played])),
        "own_tokens": float(np.mean([sum(each.own) for each in played])),
        "turns": float(np.mean([each.turns for each in played])),
        "cut": float(np.mean([each.is_cut for each in played])),
    }


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
