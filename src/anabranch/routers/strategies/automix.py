"""AutoMix: the model that answered is asked whether its answer is right, and a decision under uncertainty is made of its votes.

    v    = share of k self-verifications that say "correct"
    b(s) = P(s | v_1 ... v_j),  by Bayes' rule from P(s) and P(v_i | s);     s says which models of the chain are right on this query
    give answer j     if E[quality_j | b] >= the best that can come of asking on
    ask model j + 1   otherwise: its value is -trade_off cost_j+1 + the better of giving its answer as it is, and of verifying it,
    which costs too, and choosing again

Source: Madaan et al. 2023, AutoMix (arXiv 2310.12963, section 3): few-shot self-verification, and a router that treats correctness
as the hidden state of a POMDP with the votes as observations. States, observations and means are counted on recorded outcomes,
each with one more count (Laplace). The horizon is the chain's length, so the POMDP is solved exactly by looking ahead.
``rule="threshold"`` is the paper's simpler router: give the answer if v is at least a threshold (chosen as in `escalate`).

Recorded data must carry the signal ``votes`` (`Recorded.signals`); live, it is a `Program`, which lets each model verify its own draft; an
answer that is not worth verifying is given as it comes. A self-verification costs ``vote_cost`` of an answer; one that could not be made
tells nothing: of c votes that came the chance is that of drawing them from k, P(v_i | s) being known.
"""
# Shapes: N queries, K models of the chain, S = 2^K states, V = k + 1 levels of votes

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.program import Answered, Ask, ProgramRequest
from anabranch.routers.contract.query import Decision, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Played, ordered, playable
from anabranch.routers.score_scale import UNIT, Scale, ScoreScale
from anabranch.routers.strategies.chained import Chained, Draft
from anabranch.routers.strategies.escalate import run
from anabranch.routers.strategies.marks import unmarked
from anabranch.routers.strategies.semantic import listed
from anabranch.routers.strategies.training import means, training_set

VERIFY = """Somebody was asked the question between the first marks and gave the answer between the second.

<<<
{question}
>>>

<<<
{answer}
>>>

Is the answer correct? Check it against the question step by step, in your head. Then reply with one word, Correct or Incorrect."""


class Share(float):
    """Share of verifications that said "correct"; NaN where none came.

    Attributes:
        came: of how many.
    """

    came: int

    def __new__(cls, correct: int, came: int) -> Self:
        """Of those that came, so many said "correct"."""
        share = super().__new__(cls, correct / came if came else math.nan)
        share.came = came
        return share


