"""Best of N: answers of one model are drawn until more would not pay, and the best of them is given.

    n <- a batch;  draw it;  one verified? the vote decided? the next one not worth its price? no money, no time? -> give the best
    else another batch

Rules and curve: `anabranch.test_time` (TTSPM, arXiv 2505.20522). N is decided on what this model was seen to do on this task: before the
first call by its curve, or by that of the very question where `difficulty` was learned, after each batch by what became of it. The best
is the first that a verifier finds right, the commonest, the one of the likeliest tokens, or the one that a judge scores best; or, with
``rounds``, the last of one that is thought over again.

Where a model gives no answer, the next of the pool is asked in its place.
"""

import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from anabranch.config import Field, configclass
from anabranch.errors import AnabranchError, ConfigError, InputError
from anabranch.jail import jail
from anabranch.routers.contract.knobs import knob_of
from anabranch.routers.contract.program import Ask, Done, Event, Program, ProgramRequest, Step
from anabranch.routers.contract.query import Decision, Model, Pool, Query
from anabranch.routers.contract.strategy import ordered
from anabranch.routers.money import dollars
from anabranch.routers.strategies.best_of_drawing import Drawing, answer_key, examples_checker, judged
from anabranch.routers.strategies.capped_ask import CappedAsk
from anabranch.routers.strategies.sampled_counts import Counting, Ran
from anabranch.sandbox import SandboxError
from anabranch.test_time import (
    BetaTTSPM,
    BudgetController,
    Sampled,
    best_judged,
    logprob_weighted,
    majority,
    parallel,
    sequential,
)
from anabranch.test_time.selectors import Chosen, Sample

# Tokens, where a query does not tell.
USUAL_PROMPT, USUAL_COMPLETION = 500, 500

# Of the time that is left, what is kept to say the answer, and what a judge has.
KEPT_SHARE, JUDGING_SHARE = 0.1, 0.3

CRITIC = "Check your answer step by step. If something is wrong, put it right. Reply with the full corrected answer."


