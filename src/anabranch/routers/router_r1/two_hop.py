"""The two-hop world: models that know different facts at different prices, questions that need one fact or two, and who answers them how.

    world = TwoHop(Shape(), seed=0)
    question = world.question(17, "train")             # "r2 of r5 of e9": what is r2 of what is r5 of e9
    pool = world.pool(names={"m3": 0, ...})            # a `RoutePool`: models 0, 1, ... by the names of an episode
    pool.reply("m3", "r5 of e9")                       # Reply("e31 as far as I know", completion_tokens=6)

A fact is r of e, one entity. Each of the experts is right with ``known`` on one or two relations and with ``unknown`` on the others; the
generalist, the last model, is right with ``general`` on all, and as dear as the dearest. Whether a model is right about a fact is drawn
once and for all from (seed, model, fact), so that nothing is learned by asking again. Asked for two hops at once a model goes from fact to
fact as it knows them. Dear models say more. All of it follows from the seed; no torch, no text of anybody.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.router_r1.environment import FunctionPool, Price, Reply

__all__ = ["BASELINES", "Played", "Question", "Shape", "TwoHop"]

BASELINES = ("random", "single_oracle", "generalist", "informed")
# What fills an answer up to its length.
FILLER = ("as", "far", "as", "I", "know", "and", "I", "may", "be", "wrong", "though", "so", "ask", "others", "too")
UNKNOWN = "unknown"
_FACT = re.compile(r"r(\d{1,6})")
_QUERY = re.compile(r"\s*+((?:r\d{1,6}\s++of\s++){1,2})e(\d{1,6})\s*+\??+\s*+")
Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the world is, and how good its models are.

    Attributes:
        entities, relations: e0, e1, ..., r0, r1, ...
        experts: beside the generalist.
        known, unknown: how often an expert is right on its relations, and on others.
        general: how often the generalist is.
        cheapest, dearest: prices of a million completion tokens.
        shortest, longest: answers, in words.
        held_out: share of entities whose questions are for tests alone.

    Raises InputError for a world that cannot be.
    """

    entities: int = 400
    relations: int = 6
    experts: int = 6
    known: float = 0.95
    unknown: float = 0.15
    general: float = 0.75
    cheapest: float = 0.2
    dearest: float = 1.8
    shortest: int = 3
    longest: int = 30
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for name, least, most in (("entities", 5, 10**5), ("relations", 1, 1000), ("experts", 1, 1000)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name} is {value!r}; it must be a whole number from {least} to {most:,}")
        for name in ("known", "unknown", "general"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be from 0 to 1")
        if not 0 <= self.cheapest <= self.dearest < float("inf"):
            raise InputError(
                f"prices go from {self.cheapest!r} to {self.dearest!r}; they must be numbers that do not fall"
            )
        if not 1 <= self.shortest <= self.longest <= 500:
            raise InputError(f"answers have {self.shortest} to {self.longest} words; use 1 to 500")
        if not 1 <= round(self.held_out * self.entities) < self.entities:
            raise InputError(
                f"held_out is {self.held_out!r}; at least one entity must be for tests, and one for learning"
            )


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        relations: from the last hop to the first, as the text has them.
        entity: where it begins.
        answer: the right entity.
    """

    relations: tuple[int, ...]
    entity: int
    answer: int

    @property
    def text(self) -> str:
        """As it is asked."""
        return f"{query_of(self.relations, self.entity)} ?"

    @property
    def hops(self) -> int:
        """1 or 2."""
        return len(self.relations)


@dataclass(frozen=True)
class Played:
    """What somebody came to who knows the world, see `TwoHop.baseline`.

    Attributes:
        answer: an entity; None where the models gave none.
        models: that were asked, in order.
        cost: raw, completion tokens times prices.
    """

    answer: int | None
    models: tuple[int, ...]
    cost: float


def query_of(relations: tuple[int, ...], entity: int) -> str:
    """``r2 of r5 of e9``."""
    return "".join(f"r{relation} of " for relation in relations) + f"e{entity}"


class TwoHop:
    """See the module.

    Args:
        shape: of it.
        seed: of facts, of what models know, of who is dear.

    Attributes:
        fact_RE: the entity that is r of e.
        good: relations of each model; of the generalist, which is the last, none.
        prices: of a million completion tokens of each model.
        lengths: words of its answers.
    """

    def __init__(self, shape: Shape | None = None, *, seed: int = 0) -> None:
        self.shape, self.seed = shape or Shape(), seed
        shape, draw = self.shape, np.random.default_rng([seed, 0x2409])
        self.fact_RE = draw.integers(0, shape.entities, (shape.relations, shape.entities))
        # Every second expert is good at the next one's relation too, so that some may be asked of two, at two prices.
        self.good: list[tuple[int, ...]] = [
            tuple(dict.fromkeys((number % shape.relations, (number + number % 2) % shape.relations)))
            for number in range(shape.experts)
        ]
        self.good.append(())
        steps = np.linspace(0, 1, shape.experts)[draw.permutation(shape.experts)]
        levels = [*steps.tolist(), 1.0]
        self.prices = [round(shape.cheapest + level * (shape.dearest - shape.cheapest), 1) for level in levels]
        self.lengths = [round(shape.shortest + level * (shape.longest - shape.shortest)) for level in levels]
        order_E = draw.permutation(shape.entities)
        cut = round(shape.held_out * shape.entities)
        self._of_split = {"test": order_E[:cut], "train": order_E[cut:]}

    @property
    def num_models(self) -> int:
        """Experts, and the generalist."""
        return self.shape.experts + 1

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that facts, questions, descriptions and models have."""
        shape = self.shape
        words = ["of", "?", "good", "at", "all", "price", ";", UNKNOWN, "None", *FILLER]
        words += [f"r{number}" for number in range(shape.relations)] + [
            f"e{number}" for number in range(shape.entities)
        ]
        return tuple(dict.fromkeys([*words, *(f"{price}" for price in sorted(set(self.prices)))]))

    # Questions

    def num_questions(self, split: Split) -> int:
        """Of a split: as many of two hops as of one."""
        return 2 * self.shape.relations * len(self._of_split[split])

    def question(self, number: int, split: Split = "train") -> Question:
        """The n-th question of a split; even ones have one hop, odd ones two. Raises InputError for another number."""
        if not 0 <= number < self.num_questions(split):
            raise InputError(f"question {number} is not there; the split has {self.num_questions(split)}")
        place, is_two = divmod(number, 2)
        row, relation = divmod(place, self.shape.relations)
        entity = int(self._of_split[split][row])
        relations: tuple[int, ...] = (relation,)
        if is_two:
            draw = np.random.default_rng([self.seed, 0x2410, entity, relation])
            relations = (int(draw.integers(self.shape.relations)), relation)
        return Question(relations, entity, self.follow(relations, entity))

    def follow(self, relations: tuple[int, ...], entity: int) -> int:
        """The right answer."""
        for relation in reversed(relations):
            entity = int(self.fact_RE[relation, entity])
        return entity

    # Models

    def about(self, model: int) -> str:
        """The description of a model."""
        good = " ".join(f"r{relation}" for relation in self.good[model]) or "all"
        return f"good at {good} ; price {self.prices[model]}"

    def says(self, model: int, relation: int, entity: int) -> int:
        """What a model holds r of e for."""
        right = int(self.fact_RE[relation, entity])
        is_expert = model < self.shape.experts
        share = self.shape.general
        if is_expert:
            share = self.shape.known if relation in self.good[model] else self.shape.unknown
        # Two numbers of (seed, model, fact), the same wherever and whenever it is asked.
        digest = hashlib.blake2b(f"{self.seed} {model} {relation} {entity}".encode(), digest_size=16).digest()
        draw, other = (int.from_bytes(part, "big") for part in (digest[:8], digest[8:]))
        if draw / 2**64 < share:
            return right
        return (right + 1 + other % (self.shape.entities - 1)) % self.shape.entities

    def answer(self, model: int, query: str) -> int | None:
        """The entity that a model answers a query of one hop or two with; None where it is neither."""
        match = _QUERY.fullmatch(query)
        if match is None:
            return None
        relations, entity = [int(one) for one in _FACT.findall(match[1])], int(match[2])
        if entity >= self.shape.entities or max(relations) >= self.shape.relations:
            return None
        for relation in reversed(relations):
            entity = self.says(model, relation, entity)
        return entity

    def reply(self, model: int, query: str) -> Reply:
        """What a model says, in as many words as it usually does; they are its tokens."""
        answer = self.answer(model, query)
        words = [UNKNOWN if answer is None else f"e{answer}"]
        words += [FILLER[place % len(FILLER)] for place in range(self.lengths[model] - 1)]
        return Reply(" ".join(words), len(query.split()), len(words))

    def pool(self, names: Mapping[str, int]) -> FunctionPool:
        """Models by the names of an episode."""
        return FunctionPool(
            lambda name, query: self.reply(names[name], query),
            {name: Price(self.prices[model]) for name, model in names.items()},
        )

    # Those who know the world

    def baseline(self, name: str, question: Question, *, seed: int = 0) -> Played:
        """Somebody who needs not be trained.

        Args:
            name: ``random`` asks a model drawn anew for each hop; ``single_oracle`` asks one model the whole question, one that is right if
                any is, the cheapest of those; ``generalist`` asks the generalist the whole question; ``informed`` asks for each hop the
                cheapest of the models that are said to be good at it.
            question: that is asked.
            seed: of what is drawn.

        Raises InputError for another name.
        """
        if name not in BASELINES:
            raise InputError(f"no baseline is called {name!r}; there are {', '.join(BASELINES)}")
        if name in ("single_oracle", "generalist"):
            query = query_of(question.relations, question.entity)
            models = range(self.num_models) if name == "single_oracle" else [self.shape.experts]
            ranked = sorted(models, key=lambda model: (self.answer(model, query) != question.answer, self._cost(model)))
            return Played(self.answer(ranked[0], query), (ranked[0],), self._cost(ranked[0]))
        draw = np.random.default_rng([self.seed, 0x2411, seed])
        entity, asked = question.entity, []
        for relation in reversed(question.relations):
            known = [model for model, good in enumerate(self.good) if relation in good] or [self.shape.experts]
            model = int(draw.integers(self.num_models)) if name == "random" else min(known, key=self._cost)
            entity = self.says(model, relation, entity)
            asked.append(model)
        return Played(entity, tuple(asked), sum(self._cost(model) for model in asked))

    def _cost(self, model: int) -> float:
        return self.prices[model] * self.lengths[model]