class AutoMix(Chained, kind="automix"):
    """Self-verification, then the action of largest expected utility."""

    @configclass
    class Config(Chained.Config):
        """Verification and rule.

        Attributes:
            rule: ``pomdp`` or ``threshold``.
            votes: k.
            vote_cost: of one self-verification, as a share of an answer's cost: it reads as much and writes next to nothing.
            temperature: of verifications.
            correct: where on the scale, from 0 to 1, an answer begins to count as right.
            scale: scores of the worst and the best answer in recorded outcomes; others are refused by ``pomdp``.
        """

        rule: Literal["pomdp", "threshold"] = "pomdp"
        votes: int = Field(default=8, ge=1)
        vote_cost: float = Field(default=0.1, ge=0)
        temperature: float = Field(default=0.7, gt=0)
        correct: float = Field(default=0.5, gt=0, le=1)
        scale: Scale = UNIT

    needs_fit = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ScoreScale.of(config.scale)
        self.models: tuple[str, ...] = ()
        self.prior_S, self.quality_SK, self.cost_K = np.zeros(0), np.zeros((0, 0)), np.zeros(0)
        self.vote_KSV = np.zeros((0, 0, 0))
        # Few combinations of votes occur, so each is decided once.
        self._decided: dict[tuple[Any, ...], Any] = {}

    @property
    def sender_knobs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of a cascade, where it is one; the POMDP is solved for one trade-off."""
        return super().sender_knobs if self.config.rule == "threshold" else ()

    def calls_for(self, is_last: bool) -> float:
        """An answer and k verifications, but for the last model."""
        return 1.0 if is_last else 1.0 + self.config.votes * self.config.vote_cost

    def confidences(self, data: Recorded) -> np.ndarray:
        """The recorded votes."""
        if "votes" not in data.signals:
            raise DataError(
                f"automix needs the signal 'votes' of recorded answers; the data have {sorted(data.signals) or 'none'}"
            )
        return data.signals["votes"]

    # -- learning

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Count states, votes and means. Raises DataError without votes, costs, or a row where all the chain is known."""
        if self.config.rule == "threshold":
            return super().fit(data, seed=seed)
        training_set(data, "automix", vector=False, cost=True)
        scale = ScoreScale.of(self.config.scale)
        scale.check(data)
        votes_NM = self.confidences(data)
        columns = self._columns(data)
        judged = columns[:-1]
        rows = np.flatnonzero(np.isfinite(data.score_NM[:, columns]).all(1) & np.isfinite(votes_NM[:, judged]).all(1))
        if not len(rows):
            raise DataError(
                "automix needs queries with the scores of the whole chain and the votes of all but its last model"
            )
        self.models = tuple(data.models[column] for column in columns)
        self._decided.clear()
        score_NK = data.score_NM[rows][:, columns]
        right_NK = scale.are_right(score_NK, self.config.correct)
        state_N = right_NK @ (1 << np.arange(len(columns)))
        num_states = 1 << len(columns)
        count_S = np.bincount(state_N, minlength=num_states).astype(float)
        self.prior_S = (count_S + 1) / (len(rows) + num_states)
        self.quality_SK = self._qualities(score_NK, right_NK, state_N, count_S)
        self.cost_K = means(data.cost_NM)[columns]  # type: ignore[arg-type]
        if not np.isfinite(self.cost_K).all():
            raise DataError(f"automix needs the cost of every model of its chain: {', '.join(self.models)}")
        self.vote_KSV = np.ones((len(judged), num_states, self.config.votes + 1))
        for place, column in enumerate(judged):
            np.add.at(self.vote_KSV[place], (state_N, self._levels(votes_NM[rows, column])), 1.0)
        self.vote_KSV /= self.vote_KSV.sum(axis=2, keepdims=True)
        return self

    def _columns(self, data: Recorded) -> list[int]:
        """Of the chain: the written one, or the cheapest model and the best one (and between them the next best of middling cost)."""
        if self.config.models:
            unknown = [name for name in self.config.models if name not in data.models]
            if unknown:
                raise InputError(
                    f"automix.models has {unknown[0]!r}, which is not among the recorded: {', '.join(data.models)}"
                )
            return [data.models.index(name) for name in self.config.models]
        assert data.cost_NM is not None
        cost_M, quality_M = means(data.cost_NM), means(data.score_NM)
        usable = [
            int(at)
            for at in np.argsort(cost_M, kind="stable")
            if np.isfinite(cost_M[at]) and np.isfinite(quality_M[at])
        ]
        rising = [
            at
            for place, at in enumerate(usable)
            if quality_M[at] > max((quality_M[one] for one in usable[:place]), default=-np.inf)
        ]
        middle = rising[1:-1][-1:] if self.config.max_length > 2 else []
        return list(dict.fromkeys([rising[0], *middle, rising[-1]]))[-self.config.max_length :]

    def _qualities(
        self, score_NK: np.ndarray, right_NK: np.ndarray, state_N: np.ndarray, count_S: np.ndarray
    ) -> np.ndarray:
        """Mean score of each model in each state, pulled by one count to its mean score when right, or wrong."""
        quality_SK = np.zeros((len(count_S), score_NK.shape[1]))
        for place in range(score_NK.shape[1]):
            right_N = right_NK[:, place]
            usual = [
                score_NK[right_N == flag, place].mean() if (right_N == flag).any() else score_NK[:, place].mean()
                for flag in (False, True)
            ]
            is_right_S = (np.arange(len(count_S)) >> place) & 1
            total_S = np.bincount(state_N, score_NK[:, place], minlength=len(count_S))
            quality_SK[:, place] = (total_S + np.array(usual)[is_right_S]) / (count_S + 1)
        return quality_SK

    def _levels(self, share_N: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(share_N * self.config.votes), 0, self.config.votes).astype(np.int64)

    # -- the POMDP

    def ask(self, place: int, belief_S: np.ndarray) -> float:
        """Value of asking the model at this place, at a belief: what it costs, and the best that can then be done."""
        blind = self.give(place, belief_S)
        return max(blind, self.verify(place, belief_S)) - self.price * float(self.cost_K[place])

    @property
    def price(self) -> float:
        """The trade-off; where money is no object, next to nothing, so that of two ways that are as good the cheaper is gone."""
        return max(self.config.trade_off, 1e-9 / max(float(self.cost_K.max()), 1e-300))

    def verify(self, place: int, belief_S: np.ndarray) -> float:
        """Value of letting the model verify its answer, then giving it or asking on. The last model's answer is given as it is."""
        if place == len(self.models) - 1:
            return -np.inf
        value = -self.price * self.config.votes * self.config.vote_cost * float(self.cost_K[place])
        for level in range(self.vote_KSV.shape[2]):
            joint_S = belief_S * self.vote_KSV[place, :, level]
            chance = float(joint_S.sum())
            value += chance * max(self.give(place, joint_S / chance), self.ask(place + 1, joint_S / chance))
        return value

    def give(self, place: int, belief_S: np.ndarray) -> float:
        """Value of giving the answer of the model at this place."""
        return float(belief_S @ self.quality_SK[:, place])

    def believe(self, votes: list[float], first: int = 0) -> np.ndarray:
        """b(s) after the votes of the models from ``first`` on; a vote that is not known (NaN) tells nothing."""
        belief_S = self.prior_S.copy()
        for place, share in enumerate(votes, start=first):
            if np.isfinite(share):
                belief_S *= self.vote_KSV[place] @ self._drawn_V(share)
        return belief_S / belief_S.sum()

    def _drawn_V(self, share: float) -> np.ndarray:
        """Chance of such votes where so many of all k say "correct": that of drawing those that came from them."""
        level, came = self._drawn(share)
        if came == self.config.votes:
            return np.eye(came + 1)[level]
        k = self.config.votes
        return np.array([math.comb(v, level) * math.comb(k - v, came - level) for v in range(k + 1)]) / math.comb(
            k, came
        )

    def _drawn(self, share: float) -> tuple[int, int]:
        """How many said "correct", of how many that came: of k, where that is not told."""
        came = min(getattr(share, "came", self.config.votes), self.config.votes)
        return int(np.clip(np.rint(share * came), 0, came)), came

    def first(self) -> int:
        """Place of the model to ask first: the one of largest value at the prior, of equals the earliest."""
        return self._once(
            ("first",), lambda: int(np.argmax([self.ask(place, self.prior_S) for place in range(len(self.models))]))
        )

    def verifies(self, votes: list[float], first: int = 0) -> bool:
        """Whether the model after those that voted verifies its answer; otherwise it is given as it is."""

        def decide() -> bool:
            place, belief_S = first + len(votes), self.believe(votes, first)
            return self.verify(place, belief_S) > self.give(place, belief_S)

        return self._once(("verifies", first, *self._known(votes)), decide)

    def accepts(self, votes: list[float], first: int = 0) -> bool:
        """Whether the answer of the last model that voted is given."""

        def decide() -> bool:
            place, belief_S = first + len(votes) - 1, self.believe(votes, first)
            return self.give(place, belief_S) >= self.ask(place + 1, belief_S)

        return self._once(("accepts", first, *self._known(votes)), decide)

    def _known(self, votes: list[float]) -> list[tuple[int, int]]:
        """As `_drawn`; of one that is not known, none came."""
        return [self._drawn(share) if np.isfinite(share) else (0, 0) for share in votes]

    def _once(self, key: tuple[Any, ...], decide: Callable[[], Any]) -> Any:
        if key not in self._decided:
            self._decided[key] = decide()
        return self._decided[key]

    # -- deciding

    def route(self, query: Query, pool: Pool) -> Decision:
        """The chain from the model that is worth asking first. Raises InputError before ``fit``, or if the pool has none of it."""
        if self.config.rule == "threshold":
            return super().route(query, pool)
        self._check()
        first = self.first()
        known = [name for name in self.models[first:] if name in pool.names]
        if not known:
            raise InputError(f"automix asks {', '.join(self.models[first:])}; the pool has {', '.join(pool.names)}")
        return Decision(
            candidates=ordered(pool, listed(known, pool)),
            strategy=self.name,
            reason=f"automix: {' then '.join(known)}",
            details={"chain": known, "skipped": list(self.models[:first])},
        )

    def _check(self) -> None:
        if not self.models:
            raise InputError("automix has not learned yet: fit it on recorded outcomes with votes")

    # -- answering

    step_name = "verified"

    async def is_judged(self, request: ProgramRequest, model: str, earlier: Sequence[Draft]) -> bool:
        """Whether the answer is verified: where the rule is the POMDP's, only if that is worth its price."""
        if self.config.rule == "threshold":
            return await super().is_judged(request, model, earlier)
        self._check()
        told = self._votes(model, earlier)
        # Solving it for votes that have not occurred takes a while where the chain is long.
        return told is not None and await asyncio.to_thread(self.verifies, *told)

    async def examine(self, request: ProgramRequest, model: str, found: Answered, ask: Ask) -> tuple[float, Facts]:
        """Let the model verify its answer k times. A verdict that cannot be read counts against the answer; one that did not come, not.

        All at once; those for which there was no room (of money, or at the model) one after another, until one does not come again, and
        as long as the rest of the chain has all the calls that it may want. NaN where none came.
        """
        text = VERIFY.format(question=unmarked(request.query.text), answer=unmarked(found.text))
        told = await asyncio.gather(*(self._verdict(model, text, ask) for _ in range(self.config.votes)))
        verdicts = [verdict for verdict in told if isinstance(verdict, bool)]
        again = sum(isinstance(verdict, AnabranchError) and verdict.is_for_room for verdict in told)
        wanted = self._later_calls(request, model)
        while again and ask.left > wanted:
            more = await self._verdict(model, text, ask)
            if not isinstance(more, bool):
                break
            verdicts.append(more)
            again -= 1
        missing = self.config.votes - len(verdicts)
        facts: Facts = {"votes": len(verdicts)} | ({"missing": missing} if missing else {})
        return Share(sum(verdicts), len(verdicts)), facts

    async def will_do(self, request: ProgramRequest, model: str, sure: float, earlier: Sequence[Draft]) -> bool:
        """By the belief after this vote and the earlier ones for the same request."""
        if self.config.rule == "threshold":
            return await super().will_do(request, model, sure, earlier)
        told = self._votes(model, earlier)
        assert told is not None
        votes, first = told
        return await asyncio.to_thread(self.accepts, [*votes, sure], first)

    def bar(self, request: ProgramRequest, model: str) -> Facts:
        """A threshold, where the rule is one."""
        return super().bar(request, model) if self.config.rule == "threshold" else {}

    def _votes(self, model: str, earlier: Sequence[Draft]) -> tuple[list[float], int] | None:
        """Votes of the models before this one, NaN for those without, and the place of the first; None if its answer is given as it is."""
        if model not in self.models[:-1]:
            return None
        place = self.models.index(model)
        first = min(self.first(), place)
        told = {draft.model: draft.confidence for draft in earlier}
        return [told.get(name, float("nan")) for name in self.models[first:place]], first

    def _later_calls(self, request: ProgramRequest, model: str) -> int:
        """The most calls of the models after this one in the chain: an answer each, and votes on all but the last's."""
        names, chain = request.names, request.decision.details["chain"]
        later = [name for name in names[names.index(model) + 1 :] if name in chain]
        return len(later) + self.config.votes * max(0, len(later) - 1)

    async def _verdict(self, model: str, text: str, ask: Ask) -> bool | AnabranchError:
        """Or why none came."""
        try:
            said = (await ask(model, text, max_tokens=8, temperature=self.config.temperature, purpose="judge")).text
        except AnabranchError as error:
            return error
        return re.fullmatch(r"\W*correct\W*", said.strip(), re.IGNORECASE) is not None

    # -- judging

    def play(self, data: Recorded, pool: Pool) -> Played:
        """Run the chain by the recorded votes, counting answers and verifications."""
        if self.config.rule == "threshold":
            return super().play(data, pool)
        self._check()
        first = self.first()
        there = {data.models[column] for column in playable(data, pool)}
        places = [place for place in range(first, len(self.models)) if self.models[place] in there]
        if not places:
            raise InputError(f"automix asks {', '.join(self.models[first:])}; none is recorded and in the pool")
        columns = [data.models.index(self.models[place]) for place in places]
        votes_NK = np.full((len(data), len(self.models) - first), np.nan)
        if len(places) > 1:
            votes_NK[:, np.array(places) - first] = self.confidences(data)[:, columns]
        accept_NK, calls_NK = np.ones((len(data), len(places)), bool), np.ones((len(data), len(places)))
        for at, place in enumerate(places[:-1]):
            votes = votes_NK[:, : place - first + 1].tolist()
            verifies_N = np.array([self.verifies(votes_K[:-1], first) for votes_K in votes], bool)
            accept_NK[:, at] = np.array([self.accepts(votes_K, first) for votes_K in votes], bool) | ~verifies_N
            calls_NK[:, at] += self.config.votes * self.config.vote_cost * verifies_N
        return run(data, columns, accept_NK, calls_NK)

    def knobs(self, data: Recorded) -> list[float]:
        """Trade-offs around what a dollar buys between the models of the chain."""
        if self.config.rule == "threshold":
            return super().knobs(data)
        spread = float(np.ptp(self.cost_K)) if len(self.cost_K) else 0.0
        return [0.0, *(np.logspace(-3, 3, 61) / spread).tolist()] if spread > 0 else [0.0]

    def state(self) -> tuple[Arrays, Facts]:
        """Counts and means."""
        arrays = {
            "prior_S": self.prior_S,
            "quality_SK": self.quality_SK,
            "cost_K": self.cost_K,
            "vote_KSV": self.vote_KSV,
        }
        return arrays, {**super().state()[1], "models": list(self.models)}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        super().load_state(arrays, facts)
        self.prior_S, self.quality_SK, self.cost_K, self.vote_KSV = (
            arrays[name] for name in ("prior_S", "quality_SK", "cost_K", "vote_KSV")
        )
        self.models = tuple(facts["models"])
        self._decided.clear()
        if self.models:
            # A long chain takes a while to solve, which the first request would have to wait for.
            self.first()
