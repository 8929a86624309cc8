"""Router-R1 in the two-hop world: which model is called what, and the order of descriptions, is drawn for every question."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.rl.router_r1.routed import Routed, RoutedPlay, RoutedWorld, is_right, mean_of
from anabranch.rl.router_r1.words import word_tokenizer
from anabranch.rl.tokens.world import Outcome, Split, Tokens
from anabranch.routers.router_r1 import Episode
from anabranch.routers.router_r1.environment import RoutePool
from anabranch.routers.router_r1.grammar import TAGS
from anabranch.routers.router_r1.prompts import router_prompt
from anabranch.routers.router_r1.two_hop import VERSION, Question, Shape, TwoHop, query_of

__all__ = ["INSTRUCTION", "NAMES", "TwoHopPlay", "TwoHopRouted", "TwoHopWorld"]

# Of the small world, whose words are its own; the paper's is for models that read English.
INSTRUCTION = "{models}"
# What models may be called; which is called what is drawn for every episode.
NAMES = tuple(f"m{number}" for number in range(16))
_ONE_HOP = re.compile(r"\s*+r([0-9]{1,6}) of e[0-9]{1,6}\s*+\??+\s*+")


@dataclass(frozen=True)
class TwoHopRouted(Routed):
    """What became of an episode of `TwoHopWorld`.

    Attributes:
        named: models by the names that they had in it.
        hops: of the question.
    """

    named: Mapping[str, int]
    hops: int


class TwoHopPlay(RoutedPlay):
    """An episode of `TwoHopWorld`.

    Attributes:
        named: models by the names that they have in it.
        question: that is asked.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        episode: Episode,
        pool: RoutePool,
        named: Mapping[str, int],
        question: Question,
        *,
        one_colon: bool = True,
    ) -> None:
        super().__init__(tokenizer, prompt, episode, pool, [f"e{question.answer}"], one_colon=one_colon)
        self.named, self.question = dict(named), question

    def outcome(self) -> Outcome:
        """See `RoutedPlay`."""
        return Outcome(0.0, {}, TwoHopRouted(**self._facts(), named=self.named, hops=self.question.hops))


