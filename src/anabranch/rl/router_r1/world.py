"""Router-R1 as a world of tokens: the router writes turns, asks models of a pool, is told what they say, and answers.

An episode is `anabranch.routers.router_r1.Episode`, the same that the gateway's program plays, so that what is learned here is what is done
there. Turns are tokenised by being written: ids are those that were drawn. Only what the world writes is tokenised, part by part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import AnabranchError, ConfigError, InputError
from anabranch.rl.router_r1.words import word_tokenizer
from anabranch.rl.tokens.world import Outcome, Split, Tokens, TokenWorld, Told
from anabranch.routers.router_r1 import CostWindow, Episode, Rules, exact_match, raw_cost, total_reward
from anabranch.routers.router_r1.environment import RoutePool
from anabranch.routers.router_r1.grammar import TAGS
from anabranch.routers.router_r1.prompts import router_prompt
from anabranch.routers.router_r1.two_hop import Question, Shape, TwoHop, query_of

__all__ = ["INSTRUCTION", "NAMES", "RoutedPlay", "TwoHopPlay", "TwoHopWorld"]

# Of the small world, whose words are its own; the paper's is for models that read English.
INSTRUCTION = "{models}"
# What models may be called; which is called what is drawn for every episode.
NAMES = tuple(f"m{number}" for number in range(16))
_ENDS = ("</search>", "</route>", "</answer>")
# Tokens that are looked at for an end.
_TAIL = 12


@dataclass
class Asking:
    """What an episode has asked so far.

    Attributes:
        cost: raw.
        invalid: turns in which nothing could be done.
        models: numbers of the models that were asked, with what of each.
    """

    cost: float
    invalid: int
    models: list[tuple[str, str]]


class RoutedPlay:
    """An episode with a pool, see `anabranch.rl.tokens.Play`.

    Args:
        tokenizer: of the policy.
        prompt: text that the router goes on from.
        episode: not begun.
        pool: that is asked.

    Attributes:
        asking: what was asked.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, episode: Episode, pool: RoutePool) -> None:
        self.prompt: Tokens = tuple(tokenizer.encode_prompt(prompt))
        self.episode, self._tokenizer, self._pool = episode, tokenizer, pool
        self.asking = Asking(0.0, 0, [])

    def ends(self, turn: Sequence[int]) -> bool:
        """At the end of a question, of an answer, or of the text."""
        if turn[-1] in self._tokenizer.stop_ids:
            return True
        if ">" not in self._tokenizer.decode(turn[-1:], skip_special=False):
            return False
        tail = self._tokenizer.decode(turn[-_TAIL:], skip_special=False)
        return any(end in tail for end in _ENDS)

    def step(self, turn: Tokens) -> Told:
        """Ask what the turn asks. A model that fails has said nothing."""
        episode = self.episode
        before = len(episode.parts)
        asked = episode.feed(self._tokenizer.decode(turn))
        if asked is not None:
            self.asking.models.append((asked.model, asked.query))
            try:
                reply = self._pool.reply(asked.model, asked.query)
                price = self._pool.prices[asked.model]
                call = (reply.prompt_tokens, reply.completion_tokens, price.prompt, price.completion)
                self.asking.cost += raw_cost([call])
                episode.inform(reply.text)
            except AnabranchError:
                episode.inform(None)
        self.asking.invalid += episode.actions[-1].startswith(("invalid", "unanswered"))
        told = "".join(text for text, is_router in episode.parts[before:] if not is_router)
        return Told(tuple(self._tokenizer.encode(told, parse_special=False)), episode.is_done)

    def outcome(self) -> Outcome:
        """Form, answer and cost; what they are worth is the world's business."""
        return Outcome(0.0, {}, self)


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
    ) -> None:
        super().__init__(tokenizer, prompt, episode, pool)
        self.named, self.question = named, question


