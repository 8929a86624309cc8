"""`auto/router-r1`: a model of the pool that thinks, asks other models over several rounds, and answers.

    [strategies.router-r1]
    kind = "router_r1"
    policy = "router"                                   # the model that routes; without it the cheapest of the pool
    about = { small = "quick; capitals, dates", large = "slow and dear; law, medicine" }

The sender is given the answer alone. What was thought and asked is the request's business: each turn is a line of the trace, without its
texts, each call has its row. Descriptions are all that the router knows of the models, so that one more joins by being described.

A sender may ask for less: ``auto/router-r1?calls=2&usd=0.01&seconds=20`` are most calls of models in the rounds, dollars of the whole
request, and seconds of the rounds; what is configured stays the most there is. A call that could pass the dollars is not made, a direct
answer no more than others: with ``usd=0`` only models that cost nothing are asked. With ``exposes_trace`` a sender may ask to see what
happens (``?trace=1``): thoughts, questions and replies come as events of the stream, as they are made.

Rounds end at ``max_turns``, at a budget, and at six tenths of the request's time. Where no answer has come by then, a model is asked
directly, the dearest that there is money for first, and the trace says why; where nothing can be asked any more, the last information there
is is given, and where there is none the request is refused.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from anabranch.config import Field, configclass
from anabranch.errors import AnabranchError, BudgetError, ConfigError, InputError, LimitError
from anabranch.routers.contract.ask import Answered, Arm, Ask
from anabranch.routers.contract.knobs import knob_of
from anabranch.routers.contract.program import Done, Event, Program, ProgramRequest, Shown, Step
from anabranch.routers.contract.query import Candidate, Decision, Model, Pool, Query
from anabranch.routers.contract.strategy import ordered
from anabranch.routers.router_r1.episode import Asked, Episode, Rules
from anabranch.routers.router_r1.grammar import answered, closed, contents
from anabranch.routers.router_r1.prompts import agent_prompt, router_prompt
from anabranch.routers.scale.work import Problem
from anabranch.routers.strategies.capped_ask import CappedAsk
from anabranch.routers.strategies.chained import given_as_it_comes
from anabranch.routers.strategies.rules import by_price

# Share of the time that a request has in which rounds may begin; the rest is for a direct answer.
ROUNDS_SHARE = 0.6
# By which share the calls of rounds must be over.
CALLS_SHARE = 0.8
# What a router is told that has done nothing in its turn.
GO_ON = "Go on."
# What a sender may set of one request: most calls of models in the rounds, dollars of all of it, seconds of the rounds; and whether it is
# shown what happens.
LIMITS, TRACE = ("calls", "usd", "seconds"), "trace"
# Why an answer ended, where there is more that was not said.
CUT = ("length", "content_filter")
# Turns in a row that are cut before they did anything, after which there is no further one: each is paid to its end.
MOST_CUT = 2
# Of what a sender asks, what no router could give.
WHOLE = ("tools", "functions", "modalities", "audio", "response_format")


class RouterR1(Program, kind="router_r1"):
    """Router-R1 behind a gateway."""

    @configclass
    class Config(Program.Config):
        """Router, pool and limits; the paper's code has most of them.

        Attributes:
            policy: model that routes. Directly it is asked last, and only what no router could answer, or where no other model may be used
                or has room for the prompt: what was taught to route is no model of a chat. "" for the cheapest of the pool, of those whose
                price is known where there are such.
            settings: fields of OpenAI's chat request that it is asked with.
            about: descriptions of models, in place of those of the gateway's config.
            aliases: other names of models.
            max_turns: in which it may ask; then it has one more.
            max_calls: questions to models; None for as many as turns.
            turn_tokens, reply_tokens, information_tokens: most tokens of a turn, of a model's reply, and words of it that the router sees.
            temperature: of the router; None for the sender's, or the model's own.
            call_s: most seconds of one call.
            budget_usd, budget_s: of the rounds of one request; None for its purse, and its time.
            warns: the prompt for base models.
            instruction: what the router is told before the question, with ``{models}`` where their descriptions stand: that which it was
                taught with. "" for the paper's.
            shows_trace: the answer is the whole trajectory, thoughts and all.
            exposes_trace: senders may ask for thoughts, questions and replies as events beside the answer.
        """

        policy: str = ""
        settings: dict[str, Any] = Field(default_factory=dict)
        about: dict[str, str] = Field(default_factory=dict)
        aliases: dict[str, str] = Field(default_factory=dict)
        max_turns: int = Field(default=4, ge=0, le=64)
        max_calls: int | None = Field(default=None, ge=0)
        turn_tokens: int = Field(default=1024, ge=1)
        reply_tokens: int = Field(default=512, ge=1)
        information_tokens: int = Field(default=600, ge=1)
        temperature: float | None = Field(default=None, ge=0)
        call_s: float = Field(default=60.0, gt=0)
        budget_usd: float | None = Field(default=None, gt=0)
        budget_s: float | None = Field(default=None, gt=0)
        warns: bool = False
        instruction: str = ""
        shows_trace: bool = False
        exposes_trace: bool = False

        def __post_init__(self) -> None:
            ours = sorted({"model", "messages", "n", "best_of", "stream", "stream_options"} & self.settings.keys())
            if self.instruction and "{models}" not in self.instruction:
                raise ConfigError("instruction has no {models}, where they are to stand")
            if ours:
                raise ConfigError(f"settings has {', '.join(ours)}, which the program says itself")

    is_fast = True

    @property
    def sender_knobs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Limits of one request, and whether its trace is shown, where it may be."""
        return (*LIMITS, TRACE) if self.config.exposes_trace else LIMITS

    # -- deciding

    def route(self, query: Query, pool: Pool) -> Decision:
        """Models from dear to cheap: who answers where the router does not.

        Raises InputError for a policy that is not in the pool, and for a knob that is none.
        """
        _Asked.of(query.knobs)
        # From cheap to dear; what has no price that is known is asked last, as who costs nothing, and is still not the cheapest.
        places = sorted((int(at) for at in by_price(pool)), key=lambda at: pool.models[at].is_priced)
        cheapest = sorted(places, key=lambda at: (not pool.models[at].is_available, not pool.models[at].is_priced))
        policy = self.config.policy or pool.models[cheapest[0]].name
        if policy not in pool.names:
            raise InputError(f"router_r1 routes with {policy!r}; the pool has {', '.join(pool.names)}")
        score_M = [0.0] * len(pool)
        for rank, at in enumerate(places):
            score_M[at] = -math.inf if pool.models[at].name == self.config.policy else float(rank)
        candidates = ordered(pool, score_M)
        if self.config.policy and self._is_alone(query, pool):
            candidates = (*candidates, Candidate(model=policy, score=-1.0))
        return Decision(
            candidates=candidates,
            strategy=self.name,
            reason=f"{policy} thinks, and asks whom it wants",
            details={"policy": policy},
            probability=1.0,
            beside=(policy,),
        )

    def _is_alone(self, query: Query, pool: Pool) -> bool:
        """Whether no model but the `policy` may be used and has room for the prompt."""
        allowed = [model for model in pool.models if model.is_allowed]
        tokens = query.prompt_tokens or 0
        fitting = [model for model in allowed if model.context is None or tokens <= model.context]
        return all(model.name == self.config.policy for model in fitting or allowed)

    # -- answering

    async def run(self, request: ProgramRequest, ask: Ask) -> AsyncGenerator[Event, None]:
        """Rounds, and the answer. Raises what a direct answer fails with where there is nothing else to give."""
        running = _Rounds(self.config, request, ask)
        if running.can_route:
            async with aclosing(running.events()) as events:
                async for event in events:
                    yield event
        else:
            running.why = "no question that a router could answer"
        if (done := running.done) is not None:
            yield running.totals()
            yield done
            return
        yield Step("direct", {"why": running.why})
        if running.asked.is_shown:
            yield Shown("direct", {"why": running.why})
        async with aclosing(self._directly(request, running)) as given:
            async for event in given:
                if isinstance(event, Done):
                    yield running.totals()
                yield event

    async def _directly(self, request: ProgramRequest, running: "_Rounds") -> AsyncGenerator[Event, None]:
        """The answer of the first model that gives one; else the last information there was."""
        names = request.names
        policy = str(request.decision.details["policy"])
        # Another may not be able to do what is asked for; where it has tags to write, it had its rounds.
        if not running.can_route and policy not in names and running.may_ask(policy):
            names = (*names, policy)
        for name in names:
            given: Any = given_as_it_comes(request, name, running.paid, running.spare, name == names[-1])
            async with aclosing(given) as events:
                async for event in events:
                    # What a router was to answer and did not is better asked for again than kept.
                    why = running.why if running.can_route else ""
                    yield replace(event, is_spare=bool(why), why=why) if isinstance(event, Done) else event
                    if isinstance(event, Done):
                        return


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the sender set; None for what it did not.

    Attributes:
        calls, seconds: most of the rounds.
        usd: most of the whole request.
        is_shown: the sender sees what happens.
    """

    calls: int | None = None
    usd: float | None = None
    seconds: float | None = None
    is_shown: bool = False

    @classmethod
    def of(cls, knobs: Mapping[str, str]) -> "_Asked":
        """Raises InputError for what is no number, or no whole one where it counts."""
        calls, usd, seconds = (knob_of(knobs, name) for name in LIMITS)
        shown = knob_of(knobs, TRACE, 1)
        for name, value in (("calls", calls), (TRACE, shown)):
            if value is not None and not value.is_integer():
                raise InputError(f"{name} is {knobs[name][:80]!r}; it must be a whole number")
        return cls(None if calls is None else int(calls), usd, seconds, shown == 1)


def _least(*values: Any) -> Any:
    """The smallest of those that are set; None for none."""
    return min((value for value in values if value is not None), default=None)


@dataclass(slots=True)
class _Rounds:
    """Those of one request.

    Attributes:
        done: the answer; None where none came.
        spare: what is better than none.
        why: no answer came.
        asked: what the sender set.
        paid: asks within the sender's dollars.
    """

    config: Any
    request: ProgramRequest
    ask: Ask
    done: Done | None = None
    spare: Done | None = None
    why: str = ""
    episode: Episode | None = None
    asked: _Asked = field(init=False)
    paid: Any = field(init=False)
    # Of the last turn: the endpoint cut it, and as an answer it is given all the same.
    _is_cut: bool = False
    _is_short: bool = False
    # Turns in a row, that one the last, which were cut and did nothing.
    _num_cut: int = 0
    _began: float = field(default_factory=time.monotonic)
    _sums: dict[str, list[float]] = field(default_factory=lambda: {"router": [0, 0, 0.0, 0], "pool": [0, 0, 0.0, 0]})

    def __post_init__(self) -> None:
        self.asked = _Asked.of(self.request.query.knobs)
        usd = self.asked.usd
        self.paid = self.ask if usd is None else CappedAsk(self.ask, usd, "usd", self.request.pool)

    @property
    def can_route(self) -> bool:
        """It is a question in words, and whoever asked it wants words."""
        messages = self.request.messages
        is_question = isinstance(messages, str) or (bool(messages) and messages[-1].get("role") == "user")
        return is_question and bool(self.request.query.text.strip()) and not self.request.asks_for(*WHOLE)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Turns of the router, and what they ask."""
        config, names = self.config, self._names()
        policy = str(self.request.decision.details["policy"])
        open_names = {model.name for model in self.request.pool.models if model.is_available}
        policy = policy if policy in open_names or not open_names else self.request.names[-1]
        problem = Problem.of(self.request.messages)
        rules = Rules(
            max_turns=config.max_turns,
            max_calls=_least(config.max_calls, self.asked.calls),
            information_tokens=config.information_tokens,
            aliases={alias: name for alias, name in config.aliases.items() if name in names},
        )
        self.episode = episode = Episode(problem.text, rules, names)
        told = router_prompt(
            problem.text, names, self._about(names), warns=config.warns, instruction=config.instruction or None
        )
        messages = problem.asked(told)
        while not episode.is_done:
            self.why = self._used_up()
            if self.why:
                return
            try:
                turn = await self._turn(policy, messages)
            except AnabranchError as error:
                self.why = self._why(error)
                yield Step("failed", {"model": policy, "error": type(error).__name__})
                return
            before = len(episode.parts)
            asked = episode.feed(turn)
            facts: dict[str, Any] = {"turn": episode.turns, **({"is_cut": True} if self._is_cut else {})}
            written = next(text for text, is_router in episode.parts[before:] if is_router)
            for shown in self._shown(written, asked):
                yield shown
            if asked is not None:
                facts |= await self._informed(asked)
            yield Step("turn", {**facts, "action": episode.actions[-1]})
            self._num_cut = self._num_cut + 1 if self._is_cut and asked is None else 0
            if self._num_cut == MOST_CUT and not episode.is_done:
                self.why = "the router was cut off"
                return
            told = "".join(text for text, is_router in episode.parts[before:] if not is_router)
            if asked is not None and self.asked.is_shown:
                said = next((text for _, text in contents(told, "information")), "")
                yield Shown("reply", {**facts, "text": said})
            messages = [
                *messages,
                {"role": "assistant", "content": written or "..."},
                {"role": "user", "content": told.strip() or GO_ON},
            ]
        if not episode.answer:
            self.why = "the router gave no answer"
            return
        whole = episode.text.strip() if config.shows_trace else episode.answer
        content = ended_at(whole, self.request.settings.get("stop"))
        is_short = self._is_short and content == whole
        self.done = Done(message={"content": content}, model=policy, finish_reason="length" if is_short else "stop")

    async def _turn(self, policy: str, messages: Sequence[Mapping[str, Any]]) -> str:
        carried = {
            name: self.request.settings[name]
            for name in ("temperature", "top_p", "user", "seed")
            if name in self.request.settings
        }
        arm = Arm(policy, {**carried, **self.config.settings})
        ends = ("</search>", "</route>", "</answer>")
        most = self._turn_tokens()
        how = {"max_tokens": most, "temperature": self.config.temperature, "stop": ends}
        found = await self._called("router", arm, messages, purpose="route", **how)
        text = found.text.replace("<route>", "<search>")
        reason = found.choices[0].get("finish_reason")
        self._is_cut = reason in CUT
        if not self._is_cut:
            return closed(text)
        # What was cut does what it did where the router was taught: nothing. But an answer of as much as the sender allows is one.
        is_full = reason == "length" and most in self._asked_tokens()
        whole = answered(text) if is_full else text
        self._is_short = whole != text
        return whole

    def _turn_tokens(self) -> int:
        """Most tokens of a turn, and so of the answer in it: no more than the sender allows."""
        return min([self.config.turn_tokens, *self._asked_tokens()])

    def _asked_tokens(self) -> list[int]:
        """Most tokens of an answer, as the sender said it."""
        asked = (self.request.settings.get(name) for name in ("max_tokens", "max_completion_tokens"))
        return [most for most in asked if isinstance(most, int)]

    def _shown(self, written: str, asked: Asked | None) -> Iterator[Shown]:
        """What the sender sees of a turn before a model is asked; nothing where it did not want to."""
        assert self.episode is not None
        if not self.asked.is_shown:
            return
        turn = {"turn": self.episode.turns}
        for _, thought in contents(written, "think"):
            yield Shown("thought", {**turn, "text": thought.strip()})
        if asked is not None:
            yield Shown("call", {**turn, "model": asked.model, "query": asked.query})
        elif self.episode.answer is None:
            yield Shown("invalid", {**turn, "action": self.episode.actions[-1]})

    async def _informed(self, asked: Asked) -> dict[str, Any]:
        """Ask a model, and tell the router; what it took."""
        assert self.episode is not None
        prompt = agent_prompt(asked.query, self.config.reply_tokens)
        facts: dict[str, Any] = {"model": asked.model}
        try:
            found = await self._called(
                "pool", Arm(asked.model), prompt, purpose="draft", max_tokens=self.config.reply_tokens, temperature=0.0
            )
        except AnabranchError as error:
            self.episode.inform(None)
            return {**facts, "error": type(error).__name__}
        self.episode.inform(found.text)
        if found.text.strip():
            self.spare = Done(message={"content": found.text}, model=asked.model, finish_reason="length", is_spare=True)
        return {
            **facts,
            "prompt_tokens": found.prompt_tokens,
            "completion_tokens": found.completion_tokens,
            "cost": found.cost,
            "latency_s": round(found.latency_s, 3),
        }

    async def _called(self, who: str, arm: Arm, messages: Any, **how: Any) -> Answered:
        """One call. Raises LimitError where it takes too long, else what it fails with."""
        left_s = min(self.config.call_s, CALLS_SHARE * self.request.left_s - self._elapsed())
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                found = await self.paid(arm, messages, **how)
        except TimeoutError as error:
            raise LimitError(
                f"{arm.model} took longer than it may for one call of router_r1", retry_after_s=1.0
            ) from error
        for place, value in enumerate((found.prompt_tokens, found.completion_tokens, found.cost, 1)):
            self._sums[who][place] += value
        return found

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _used_up(self) -> str:
        """Why no further round may begin; "" where one may."""
        soft_s = ROUNDS_SHARE * self.request.left_s
        soft_s = _least(soft_s, self.config.budget_s, self.asked.seconds)
        if self._elapsed() >= soft_s:
            return "time"
        # Calls that failed may have cost something as well.
        spent = getattr(self.ask, "spent", None)
        cost = max(sum(sums[2] for sums in self._sums.values()), 0.0 if spent is None else spent.cost)
        most = _least(self.config.budget_usd, self.asked.usd)
        # With no dollars at all rounds go on by models that cost nothing.
        if most is not None and cost >= most > 0:
            return "money"
        # A turn, what it asks, and a direct answer.
        return "calls" if self.ask.left < 3 else ""

    def _why(self, error: AnabranchError) -> str:
        """Why no further round is made, after a turn that failed."""
        if isinstance(error, BudgetError):
            return "money"
        if isinstance(error.__cause__, TimeoutError):
            return "time"
        # A call that was not made, or was broken off, for a limit that is used up.
        used_up = self._used_up() if isinstance(error, LimitError) else ""
        return used_up or f"the router: {type(error).__name__}"

    def _names(self) -> tuple[str, ...]:
        """Models that may be asked, in the order of the pool, without the router where there are others."""
        policy = self.request.decision.details["policy"]
        known = {one.model for one in self.request.decision.candidates} - {policy}
        others = [model for model in self.request.pool.models if model.name in known and model.is_allowed]
        # A question of the router's may have room where the sender's prompt has none.
        open_others = [model for model in others if model.is_available] or others
        return tuple(model.name for model in open_others) or (policy,)

    def may_ask(self, name: str) -> bool:
        """Whether the sender may use a model."""
        return any(model.name == name and model.is_allowed for model in self.request.pool.models)

    def _about(self, names: Sequence[str]) -> dict[str, str]:
        models = {model.name: model for model in self.request.pool.models}
        return {name: self.config.about.get(name) or described(models[name]) for name in names}

    def totals(self) -> Step:
        """What all of it took, a direct answer not among it."""
        spent, told = getattr(self.ask, "spent", None), {}
        for who, (prompt, completion, cost, calls) in self._sums.items():
            told[who] = {"prompt": int(prompt), "completion": int(completion), "cost": cost, "calls": int(calls)}
        if spent is not None:
            told["all"] = {"prompt": spent.prompt_tokens, "completion": spent.completion_tokens, "cost": spent.cost}
        facts = {} if self.episode is None else self.episode.facts()
        return Step("totals", {**told, **facts})


def ended_at(text: str, stop: Any) -> str:
    """A text until the first of the sender's ``stop`` texts: one, several or None."""
    ends = (text.find(one) for one in ([stop] if isinstance(stop, str) else stop or ()) if one)
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def described(model: Model) -> str:
    """What the gateway's config says of a model."""
    price = model.price.output / 1e9
    size = (
        ""
        if model.parameters is None or not math.isfinite(model.parameters)
        else f"{model.parameters:g} billion parameters"
    )
    parts = [model.description, size, f"{price:g} dollars a million tokens" if price else ""]
    return "; ".join(part for part in parts if part) or "nothing is known of it"