class BestOf(Counting, Program, kind="best_of"):
    """See the module."""

    @configclass
    class Config(Counting.Config):
        """How it is sampled, chosen and bounded.

        Attributes:
            model: that answers; None for the first of the pool. The others are asked where it gives no answer.
            select: ``majority``, ``logprob`` (a vote weighed by the likelihood of tokens), ``judge``.
            verifier: ``none``; ``examples`` runs code of answers against the examples (``>>>``) of the question, the sender's code both of
                them as far as anybody knows, inside bubblewrap on the machine of the gateway (`anabranch.test_time.verify`); where that
                cannot be, it is refused. A question without any has no verifier.
            judge: model that scores answers from 0 to 10; None for the one that answers.
            rounds: answers one after another, each of which reads the last one, in place of side by side.
            critic: what is said to an answer before the next round.
            decides: ``prior``, ``posterior`` or ``both``, see `BudgetController`.
            value_usd: worth of a right answer.
            least_gain: chance of solving the question from which one more sample is worth drawing, whatever it costs.
            batch: samples at a time.
            max_n: samples at most; a sender may ask for fewer (``auto/best-of?n=4``).
            max_usd: dollars of all samples and all judging of a request at most: a call that could pass it is not made. None leaves that to
                the limits of the gateway.
            deadline_s: seconds after which no further batch is begun; what was drawn by then is chosen from.
            confidence: of a vote that ends it.
            temperature: of all samples but the first, which is drawn as the sender asks.
            max_tokens: of each, where the sender names no end.
        """

        model: str | None = None
        select: Literal["majority", "logprob", "judge"] = "majority"
        verifier: Literal["none", "examples"] = "none"
        judge: str | None = None
        rounds: bool = False
        critic: str = Field(default=CRITIC, min_length=1, max_length=10_000)
        decides: Literal["prior", "posterior", "both"] = "both"
        value_usd: float = Field(default=0.1, gt=0)
        least_gain: float = Field(default=0.01, gt=0, lt=1)
        batch: int = Field(default=4, ge=1, le=64)
        max_n: int = Field(default=16, ge=1, le=64)
        max_usd: float | None = Field(default=None, gt=0)
        deadline_s: float = Field(default=60.0, gt=0)
        confidence: float = Field(default=0.95, gt=0.5, lt=1)
        temperature: float = Field(default=0.8, gt=0, le=2)
        max_tokens: int = Field(default=2048, ge=1)

        def __post_init__(self) -> None:
            if self.judge is not None and self.select != "judge":
                raise ConfigError(
                    f'judge is {self.judge!r}, and select is {self.select!r}; a judge needs select = "judge"'
                )
            if self.rounds and self.select != "majority":
                raise ConfigError(
                    f"rounds gives the last answer, and select is {self.select!r}; leave one of the two out"
                )

    sender_knobs = ("n",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.verifier == "examples":
            try:
                jail()
            except SandboxError as error:
                raise ConfigError(f"verifier is 'examples', and {error}") from None

    @property
    def in_order(self) -> bool:
        """Of rounds."""
        return bool(self.config.rounds)

    def route(self, query: Query, pool: Pool) -> Decision:
        """The model that answers first, then the others of the pool; with how many samples pay. Raises InputError for a model not there."""
        name = self.config.model
        if name is not None and name not in pool.names:
            raise InputError(f"best_of.model is {name!r}, which is not in the pool: {', '.join(pool.names)}")
        score_P = [-float(at) for at in range(len(pool))]
        if name is not None:
            score_P[pool.names.index(name)] = 1.0
        candidates = ordered(pool, score_P)
        first = next(model for model in pool.models if model.name == candidates[0].model)
        curve, known = self.prior_of(query, first.name)
        cost = self._cost(first, query)
        rules = self._rules(curve, cost, self._most(query))
        n = rules.begin().budget
        details = {**known, "budget": n, "sample_usd": cost}
        solved = float(curve.value(max(1, n)))
        of_whom = (
            "this question is solved so with" if "difficulty" in known else "of such questions are solved so about"
        )
        return Decision(
            candidates=candidates,
            strategy=self.name,
            reason=f"up to {n} answers of {first.name} are worth their price; {of_whom} {solved:.0%}",
            confidence=solved,
            details=details,
            probability=1.0,
        )

    async def run(self, request: ProgramRequest, ask: Ask) -> AsyncIterator[Event]:
        """Draw, choose, and give the best. Raises what the last model failed with where none gave an answer."""
        began_s, judging = time.monotonic(), JUDGING_SHARE if self.config.select == "judge" else 0.0
        last_s = began_s + request.left_s * (1 - KEPT_SHARE)
        until_s = began_s + min(self.config.deadline_s, request.left_s * (1 - KEPT_SHARE - judging))
        error: AnabranchError | None = None
        capped = CappedAsk(ask, self.config.max_usd, "best_of.max_usd", request.pool)
        for name in request.names:
            drawing = Drawing(request, name, capped, until_s, self.config)
            curve = self._curve_of(request, name)
            found = await self._sampled(request, drawing, curve)
            chosen = await self._chosen(request, name, found, capped, last_s)
            yield self._step(name, found, chosen, drawing)
            if chosen is not None:
                self._remember(request, name, found, chosen)
                yield _given(request, found.samples[chosen.place])
                return
            error = drawing.error or error
            if time.monotonic() >= until_s:
                break
        raise error or InputError("best_of was given no answer by any model within its time")

    # -- how much

    def _rules(
        self, curve: BetaTTSPM, cost: float, most: int, room: float = math.inf, reserve: float | None = None
    ) -> BudgetController:
        config = self.config
        return BudgetController(
            curve=curve,
            value=config.value_usd,
            cost=cost,
            least_gain=config.least_gain,
            decides=config.decides,
            batch=1 if config.rounds else config.batch,
            max_n=most,
            max_cost=room,
            reserve=reserve,
            deadline_s=config.deadline_s,
            confidence=config.confidence,
        )

    def _most(self, query: Query) -> int:
        """Samples at most, where the sender may ask for fewer."""
        wanted = knob_of(query.knobs, "n", self.config.max_n)
        if wanted is None:
            return int(self.config.max_n)
        if wanted < 1 or wanted != int(wanted):
            raise InputError(f"n is {query.knobs['n'][:80]!r}; it must be a whole number from 1 to {self.config.max_n}")
        return int(wanted)

    def _cost(self, model: Model, query: Query) -> float:
        """Dollars of one sample, by its price: the prompt is read for each, as far as anybody knows."""
        prompt = USUAL_PROMPT if query.prompt_tokens is None else query.prompt_tokens
        most = self.config.max_tokens if query.max_tokens is None else query.max_tokens
        return dollars(model.price.cost(max(0, prompt), max(0, min(most, USUAL_COMPLETION))))

    def _curve_of(self, request: ProgramRequest, name: str) -> BetaTTSPM:
        """As it was decided with, for the model it was decided for: fitting is no work for an event loop."""
        told = request.decision.details.get("curve")
        if name == request.decision.model and isinstance(told, Mapping):
            return BetaTTSPM(told["f_max"], told["a"], told["b"])
        return BetaTTSPM(self.config.f_max, self.config.a, self.config.b)

    # -- drawing and choosing

    async def _sampled(self, request: ProgramRequest, drawing: Drawing, curve: BetaTTSPM) -> Sampled:
        model = next(one for one in request.pool.models if one.name == drawing.model)
        reserve, before, ask = await drawing.most(), drawing.ask.spent, drawing.ask
        rules = self._rules(curve, self._cost(model, request.query), self._most(request.query), ask.room, reserve)
        if reserve > ask.room:
            drawing.error = ask.full(reserve)
        is_run = self.config.verifier == "examples"
        verify = examples_checker(request.query, drawing.until_s) if is_run else None
        how: dict[str, Any] = {"verify": verify, "spent": lambda: ask.spent - before}
        if self.config.rounds:
            return await sequential(drawing, rules, lambda sample: self.config.critic, **how)
        return await parallel(drawing, rules, self._select, same=answer_key, **how)

    def _select(self, samples: Sequence[Sample]) -> Chosen | None:
        if self.config.select == "logprob" and all(one.logprob is not None for one in samples):
            return logprob_weighted(samples, answer_key)
        return majority(samples, answer_key)

    async def _chosen(
        self, request: ProgramRequest, name: str, found: Sampled, ask: CappedAsk, until_s: float
    ) -> Chosen | None:
        if self.config.select != "judge" or found.reason == "verified" or len(found.samples) < 2:
            return found.chosen
        scores = await judged(request, found.samples, self.config.judge or name, ask, until_s)
        # A judge that says nothing leaves the vote.
        return best_judged(found.samples, scores) if any(score == score for score in scores) else found.chosen

    def _step(self, name: str, found: Sampled, chosen: Chosen | None, drawing: Drawing) -> Step:
        sure = None if chosen is None or chosen.sure != chosen.sure or abs(chosen.sure) == float("inf") else chosen.sure
        facts = {
            "model": name,
            "samples": len(found.samples),
            "failed": found.failures,
            "reason": found.reason or drawing.reason,
            "chosen": None if chosen is None else chosen.place,
            "sure": None if sure is None else round(sure, 4),
            "verified": None if found.verified is None else found.verified.count(True),
            "unknown": None if found.verified is None else found.verified.count(None),
            "cost_usd": drawing.cost,
            "error": None if drawing.error is None else type(drawing.error).__name__,
        }
        return Step("sampled", facts)

    def _remember(self, request: ProgramRequest, name: str, found: Sampled, chosen: Chosen) -> None:
        keys = [answer_key(one.text) for one in found.samples]
        solved = None if found.verified is None else any(found.verified)
        if not solved and None in (found.verified or ()):
            # Of some nobody knows: a later score may say it.
            solved = None
        first = keys.index(keys[chosen.place]) if solved is None else chosen.place
        self.ran(
            request.query.request_id,
            Ran(name, request.query.task, len(found.samples), first + 1, solved, request.query.tenant),
        )


def _given(request: ProgramRequest, sample: Sample) -> Done:
    """An answer as it is given: log-probabilities only for who asked for them."""
    done = Done.of(sample.body)
    return done if request.settings.get("logprobs") else replace(done, logprobs=None)
