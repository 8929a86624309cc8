"""The two-hop world: models that know different facts at different prices, questions that need one fact or two, and who answers them how.

    world = TwoHop(Shape(), seed=0)
    question = world.question(17, "train")             # "r2 of r5 of e9": what is r2 of what is r5 of e9
    pool = world.pool(names={"m3": 0, ...})            # a `RoutePool`: models 0, 1, ... by the names of an episode
    pool.reply("m3", "r5 of e9")                       # Reply("e31 as far as I know", completion_tokens=6)

A fact is r of e, one entity. Experts come in pairs that are good at the same relations: a better and dearer one, and a lesser and
cheaper one (`PAIRS`). So relations trade right answers for money, at another rate for each pair: the larger the weight of the cost, the
more of them are worth a cheaper model. About all other relations experts are seldom right (``unknown``), so that the cheapest model of
all is no answer to everything. The generalist, the last model, knows some of all, and is as dear as the dearest. Whether a model is right
about a fact is drawn once and for all from (seed, model, fact), so that nothing is learned by asking again. Asked for two hops at once a
model goes from fact to fact as it knows them. All of it follows from the seed; no torch, no text of anybody.
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

__all__ = ["BASELINES", "PAIRS", "VERSION", "Grade", "Played", "Question", "Shape", "TwoHop"]

# Another whenever a world of the same shape and seed is another one: what was learned in the one is not gone on with in the other.
VERSION = 2
BASELINES = ("random", "single_oracle", "generalist", "informed")
# What fills an answer up to its length.
FILLER = ("as", "far", "as", "I", "know", "and", "I", "may", "be", "wrong", "though", "so", "ask", "others", "too")
UNKNOWN = "unknown"
_FACT = re.compile(r"r(\d{1,6})")
_QUERY = re.compile(r"\s*+((?:r\d{1,6}\s++of\s++){1,2})e(\d{1,6})\s*+\??+\s*+")
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Grade:
    """What a model is like.

    Attributes:
        known: how often it is right, 0 to 1: an expert on its relations, the generalist on all.
        price: dollars of a million completion tokens.
        words: of an answer, 1 to 500.

    Raises InputError for one that cannot be.
    """

    known: float
    price: float
    words: int

    def __post_init__(self) -> None:
        if not 0 <= self.known <= 1:
            raise InputError(f"known is {self.known!r}; it must be from 0 to 1")
        if not 0 <= self.price < float("inf"):
            raise InputError(f"price is {self.price!r}; it must be a number of at least 0")
        if type(self.words) is not int or not 1 <= self.words <= 500:
            raise InputError(f"an answer has {self.words!r} words; use a whole number from 1 to 500")


# The better and the lesser expert of each pair. By the reward of Router-R1 the lesser is worth more in the first pair from a weight of the
# cost a little above 0, in the second from about .7, in the third from about .9. In the fourth there is but one by default, which has to be
# asked at any weight: so costs are judged by nearly the same range whatever is chosen in the others.
PAIRS = (
    (Grade(0.985, 1.5, 20), Grade(0.965, 0.5, 6)),
    (Grade(0.97, 1.8, 30), Grade(0.55, 0.5, 10)),
    (Grade(0.97, 1.8, 30), Grade(0.27, 1.0, 20)),
    (Grade(0.97, 1.8, 30), Grade(0.55, 0.5, 10)),
)
# Which pair is good at which relation, before the latter are shuffled: the last two of four at few.
_DEALT = (0, 1, 2, 3, 0, 1, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the world is, and how good its models are.

    Attributes:
        entities, relations: e0, e1, ..., r0, r1, ...
        experts: beside the generalist; the last is alone where their number is odd.
        pairs: grades of experts, the better one first; from the first again where there are more pairs of experts.
        unknown: how often an expert is right on relations that it is not good at.
        general: what the generalist is like.
        held_out: share of entities whose questions are for tests alone.

    Raises InputError for a world that cannot be.
    """

    entities: int = 400
    relations: int = 8
    experts: int = 7
    pairs: tuple[tuple[Grade, Grade], ...] = PAIRS
    unknown: float = 0.02
    general: Grade = Grade(0.75, 1.8, 30)
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for name, least, most in (("entities", 5, 10**5), ("relations", 1, 1000), ("experts", 1, 1000)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name} is {value!r}; it must be a whole number from {least} to {most:,}")
        if not 0 <= self.unknown <= 1:
            raise InputError(f"unknown is {self.unknown!r}; it must be from 0 to 1")
        if not self.pairs:
            raise InputError("pairs is empty; experts need at least one pair of grades")
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
        seed: of facts, and of who is good at what.

    Attributes:
        fact_RE: the entity that is r of e.
        good: relations of each model; of the generalist, which is the last, none.
        grades: what each model is like.
        prices: of a million completion tokens of each model.
        lengths: words of its answers.
    """

    def __init__(self, shape: Shape | None = None, *, seed: int = 0) -> None:
        self.shape, self.seed = shape or Shape(), seed
        shape, draw = self.shape, np.random.default_rng([seed, 0x2409])
        self.fact_RE = draw.integers(0, shape.entities, (shape.relations, shape.entities))
        pairs, order = -(-shape.experts // 2), draw.permutation(shape.relations).tolist()
        dealt: list[list[int]] = [[] for _ in range(pairs)]
        for place, relation in enumerate(order):
            dealt[_DEALT[place % len(_DEALT)] % pairs].append(relation)
        # Where there are few, some pairs are good at the same.
        of_pair = [tuple(sorted(own or [order[pair % shape.relations]])) for pair, own in enumerate(dealt)]
        self.good: list[tuple[int, ...]] = [*(of_pair[number // 2] for number in range(shape.experts)), ()]
        self.grades = [
            *(shape.pairs[number // 2 % len(shape.pairs)][number % 2] for number in range(shape.experts)),
            shape.general,
        ]
        self.prices, self.lengths = [each.price for each in self.grades], [each.words for each in self.grades]
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

    def knows(self, model: int, relation: int) -> float:
        """How often a model is right about a relation, 0 to 1."""
        is_good = model == self.shape.experts or relation in self.good[model]
        return self.grades[model].known if is_good else self.shape.unknown

    def says(self, model: int, relation: int, entity: int) -> int:
        """What a model holds r of e for."""
        right = int(self.fact_RE[relation, entity])
        share = self.knows(model, relation)
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
                best of the models that are said to be good at it, which are the dearest.
            question: that is asked.
            seed: of what is drawn.

        Raises InputError for another name.
        """
        if name not in BASELINES:
            raise InputError(f"no baseline is called {name!r}; there are {', '.join(BASELINES)}")
        if name in ("single_oracle", "generalist"):
            query = query_of(question.relations, question.entity)
            models = range(self.num_models) if name == "single_oracle" else [self.shape.experts]
            ranked = sorted(models, key=lambda model: (self.answer(model, query) != question.answer, self.cost(model)))
            return Played(self.answer(ranked[0], query), (ranked[0],), self.cost(ranked[0]))
        draw = np.random.default_rng([self.seed, 0x2411, seed])
        entity, asked = question.entity, []
        for relation in reversed(question.relations):
            model = int(draw.integers(self.num_models)) if name == "random" else self._best(relation)
            entity = self.says(model, relation, entity)
            asked.append(model)
        return Played(entity, tuple(asked), sum(self.cost(model) for model in asked))

    def _best(self, relation: int) -> int:
        known = [model for model, good in enumerate(self.good) if relation in good] or [self.shape.experts]
        return max(known, key=lambda model: self.knows(model, relation))

    def cost(self, model: int) -> float:
        """Of a call, raw."""
        return self.prices[model] * self.lengths[model]