class TwoHopWorld(RoutedWorld, kind="two_hop"):
    """See the module."""

    @configclass
    class Config(RoutedWorld.Config):
        """The world; rules and rewards as of `RoutedWorld`, for turns and replies of some words.

        Attributes:
            entities, relations, experts: see `Shape`.
            seed: of the world.
            hidden: number of an expert that is not in the pool; None for all.
            reading: share of the traces that read the descriptions aloud, see `traces`.
        """

        entities: Size = Field(default=400, ge=1)
        relations: Size = Field(default=8, ge=1)
        experts: Size = Field(default=7, ge=1)
        seed: int = Field(default=0, ge=0)
        hidden: int | None = Field(default=None, ge=0)
        reading: float = Field(default=0.25, ge=0, le=1)
        information_tokens: Size = Field(default=6, ge=1)
        turn_tokens: Size = Field(default=24, ge=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        try:
            shape = Shape(entities=config.entities, relations=config.relations, experts=config.experts)
        except InputError as error:
            raise ConfigError(str(error)) from None
        self.facts = TwoHop(shape, seed=config.seed)
        if self.facts.num_models > len(NAMES):
            raise ConfigError(f"experts is {config.experts}; there are names for {len(NAMES) - 1}, and the generalist")
        if config.hidden is not None and config.hidden >= config.experts:
            raise ConfigError(f"hidden is {config.hidden}; experts are 0 to {config.experts - 1}")
        self.tokenizer: Tokenizer = word_tokenizer(
            [
                *(f"<{tag}>" for tag in TAGS),
                *(f"</{tag}>" for tag in TAGS),
                *("-", ":", ";", "?", "Question", "need", "know", "Go", "on."),
                *NAMES,
                *self.facts.vocabulary,
            ]
        )
        self.vocab_size = self.tokenizer.vocab_size
        self.num_questions, self.num_tests = (self.facts.num_questions(split) for split in ("train", "test"))

    def play(self, question: int, *, seed: int, split: Split = "train") -> TwoHopPlay:
        """See `TokenWorld`."""
        asked, names = self.facts.question(question, split), self.names(seed)
        about = {name: self.facts.about(model) for name, model in names.items()}
        prompt = router_prompt(asked.text, list(names), about, instruction=INSTRUCTION)
        episode = Episode(asked.text, self.rules, list(names))
        pool, one_colon = self.facts.pool(names), self.config.one_colon
        return TwoHopPlay(self.tokenizer, prompt, episode, pool, names, asked, one_colon=one_colon)

    def names(self, seed: int) -> dict[str, int]:
        """The models of an episode by their names, in the order in which they are described."""
        draw = np.random.default_rng(seed)
        models = [model for model in range(self.facts.num_models) if model != self.config.hidden]
        order, names = draw.permutation(models), draw.permutation(len(NAMES))
        return {NAMES[name]: int(model) for name, model in zip(names, order, strict=False)}

    def measured(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """As of `RoutedWorld`, by hops too; how many questions of one hop went to a model that is said to be good at them; and how much
        by chance it was who was asked (`routing_entropy_of`).
        """
        facts: list[TwoHopRouted] = [outcome.facts for outcome in outcomes]
        told = super().measured(outcomes)
        for hops, name in ((1, "one_hop"), (2, "two_hop")):
            own = [each for each in facts if each.hops == hops]
            told[f"exact_match_{name}"] = mean_of(is_right(each) for each in own)
            told[f"calls_{name}"] = mean_of(len(each.calls) for each in own)
        sent = [(relation_of(query), each.named[name]) for each in facts for name, query in each.calls]
        return told | {
            "to_experts": mean_of(relation in self.facts.good[model] for relation, model in sent),
            "routing_entropy": routing_entropy_of(sent, self.facts.num_models - (self.config.hidden is not None)),
        }

    def share_to(self, facts: Sequence[TwoHopRouted], model: int) -> float:
        """Of the questions about relations that a model is good at, how many went to it."""
        sent = [(relation_of(query), each.named[name]) for each in facts for name, query in each.calls]
        return mean_of(to == model for relation, to in sent if relation in self.facts.good[model])

    # What to begin with

    def traces(self, count: int, *, seed: int) -> list[tuple[Tokens, tuple[tuple[Tokens, bool], ...]]]:
        """Episodes of somebody who knows the language, and asks a model drawn anew for each hop: nothing of whom to ask is in them.

        A share of them (``reading``) are other questions, which descriptions answer: what a model's price is, who is good at a relation. So
        whoever is taught by them can read, as a model that was trained on text can, and has not been shown to read before it asks.

        Raises ConfigError where an episode has no turns for two questions.
        """
        if self.config.max_turns < 2 and self.config.reading < 1:
            raise ConfigError(
                f"task.world.max_turns is {self.config.max_turns}, and traces ask for each of two hops; use at least 2"
            )
        draw = np.random.default_rng([seed, 0x2412])
        made = []
        for _ in range(count):
            number, is_reading = int(draw.integers(self.num_questions)), bool(draw.random() < self.config.reading)
            made.append(self._reading(draw) if is_reading else self._trace(number, draw))
        return made

    def _reading(self, draw: np.random.Generator) -> tuple[Tokens, tuple[tuple[Tokens, bool], ...]]:
        names = self.names(int(draw.integers(2**62)))
        about = {name: self.facts.about(model) for name, model in names.items()}
        good = {name: self.facts.good[model] for name, model in names.items()}
        known = sorted({relation for of in good.values() for relation in of})
        if known and draw.random() < 0.5:
            relation = known[int(draw.integers(len(known)))]
            asked = f"good at r{relation} ?"
            answer = next(name for name, of in good.items() if relation in of)
        else:
            name = list(names)[int(draw.integers(len(names)))]
            asked, answer = f"price of {name} ?", str(self.facts.prices[names[name]])
        prompt = router_prompt(asked, list(names), about, instruction=INSTRUCTION)
        said = f"<think> know {answer} </think> <answer> {answer} </answer>"
        return tuple(self.tokenizer.encode_chat(prompt)), ((tuple(self.tokenizer.encode(said)), True),)

    def _trace(self, number: int, draw: np.random.Generator) -> tuple[Tokens, tuple[tuple[Tokens, bool], ...]]:
        play = self.play(number, seed=int(draw.integers(2**62)))
        asked, names = play.question, list(play.named)
        entity, parts = asked.entity, []
        for relation in reversed(asked.relations):
            query = query_of((relation,), entity)
            name = names[int(draw.integers(len(names)))]
            turn = tuple(self.tokenizer.encode(f"<think> need {query} </think> <search> {name} : {query} </search>"))
            told = play.step(turn)
            parts += [(turn, True), (told.tokens, False)]
            entity = self.facts.says(play.named[name], relation, entity)
        last = tuple(self.tokenizer.encode(f"<think> know e{entity} </think> <answer> e{entity} </answer>"))
        return play.prompt, (*parts, (last, True))

    # What later rewards hang on

    def state_dict(self) -> dict[str, Any]:
        """The window of costs, and which version of the world it is of."""
        return {**super().state_dict(), "world": VERSION}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises CheckpointError for one of another version: rewards and costs were others there."""
        # The first version did not tell.
        began = state.get("world", 1)
        if began != VERSION:
            raise CheckpointError(
                f"the run began in version {began} of the two-hop world, and this is version {VERSION}, with other models at other prices; "
                "begin a new run, or use the release that it began with"
            )
        super().load_state_dict(state)

    # What a gateway needs

    def about(self) -> dict[str, str]:
        """Models by the names of one episode, with their descriptions."""
        return {name: self.facts.about(model) for name, model in self.names(0).items()}

    def strategy(self) -> dict[str, Any]:
        """See `RoutedWorld`."""
        return {**super().strategy(), "instruction": INSTRUCTION}


def routing_entropy_of(sent: Sequence[tuple[int | None, int]], models: int) -> float:
    """How much by chance it is who is asked about a relation: the entropy of models given the relation, as a share of its most.

    Args:
        sent: relation and model of each question; those without a relation do not count.
        models: that may be asked.

    Returns 1 where all are asked alike, 0 where one model is asked about each relation, or nothing was asked.
    """
    counts = Counter((relation, model) for relation, model in sent if relation is not None)
    of_relation: Counter[int] = Counter()
    for (relation, _), count in counts.items():
        of_relation[relation] += count
    total = of_relation.total()
    if not total or models < 2:
        return 0.0
    nats = -sum(count * math.log(count / of_relation[relation]) for (relation, _), count in counts.items()) / total
    return abs(nats) / math.log(models)


def relation_of(query: str) -> int | None:
    """The relation of a question of one hop; None for another."""
    match = _ONE_HOP.fullmatch(query)
    return int(match[1]) if match else None
