"""`AnswersWorld`: questions of one's own that are answered in one turn, and a reward that checks the answer.

AnswersWorld.Config(questions="questions.jsonl", tokenizer="SmolLM2-135M-Instruct", reward="number")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.data.tokenizer import Tokenizer, load_tokenizer
from anabranch.questions import QuestionRow
from anabranch.rl.tokens.questions import OwnQuestions, check_began
from anabranch.rl.tokens.rewards import AnswerReward, find_reward
from anabranch.rl.tokens.world import Outcome, Split, Tokens, TokenWorld, Told

__all__ = ["Answer", "AnswersWorld"]


@dataclass(frozen=True)
class Answer:
    """What became of an episode: plain values, which processes hand to each other.

    Attributes:
        asked: the question.
        wanted: answers that are right, as far as the file says.
        answer: that was given.
    """

    asked: str
    wanted: tuple[str, ...]
    answer: str


class AnswerPlay:
    """An episode, see `anabranch.rl.tokens.Play`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Tokens, row: QuestionRow, reward: AnswerReward) -> None:
        self.prompt, self.row = prompt, row
        self._tokenizer, self._reward = tokenizer, reward
        self._said, self._worth, self._is_whole = "", 0.0, False

    def ends(self, turn: Sequence[int]) -> bool:
        """At the end of the text."""
        return turn[-1] in self._tokenizer.stop_ids

    def step(self, turn: Tokens) -> Told:
        """Judge the answer."""
        self._is_whole = self.ends(turn)
        # What ends a text is none of it, whether its tokenizer calls it special or not.
        self._said = self._tokenizer.decode(turn[:-1] if self._is_whole else turn)
        self._worth = self._reward(self.row, self._said)
        return Told()

    def outcome(self) -> Outcome:
        """What it was worth, and whether it came to its end by itself."""
        facts = Answer(self.row.prompt, self.row.answers, self._said)
        return Outcome(self._worth, {"right": float(self._worth >= 1), "ended": float(self._is_whole)}, facts)


class AnswersWorld(TokenWorld, kind="answers"):
    """See the module.

    Raises DataError for a file that is not there or damaged, or has a question that the reward cannot judge; ConfigError for a reward that
    there is not; TokenizerError for a tokenizer that there is not.
    """

    @configclass
    class Config(TokenWorld.Config):
        """Questions, and what is right.

        Attributes:
            questions: file of questions, see `anabranch.questions`.
            tokenizer: folder of the policy, or its tokenizer.json.
            reward: see `anabranch.rl.tokens.rewards`.
            system: what the model is told before each question, in a chat; "" for nothing.
            chats: questions are messages of a chat; None where the model has a template of chats, else they are texts to go on from.
            turn_tokens: most of an answer.
            held_out: share of the questions that is for tests, by a digest of their text.
        """

        questions: str = Field(min_length=1)
        tokenizer: str = Field(min_length=1)
        reward: str = "exact"
        system: str = ""
        chats: bool | None = None
        turn_tokens: Size = Field(default=256, ge=1)
        held_out: float = Field(default=0.1, gt=0, lt=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        self.vocab_size, self.turn_tokens = self.tokenizer.vocab_size, config.turn_tokens
        self.reward = find_reward(config.reward)
        self.waits = self.reward.waits
        self._questions = OwnQuestions(config.questions, config.held_out, needs_answer=self.reward.needs_answer)
        for row in self._rows():
            self.reward.check(row)
        self.num_questions, self.num_tests = (len(self._questions[split]) for split in ("train", "test"))
        has_template = self.tokenizer.chat_template is not None or self.tokenizer.id_of("<|im_start|>") is not None
        self._chats = has_template if config.chats is None else config.chats

    def play(self, question: int, *, seed: int, split: Split = "train") -> AnswerPlay:
        """See `TokenWorld`; the seed says nothing, since nothing is drawn."""
        row = self._questions[split][question]
        return AnswerPlay(self.tokenizer, self._prompt(row), row, self.reward)

    def longest_prompt(self) -> int:
        """Tokens of the longest of all prompts."""
        return max(len(self._prompt(row)) for row in self._rows())

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """See `TokenWorld`."""
        facts: Answer = outcome.facts
        return {"question": facts.asked, "answer": facts.answer, "wanted": " | ".join(facts.wanted)}

    def state_dict(self) -> dict[str, Any]:
        """Which questions and tokens there are, and what judges."""
        return {
            "questions": self._questions.digest,
            "tokenizer": self.tokenizer.fingerprint,
            "reward": self.reward.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise CheckpointError for a state of other questions or tokens, or of another reward."""
        check_began(state, self.state_dict())

    def judge_as(self, state: dict[str, Any]) -> None:
        """See `TokenWorld`; whoever judges goes on with nothing, and may have other questions, or another reward, but no other tokens."""
        check_began(state, {"tokenizer": self.tokenizer.fingerprint})

    def _rows(self) -> list[QuestionRow]:
        return [*self._questions["train"], *self._questions["test"]]

    def _prompt(self, row: QuestionRow) -> Tokens:
        if not self._chats:
            return tuple(self.tokenizer.encode_prompt(row.prompt))
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        messages = [*system, {"role": "user", "content": row.prompt}]
        return tuple(self.tokenizer.encode_chat(self.tokenizer.apply_chat_template(messages)))
