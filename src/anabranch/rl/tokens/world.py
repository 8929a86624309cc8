"""`TokenWorld`: where a policy of tokens acts. It writes a turn, token by token; the world answers in tokens, or is done.

    play = world.play(question, seed=3)
    play.prompt                              # tokens that the policy goes on from
    play.ends(turn)                          # whether a turn is over, asked after each of its tokens
    told = play.step(turn)                   # what the world writes behind it; told.is_done
    world.rewards([play.outcome(), ...])     # what episodes are worth

Tokens go in and come out: what was drawn is what is learned from, and nothing is ever turned into text and back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError

__all__ = ["Outcome", "Play", "Split", "TokenWorld", "Told", "means"]

Split = Literal["train", "test"]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Told:
    """What a world says to a turn.

    Attributes:
        tokens: that it writes; the policy is not trained on them.
        is_done: the episode is over.
    """

    tokens: Tokens = ()
    is_done: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of an episode.

    Attributes:
        reward: what it is worth, where that does not hang on other episodes.
        measures: numbers about it, which are averaged; the same names for every episode of a world.
        facts: whatever else `TokenWorld.rewards` looks at.
    """

    reward: float
    measures: dict[str, float] = field(default_factory=dict)
    facts: Any = None


class Play(Protocol):
    """One episode.

    Attributes:
        prompt: what the policy goes on from, at least one token.
    """

    prompt: Tokens

    def ends(self, turn: Sequence[int]) -> bool:
        """Whether the turn is over with its last token. It is at its most tokens in any case."""
        ...

    def step(self, turn: Tokens) -> Told:
        """What the world says to a whole turn. Where a world `waits`, several episodes are asked at once, each in a thread."""
        ...

    def outcome(self) -> Outcome:
        """What became of it; also of one that was cut off, where there was no room for a further turn."""
        ...


class TokenWorld(Part, family="token_world"):
    """See the module. A world follows from its config, and an episode from its question, its seed and what the policy writes.

    Attributes:
        waits: `Play.step` takes long, as where other models are asked: steps of several episodes are then made side by side.
        tokenizer: what the tokens mean; saved with the policy. None where they mean no text.
        vocab_size: tokens are 0 to one less.
        turn_tokens: most of a turn.
        num_questions: that there are to learn from.
        num_tests: and those to measure by, which are no others' questions.
        broken_off: of a world that waits in `Play.step` to try something again: set where nobody will read what comes of it, since an
            episode has failed, or the process is to end at once, until `close` has ended that. None for a world that does not wait so.
    """

    waits: bool = False
    broken_off: threading.Event | None = None
    tokenizer: Tokenizer | None = None
    vocab_size: int
    turn_tokens: int
    num_questions: int
    num_tests: int

    @configclass
    class Config(BaseConfig):
        """Without fields of its own."""

    def __init__(self, config: TokenWorld.Config) -> None:
        self.config = config

    def play(self, question: int, *, seed: int, split: Split = "train") -> Play:
        """Begin an episode.

        Args:
            question: number of it among those of the split.
            seed: of what else is drawn; episodes of one group have the same.
            split: ``train`` or ``test``.
        """
        raise NotImplementedError  # abstract

    def rewards(self, outcomes: Sequence[Outcome]) -> list[float]:
        """What the episodes of a rollout are worth, in their order. Default: each its own."""
        return [outcome.reward for outcome in outcomes]

    def measured(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Numbers about episodes, JSON-ready. Default: the mean of each of their measures."""
        return means([outcome.measures for outcome in outcomes])

    def traces(self, count: int, *, seed: int) -> list[tuple[Tokens, tuple[tuple[Tokens, bool], ...]]]:
        """Episodes to imitate before any is played: prompts, and what was written after them, with whether the policy had written it.

        Raises ConfigError for a world that has none (the default).
        """
        raise ConfigError(
            f"{type(self).__name__} has no traces to begin with; start from a model that speaks its language"
        )

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """What somebody would read of an episode, by name: texts and numbers. Default: its measures."""
        return dict(outcome.measures)

    def close(self) -> None:
        """Free what it holds, and end what `Play.step` still waits for; played again it begins anew."""

    def state_dict(self) -> dict[str, Any]:
        """What of rewards hangs on earlier rollouts: JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""

    def judge_as(self, state: dict[str, Any]) -> None:
        """Judge episodes as where `state_dict` gave this, without going on from there. Default: `load_state_dict`."""
        self.load_state_dict(state)


def means(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name that all have."""
    return {name: sum(each[name] for each in measures) / len(measures) for name in measures[0]} if measures else {}
