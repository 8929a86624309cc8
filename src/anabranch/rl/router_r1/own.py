"""Router-R1 with questions of one's own, which stand in a file, and a policy that reads: what worlds of that have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anabranch.config import Field, configclass
from anabranch.data.tokenizer import Tokenizer, load_tokenizer
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.questions import QuestionRow
from anabranch.rl.router_r1.routed import RoutedPlay, RoutedWorld
from anabranch.rl.router_r1.words import TEMPLATE
from anabranch.rl.tokens.questions import OwnQuestions, check_began
from anabranch.rl.tokens.world import Split
from anabranch.routers.router_r1 import Episode, Rules
from anabranch.routers.router_r1.environment import RoutePool
from anabranch.routers.router_r1.prompts import router_prompt

__all__ = ["OwnWorld"]

_FRONT = "beginning of prompts"
_SPLITS: tuple[Split, ...] = ("train", "test")


class OwnWorld(RoutedWorld):
    """See the module. A subclass makes its `pool` and calls `begin`.

    Attributes:
        pool: that is asked.
        names: of its models, in the order in which they are described.
    """

    pool: RoutePool
    names: tuple[str, ...]

    @configclass
    class Config(RoutedWorld.Config):
        """Files; rules and rewards as of `RoutedWorld`, whose defaults are the paper's.

        Attributes:
            questions: file of questions, see `anabranch.questions`.
            about: descriptions of models.
            tokenizer: folder of the policy, or its tokenizer.json.
            instruction: what the router is told before the question, with ``{models}``; "" for the paper's.
            warns: say more in the prompt, for base models.
            aliases: other names of models, which the router may ask by.
            held_out: share of the questions that is for tests, by a digest of their text.
        """

        questions: str = Field(min_length=1)
        about: dict[str, str] = Field(default_factory=dict)
        tokenizer: str = Field(min_length=1)
        instruction: str = ""
        warns: bool = False
        aliases: dict[str, str] = Field(default_factory=dict)
        held_out: float = Field(default=0.1, gt=0, lt=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        self.tokenizer.chat_template = None
        # What the model has in front of every text (``<s>`` of Llama), as it was made.
        self._begin_with(_front_of(self.tokenizer))
        self.vocab_size = self.tokenizer.vocab_size
        self._questions = OwnQuestions(config.questions, config.held_out)
        for split in _SPLITS:
            for row in self._questions[split]:
                _check_answers(row)
        self._began = {"questions": self._questions.digest, "tokenizer": self.tokenizer.fingerprint}
        self.num_questions, self.num_tests = (len(self._questions[split]) for split in ("train", "test"))

    def _begin_with(self, front: str) -> None:
        """Begin prompts with this text, and the chats of whoever serves the policy, with which its tokenizer is saved.

        A gateway's chat is then the text of an episode, whatever chats the model knew before.
        """
        self._front = front
        self.tokenizer.chat_template = f"{{{{ {json.dumps(front)} }}}}{TEMPLATE}" if front else TEMPLATE

    def begin(self, pool: RoutePool) -> None:
        """Ask this pool. Raises ConfigError for a description or an alias of no model of it, and an instruction without models."""
        self.pool, self.names = pool, tuple(pool.prices)
        for alias, name in self.config.aliases.items():
            if name not in self.names:
                raise ConfigError(
                    f"aliases has {alias!r} for {name!r}, which is not among the models: {', '.join(self.names)}"
                )
        try:
            self._prompt("?", self.config.about)
        except InputError as error:
            raise ConfigError(str(error)) from None

    @property
    def rules(self) -> Rules:
        """See `RoutedWorld`."""
        return replace(super().rules, aliases=self.config.aliases)

    def _prompt(self, question: str, about: Mapping[str, str]) -> str:
        config = self.config
        return router_prompt(question, self.names, about, warns=config.warns, instruction=config.instruction or None)

    def play(self, question: int, *, seed: int, split: Split = "train") -> RoutedPlay:
        """See `TokenWorld`; the seed says nothing, since nothing is drawn."""
        row = self._questions[split][question]
        return self.asked(row.prompt, row.answers)

    def asked(self, question: str, answers: tuple[str, ...] = ()) -> RoutedPlay:
        """An episode of any question. Raises InputError for an empty one."""
        prompt = self._prompt(question, self.about())
        return RoutedPlay(
            self.tokenizer,
            self._front + prompt,
            Episode(question, self.rules, self.names),
            self.pool,
            answers,
            basis=self.config.cost_basis,
            one_colon=self.config.one_colon,
        )

    def longest_prompt(self) -> int:
        """Tokens of the longest of all prompts."""
        return max(
            len(self.play(number, seed=0, split=split).prompt)
            for split in _SPLITS
            for number in range(len(self._questions[split]))
        )

    def about(self) -> dict[str, str]:
        """As configured."""
        return dict(self.config.about)

    def strategy(self) -> dict[str, Any]:
        """See `RoutedWorld`."""
        said = {
            "instruction": self.config.instruction,
            "warns": self.config.warns,
            "aliases": dict(self.config.aliases),
        }
        return {**super().strategy(), **{name: value for name, value in said.items() if value}}

    def state_dict(self) -> dict[str, Any]:
        """The window of costs, what prompts begin with, and which questions and tokens there are."""
        return {**super().state_dict(), **self._began, _FRONT: json.dumps(self._front)}

    def judge_as(self, state: dict[str, Any]) -> None:
        """See `TokenWorld`; whoever asks a router goes on with nothing, and may have other questions, but no other tokens."""
        check_began(state, {"tokenizer": self._began["tokenizer"]})
        self._take_over(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises CheckpointError for one of other questions or tokens."""
        check_began(state, self._began)
        self._take_over(state)

    def _take_over(self, state: dict[str, Any]) -> None:
        # The policy was taught with these, and is served with them; prompts of runs that do not tell had nothing in front.
        self._begin_with(json.loads(state.get(_FRONT, '""')))
        super().load_state_dict(state)


def _front_of(tokenizer: Tokenizer) -> str:
    """What stands in front of every text, as text; "" for nothing. ``tokenizer`` has no template of chats."""
    plain, whole = tokenizer.encode("a"), tokenizer.encode_chat("a")
    front = whole[: len(whole) - len(plain)]
    text = tokenizer.decode(front, skip_special=False)
    if tokenizer.encode(text) != front:
        raise ConfigError(
            f"the tokenizer puts {front} in front of every text, and no text stands for that; a router's chat could not be written with it"
        )
    return text


def _check_answers(row: QuestionRow) -> None:
    """Raise DataError where there is nothing to compare with."""
    if not any(one.strip() for one in row.answers):
        raise DataError(f"{row.where}: its answer is blank")
