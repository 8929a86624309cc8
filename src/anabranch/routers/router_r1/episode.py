"""One question, round by round: what the router writes goes in, what is to be asked of whom comes out, and information goes back.

    episode = Episode("Who ...?", rules, models)
    asked = episode.feed("<think>...</think><search>small: ...</search>")     # a Route, with `model` resolved, or None
    episode.inform("It was ...")                                              # only after a Route
    episode.is_done, episode.answer, episode.text

No clock, no network, no chance: `environment` and `program` both play it.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import InputError
from anabranch.routers.router_r1.grammar import (
    Answer,
    Invalid,
    Route,
    action_of,
    cut,
    faults,
    information,
    last_answer,
    plain_tags,
    resolve,
)

# What stands for what a model could not say.
NOTHING = "None"

# Characters of a word at most, in the mean: a text without white space (Chinese, a hostile one) has an end as well.
WIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Of episodes. The defaults are the code's.

    Attributes:
        max_turns: in which the router may ask; then it has one more, in which nothing is asked.
        max_calls: of models; None for as many as turns.
        information_tokens: of what a model said.
        turn_characters: of what the router writes in one turn: more of it is no text of its own making.
        aliases: other names of models.
    """

    max_turns: int = 4
    max_calls: int | None = None
    information_tokens: int = 600
    turn_characters: int = 40_000
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("max_turns", 0), ("information_tokens", 1), ("turn_characters", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that is to be asked.

    Attributes:
        model: of the pool.
        query: the question.
    """

    model: str
    query: str


def words(text: str, most: int) -> str:
    """The first so many words of a text, and at most `WIDE` times as many characters: what stands for its tokens without a tokenizer.

    Words end at any white space; the reference splits at single spaces alone, by which lines without them have no end.
    """
    text = text[: WIDE * most]
    ends = [found.end() for found in itertools.islice(re.finditer(r"\S+", text), most + 1)]
    return text if len(ends) <= most else text[: ends[most - 1]]


@dataclass(slots=True)
class Episode:
    """See the module.

    Attributes:
        question: that it is about.
        rules: see there.
        models: that may be asked.
        clip: a text's first so many tokens.
        parts: turns and information so far, and whether the router wrote them.
        actions: what each turn did, in short words.
        turns: that the router has had.
        calls: questions that were asked of models.
        answer: that was given; None without one.
        is_done: nothing is to be written any more.
    """

    question: str
    rules: Rules
    models: Sequence[str]
    clip: Callable[[str, int], str] = words
    parts: list[tuple[str, bool]] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    turns: int = 0
    calls: int = 0
    answer: str | None = None
    is_done: bool = False
    _waits: bool = False

    @property
    def text(self) -> str:
        """All of it, without the prompt."""
        return "".join(text for text, _ in self.parts)

    @property
    def is_last(self) -> bool:
        """The next turn is the last: what it asks is not asked."""
        return self.turns >= self.rules.max_turns

    def feed(self, written: str) -> Asked | None:
        """What the router wrote in a turn; the question it asks, if it asks one that can be asked.

        Raises InputError where it is not the router's turn.
        """
        if self.is_done or self._waits:
            raise InputError("the episode is over" if self.is_done else "the episode waits for information")
        was_last = self.is_last
        text = cut(plain_tags(written[: self.rules.turn_characters]))
        self.parts.append((text, True))
        self.turns += 1
        action = action_of(text)
        if isinstance(action, Answer):
            self.answer, self.is_done = action.text, True
            self.actions.append("answer")
            return None
        asked = None if was_last else self._asked(action)
        if was_last:
            self.actions.append("unanswered")
        self.is_done = was_last
        return asked

    def _asked(self, action: Route | Invalid) -> Asked | None:
        if isinstance(action, Invalid):
            self.actions.append(f"invalid: {action.reason}")
            return None
        model = resolve(action.name, self.models, self.rules.aliases)
        if model is None:
            self.actions.append("invalid: unknown model")
            self.parts.append((information(NOTHING), False))
            return None
        if self.rules.max_calls is not None and self.calls >= self.rules.max_calls:
            self.actions.append("invalid: no calls left")
            self.parts.append((information(NOTHING), False))
            return None
        self.actions.append(f"route: {model}")
        self.calls += 1
        self._waits = True
        return Asked(model, action.query)

    def inform(self, said: str | None) -> None:
        """What the model said; None where it failed, which makes its turn an invalid one. Raises InputError if nothing was asked."""
        if not self._waits:
            raise InputError("nothing was asked; there is nothing to inform of")
        self._waits = False
        if said is None:
            self.actions[-1] = "invalid: no reply"
        self.parts.append(
            (information(NOTHING if said is None else self.clip(said, self.rules.information_tokens)), False)
        )

    def faults(self, *, one_colon: bool = True) -> tuple[str, ...]:
        """Rules of the format that it breaks."""
        return faults(self.text, self.models, self.rules.aliases, one_colon=one_colon)

    @property
    def last_answer(self) -> str | None:
        """As the reward reads it."""
        return last_answer(self.text)

    def facts(self) -> dict[str, Any]:
        """Without its texts."""
        return {
            "turns": self.turns,
            "calls": self.calls,
            "actions": list(self.actions),
            "is_answered": self.answer is not None,
        }