class TwoHopWorld(TokenWorld, kind="two_hop"):
    """Router-R1 in `TwoHop`: which model is called what, and the order of descriptions, is drawn for every question."""

    @configclass
    class Config(TokenWorld.Config):
        """The world, and what trajectories are worth.

        Attributes:
            entities, relations, experts: see `Shape`.
            seed: of the world.
            hidden: number of an expert that is not in the pool; None for all.
            alpha: weight of the cost.
            format_reward: a broken form is worth -1; without (an ablation) it is not looked at.
            cost_only_if_correct: see `total_reward`.
            window: costs by which a cost is judged.
            max_turns, information_tokens: see `Rules`.
            turn_tokens: most of a turn.
        """

        entities: Size = Field(default=400, ge=5)
        relations: Size = Field(default=6, ge=1)
        experts: Size = Field(default=6, ge=1)
        seed: int = Field(default=0, ge=0)
        hidden: int | None = Field(default=None, ge=0)
        alpha: float = Field(default=0.0, ge=0, le=1)
        format_reward: bool = True
        cost_only_if_correct: bool = True
        window: Size = Field(default=1000, ge=1)
        max_turns: int = Field(default=4, ge=0, le=64)
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
        self.vocab_size, self.turn_tokens = self.tokenizer.vocab_size, config.turn_tokens
        self.num_questions, self.num_tests = (self.facts.num_questions(split) for split in ("train", "test"))
        self.window = CostWindow(config.window)

    def play(self, question: int, *, seed: int, split: Split = "train") -> TwoHopPlay:
        """See `TokenWorld`."""
        asked, names = self.facts.question(question, split), self.names(seed)
        prompt, episode = self._prompt(asked, names), self._episode(asked, names)
        return TwoHopPlay(self.tokenizer, prompt, episode, self.facts.pool(names), names, asked)

    def names(self, seed: int) -> dict[str, int]:
        """The models of an episode by their names, in the order in which they are described."""
        draw = np.random.default_rng(seed)
        models = [model for model in range(self.facts.num_models) if model != self.config.hidden]
        order, names = draw.permutation(models), draw.permutation(len(NAMES))
        return {NAMES[name]: int(model) for name, model in zip(names, order, strict=False)}

    def _prompt(self, asked: Question, names: Mapping[str, int]) -> str:
        about = {name: self.facts.about(model) for name, model in names.items()}
        return router_prompt(asked.text, list(names), about, instruction=INSTRUCTION)

    def _episode(self, asked: Question, names: Mapping[str, int]) -> Episode:
        rules = Rules(max_turns=self.config.max_turns, information_tokens=self.config.information_tokens)
        return Episode(asked.text, rules, list(names))

    # What it is worth

    def rewards(self, outcomes: Sequence[Outcome]) -> list[float]:
        """By form, answer and cost; costs are judged in the order of the episodes."""
        made = []
        for outcome in outcomes:
            play = outcome.facts
            is_formed = not self.config.format_reward or not play.episode.faults()
            made.append(
                total_reward(
                    is_formed,
                    _is_right(play),
                    self.window.reward(play.asking.cost),
                    self.config.alpha,
                    cost_only_if_correct=self.config.cost_only_if_correct,
                )
            )
        return made

    def measured(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Exact matches, calls and costs, of all and by hops; and how many questions went to a model that is said to be good at them."""
        plays = [outcome.facts for outcome in outcomes]
        told = {"exact_match": _mean(map(_is_right, plays))}
        for hops, name in ((1, "one_hop"), (2, "two_hop")):
            own = [play for play in plays if play.question.hops == hops]
            told[f"exact_match_{name}"] = _mean(map(_is_right, own))
            told[f"calls_{name}"] = _mean(len(play.asking.models) for play in own)
        asked = [self._is_good(play, name, query) for play in plays for name, query in play.asking.models]
        return told | {
            "calls": _mean(len(play.asking.models) for play in plays),
            "raw_cost": _mean(play.asking.cost for play in plays),
            "well_formed": _mean(not play.episode.faults() for play in plays),
            "invalid_turns": _mean(play.asking.invalid / max(play.episode.turns, 1) for play in plays),
            "to_experts": _mean(asked),
        }

    def _is_good(self, play: TwoHopPlay, name: str, query: str) -> bool:
        """Whether a question of one hop went to a model that is said to be good at it."""
        words = query.split()
        good = self.facts.good[play.named[name]]
        return len(words) == 3 and words[0][1:].isdigit() and int(words[0][1:]) in good

    def share_to(self, plays: Sequence[TwoHopPlay], model: int) -> float:
        """Of the questions about relations that a model is good at, how many went to it."""
        wanted = {f"r{relation}" for relation in self.facts.good[model]}
        sent = [
            play.named[name] == model
            for play in plays
            for name, query in play.asking.models
            if query.split()[:1] and query.split()[0] in wanted
        ]
        return _mean(sent)

    # What to begin with

    def traces(self, count: int, *, seed: int) -> list[tuple[Tokens, tuple[tuple[Tokens, bool], ...]]]:
        """Episodes of somebody who knows the language, and asks a model drawn anew for each hop: nothing of routing is in them."""
        draw = np.random.default_rng([seed, 0x2412])
        return [self._trace(int(draw.integers(self.num_questions)), draw) for _ in range(count)]

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
        parts.append(
            (tuple(self.tokenizer.encode(f"<think> know e{entity} </think> <answer> e{entity} </answer>")), True)
        )
        return play.prompt, tuple(parts)

    # What later rewards hang on

    def state_dict(self) -> dict[str, Any]:
        """The window of costs."""
        return {"window": self.window.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.window.load_state(state["window"])

    def strategy(self) -> dict[str, Any]:
        """What a gateway's config says of the router that learned here: fields of `anabranch.routers.router_r1.RouterR1`."""
        return {
            "kind": "router_r1",
            "instruction": INSTRUCTION,
            "max_turns": self.config.max_turns,
            "turn_tokens": self.config.turn_tokens,
            "information_tokens": self.config.information_tokens,
            "temperature": 0.0,
        }


def _is_right(play: TwoHopPlay) -> float:
    return exact_match(play.episode.last_answer, [f"e{play.question.answer}"])


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed) if listed else 0.0
