"""Router-R1 as a world of tokens: the router writes turns, asks models of a pool, is told what they say, and answers.

An episode is `anabranch.routers.router_r1.Episode`, the same that the gateway's program plays, so that what is learned here is what is done
there. Turns are tokenised by being written: ids are those that were drawn. Only what the world writes is tokenised, part by part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import AnabranchError, LimitError
from anabranch.rl.tokens.world import Outcome, Tokens, TokenWorld, Told
from anabranch.routers.router_r1 import CostWindow, Episode, Rules, exact_match, raw_cost, token_f1, total_reward
from anabranch.routers.router_r1.environment import RoutePool
from anabranch.routers.router_r1.reward import Basis

__all__ = ["Routed", "RoutedPlay", "RoutedWorld", "mean_of"]

_ENDS = ("</search>", "</route>", "</answer>")
# Tokens that are looked at for an end.
_TAIL = 12


@dataclass(frozen=True)
class Routed:
    """What became of an episode: plain values, which processes hand to each other.

    Attributes:
        asked: the question.
        wanted: answers that are right.
        answer: that was given; None where none was.
        judged: the last answer in the text, as the reward reads it.
        faults: rules of the form that are broken.
        cost: raw.
        invalid: turns in which nothing could be done.
        turns: all of them.
        calls: models that were asked, by their names, with what of each.
    """

    asked: str
    wanted: tuple[str, ...]
    answer: str | None
    judged: str | None
    faults: tuple[str, ...]
    cost: float
    invalid: int
    turns: int
    calls: tuple[tuple[str, str], ...]


class RoutedPlay:
    """An episode with a pool, see `anabranch.rl.tokens.Play`.

    Args:
        tokenizer: of the policy.
        prompt: text that the router goes on from.
        episode: not begun.
        pool: that is asked.
        wanted: answers that are right.
        basis: what calls cost.
        one_colon: a question with a further colon is a fault.

    Attributes:
        cost, invalid, calls: see `Routed`; so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        episode: Episode,
        pool: RoutePool,
        wanted: Sequence[str] = (),
        *,
        basis: Basis = "completion",
        one_colon: bool = True,
    ) -> None:
        self.prompt: Tokens = tuple(tokenizer.encode_chat(prompt))
        self.episode, self.wanted = episode, tuple(wanted)
        self._tokenizer, self._pool, self._basis = tokenizer, pool, basis
        self._one_colon = one_colon
        self.cost, self.invalid = 0.0, 0
        self.calls: list[tuple[str, str]] = []

    def ends(self, turn: Sequence[int]) -> bool:
        """At the end of a question, of an answer, or of the text."""
        if turn[-1] in self._tokenizer.stop_ids:
            return True
        if ">" not in self._tokenizer.decode(turn[-1:], skip_special=False):
            return False
        tail = self._tokenizer.decode(turn[-_TAIL:], skip_special=False)
        return any(end in tail for end in _ENDS)

    def step(self, turn: Tokens) -> Told:
        """Ask what the turn asks. A model that fails has said nothing. Raises LimitError where nobody may be asked any more."""
        episode = self.episode
        before = len(episode.parts)
        asked = episode.feed(self._tokenizer.decode(turn))
        if asked is not None:
            self.calls.append((asked.model, asked.query))
            try:
                reply = self._pool.reply(asked.model, asked.query)
                price = self._pool.prices[asked.model]
                call = (reply.prompt_tokens, reply.completion_tokens, price.prompt, price.completion)
                self.cost += raw_cost([call], self._basis)
                episode.inform(reply.text)
            except LimitError:
                raise
            except AnabranchError:
                episode.inform(None)
        self.invalid += episode.actions[-1].startswith(("invalid", "unanswered"))
        told = "".join(text for text, is_router in episode.parts[before:] if not is_router)
        return Told(tuple(self._tokenizer.encode(told, parse_special=False)), episode.is_done)

    def outcome(self) -> Outcome:
        """Form, answer and cost; what they are worth is the world's business."""
        return Outcome(0.0, {}, Routed(**self._facts()))

    def _facts(self) -> dict[str, Any]:
        episode = self.episode
        return {
            "asked": episode.question,
            "wanted": self.wanted,
            "answer": episode.answer,
            "judged": episode.last_answer,
            "faults": episode.faults(one_colon=self._one_colon),
            "cost": self.cost,
            "invalid": self.invalid,
            "turns": episode.turns,
            "calls": tuple(self.calls),
        }


