"""Router-R1 with questions of your own and a pool that was recorded: what each model said to each question stands in a file.

    {"question": "Who wrote the book?", "answers": ["Ann", "Ann Smith"]}                                     a line of questions.jsonl
    {"model": "small", "query": "Who wrote it?", "text": "Ann", "completion_tokens": 1}                      a line of table.jsonl

A router that asks what was not recorded is told nothing, so tables are of what routers ask: of an earlier run's episodes, asked once. For a
pool that is there, subclass `RecordedWorld` and give `pool` something that replies; with ``waits = True`` models are asked side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anabranch.config import Field, configclass
from anabranch.data.tokenizer import Tokenizer, load_tokenizer
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.files import parse_json
from anabranch.rl.router_r1.routed import RoutedPlay, RoutedWorld
from anabranch.rl.router_r1.words import TEMPLATE
from anabranch.rl.tokens.world import Split
from anabranch.routers.router_r1 import Episode, RecordedPool, Reply
from anabranch.routers.router_r1.environment import RoutePool
from anabranch.routers.router_r1.prompts import router_prompt

__all__ = ["RecordedWorld"]

_FIELDS = ("model", "query", "text")


class RecordedWorld(RoutedWorld, kind="recorded"):
    """See the module.

    Attributes:
        pool: that is asked.

    Raises DataError for files that are not there or damaged, ConfigError for a model without a price.
    """

    @configclass
    class Config(RoutedWorld.Config):
        """Files; rules and rewards as of `RoutedWorld`, whose defaults are the paper's.

        Attributes:
            questions: file of questions, see the module.
            table: file of what models said.
            prices: of a million completion tokens of each model; all that may be asked are here.
            about: descriptions of models.
            tokenizer: folder of the policy, or its tokenizer.json.
            instruction: what the router is told before the question, with ``{models}``; "" for the paper's.
            held_out: share of the questions that is for tests, by a digest of their text.
        """

        questions: str = Field(min_length=1)
        table: str = Field(min_length=1)
        prices: dict[str, float] = Field(min_length=1)
        about: dict[str, str] = Field(default_factory=dict)
        tokenizer: str = Field(min_length=1)
        instruction: str = ""
        held_out: float = Field(default=0.1, gt=0, lt=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        # Saved with the policy: a gateway's chat is then the text of an episode, whatever chats the model knew before.
        self.tokenizer.chat_template = TEMPLATE
        self.vocab_size = self.tokenizer.vocab_size
        self._questions = _split(config.questions, config.held_out)
        self.num_questions, self.num_tests = (len(self._questions[split]) for split in ("train", "test"))
        try:
            self.pool: RoutePool = RecordedPool(_table(config.table), config.prices)
            router_prompt("?", list(config.prices), config.about, instruction=config.instruction or None)
        except InputError as error:
            raise ConfigError(str(error)) from None

    def play(self, question: int, *, seed: int, split: Split = "train") -> RoutedPlay:
        """See `TokenWorld`; the seed says nothing, since nothing is drawn."""
        asked, answers = self._questions[split][question]
        names = list(self.config.prices)
        prompt = router_prompt(asked, names, self.config.about, instruction=self.config.instruction or None)
        return RoutedPlay(self.tokenizer, prompt, Episode(asked, self.rules, names), self.pool, answers)

    def about(self) -> dict[str, str]:
        """As configured."""
        return dict(self.config.about)

    def strategy(self) -> dict[str, Any]:
        """See `RoutedWorld`."""
        return {**super().strategy(), **({"instruction": self.config.instruction} if self.config.instruction else {})}


def _lines(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a file, with the numbers of their lines. Raises DataError with the line that is none."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise DataError(f"line {number} of {path} is a {type(found).__name__}; it must be an object")
        yield number, found


def _split(path: str, held_out: float) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Questions with their answers, by split; a question is in the same whatever else is in the file."""
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {"train": [], "test": []}
    for number, line in _lines(path):
        question, answers = line.get("question"), line.get("answers")
        is_text = isinstance(question, str) and bool(question.strip())
        if (
            not is_text
            or not isinstance(answers, list)
            or not answers
            or not all(isinstance(one, str) for one in answers)
        ):
            raise DataError(
                f"line {number} of {path} must have a question, which is a text, and answers, which is a list of texts"
            )
        assert isinstance(question, str)
        digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        is_test = int.from_bytes(digest, "big") < held_out * 2**64
        found["test" if is_test else "train"].append((question, tuple(answers)))
    for split, questions in found.items():
        if not questions:
            raise DataError(
                f"{path} has no question for {split}; it needs more of them, or another held_out than {held_out}"
            )
    return found


def _table(path: str) -> dict[tuple[str, str], Reply]:
    """What each model said to each question."""
    found: dict[tuple[str, str], Reply] = {}
    for number, line in _lines(path):
        wrong = [name for name in _FIELDS if not isinstance(line.get(name), str)]
        if wrong:
            raise DataError(f"line {number} of {path} has no {wrong[0]} that is a text")
        words = {"prompt_tokens": len(line["query"].split()), "completion_tokens": len(line["text"].split())}
        counts = {name: line.get(name, count) for name, count in words.items()}
        for name, count in counts.items():
            if type(count) is not int or not 0 <= count <= 10**9:
                raise DataError(
                    f"line {number} of {path} has {name} {count!r}; it must be a whole number of at least 0"
                )
        found[line["model"], line["query"]] = Reply(line["text"], **counts)
    return found