class RoutedWorld(TokenWorld):
    """What worlds of Router-R1 have in common: rules, and what trajectories are worth."""

    @configclass
    class Config(TokenWorld.Config):
        """Rules and rewards.

        Attributes:
            alpha: weight of the cost.
            measure: what an answer is judged by, exact ``match`` or the ``f1`` of its words.
            format_reward: a broken form is worth -1; without (an ablation) it is not looked at.
            one_colon: a question to a model that has a further colon breaks the form, as in the code; it is asked whole either way.
            cost_only_if_correct: see `total_reward`.
            window: costs by which a cost is judged.
            cost_basis: tokens of the ``completion`` alone cost something (the paper's code), or ``all``, by their prices.
            max_turns, information_tokens: see `Rules`.
            turn_tokens: most of a turn.
        """

        alpha: float = Field(default=0.0, ge=0, le=1)
        measure: Literal["match", "f1"] = "match"
        format_reward: bool = True
        one_colon: bool = True
        cost_only_if_correct: bool = True
        window: Size = Field(default=1000, ge=1)
        cost_basis: Basis = "completion"
        max_turns: int = Field(default=4, ge=0, le=64)
        information_tokens: Size = Field(default=600, ge=1)
        turn_tokens: Size = Field(default=1024, ge=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.turn_tokens = config.turn_tokens
        self.window = CostWindow(config.window)

    @property
    def rules(self) -> Rules:
        """Of episodes. What a model said is cut to words here, as in the gateway, which knows no tokenizer of the router's."""
        return Rules(max_turns=self.config.max_turns, information_tokens=self.config.information_tokens)

    def rewards(self, outcomes: Sequence[Outcome]) -> list[float]:
        """By form, answer and cost; costs are judged in the order of the episodes."""
        config, made = self.config, []
        judge = exact_match if config.measure == "match" else token_f1
        for outcome in outcomes:
            facts: Routed = outcome.facts
            made.append(
                total_reward(
                    not config.format_reward or not facts.faults,
                    judge(facts.judged, facts.wanted),
                    self.window.reward(facts.cost),
                    config.alpha,
                    cost_only_if_correct=config.cost_only_if_correct,
                )
            )
        return made

    def measured(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Exact matches, calls, costs, and how many trajectories and turns are as they should be."""
        facts: list[Routed] = [outcome.facts for outcome in outcomes]
        return {
            "exact_match": mean_of(is_right(each) for each in facts),
            "calls": mean_of(len(each.calls) for each in facts),
            "raw_cost": mean_of(each.cost for each in facts),
            "well_formed": mean_of(not each.faults for each in facts),
            "invalid_turns": mean_of(each.invalid / max(each.turns, 1) for each in facts),
        }

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """See `TokenWorld`."""
        facts: Routed = outcome.facts
        return {
            "question": facts.asked,
            "answer": facts.judged or "",
            "wanted": " | ".join(facts.wanted),
            "turns": facts.turns,
            "calls": len(facts.calls),
            "raw_cost": facts.cost,
            "faults": "; ".join(facts.faults),
        }

    # What later rewards hang on

    def state_dict(self) -> dict[str, Any]:
        """The window of costs."""
        return {"window": self.window.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.window.load_state(state["window"])

    # What a gateway needs

    def about(self) -> dict[str, str]:
        """Models by name, with their descriptions."""
        raise NotImplementedError  # abstract

    def strategy(self) -> dict[str, Any]:
        """What a gateway's config says of the router that learned here: fields of `anabranch.routers.router_r1.RouterR1`."""
        return {
            "kind": "router_r1",
            "max_turns": self.config.max_turns,
            "turn_tokens": self.config.turn_tokens,
            "information_tokens": self.config.information_tokens,
            "temperature": 0.0,
        }


def is_right(facts: Routed) -> float:
    """Exact match."""
    return exact_match(facts.judged, facts.wanted)


def mean_of(values: Iterable[float]) -> float:
    """Their mean; 0 of none."""
    listed = [float(value) for value in values]
    return sum(listed) / len(listed) if listed else 0.0
