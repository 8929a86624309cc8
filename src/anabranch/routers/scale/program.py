"""`auto/scale`: a request becomes a small program over a cheap and a dear mode, paid out of its purse and over by its deadline.

    [strategies.scale]
    kind = "scale"
    system1 = "qwen3"                                  # or two models: small and large
    settings1 = { reasoning_effort = "none" }
    system2 = "qwen3"
    settings2 = { reasoning_effort = "high" }
    rule = { kind = "threshold", tau = 0.5 }           # or top_fraction, budgeted
    decomposer = { kind = "prompt", k = 4 }            # or identity

Without models System 1 is the cheapest of the pool and System 2 the dearest. What is asked is the last user message, in the conversation
that it ends. The answer is that of the last step, as it comes. Requests that no outline helps (tools are offered, the last message is no
user's) are one step: the difficulty of the question chooses the system.

Where all is well nothing is said of it. A run that did less than it meant (budget, time, a system that did not answer) is marked
``is_degraded`` in its trace, and no cache keeps its answer. Where money or time end before the last step, the results so far are given,
with the finish reason ``length``.
"""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.routers.contract.ask import Arm, Ask
from anabranch.routers.contract.knobs import THRESHOLD, knob_of
from anabranch.routers.contract.program import Done, Event, Program, ProgramRequest
from anabranch.routers.contract.query import Decision, Model, Pool, Query
from anabranch.routers.contract.strategy import ordered
from anabranch.routers.scale.assess import Assessor, PromptScore
from anabranch.routers.scale.calls import Budget
from anabranch.routers.scale.decompose import Decomposer, Identity, Prompted
from anabranch.routers.scale.prompts import Prompts
from anabranch.routers.scale.reasoner import EXPECTED_1, EXPECTED_2, SelectiveReasoner
from anabranch.routers.scale.rules import Rule, Threshold
from anabranch.routers.scale.running import Running
from anabranch.routers.scale.work import Problem, Settings, System
from anabranch.routers.strategies.rules import by_price

# Share of the time that a request has, after which no step is thought about; and in which all calls of the program must be over.
SOFT_SHARE, HARD_SHARE = 0.7, 0.97

# Of what a sender asks, what a plan in steps would lose: the model is to call tools, or to speak.
WHOLE = ("tools", "functions", "modalities", "audio")


class Scale(Program, kind="scale"):
    """SCALE behind a gateway."""

    @configclass
    class Config(Program.Config):
        """Systems, parts and limits; defaults are the paper's.

        Attributes:
            system1, system2: models; "" for the cheapest and the dearest of the pool.
            settings1, settings2: fields of OpenAI's chat request that make them so: the switch of a model's thinking.
            tokens1, tokens2: most completion tokens of a step's answer; None for the model's own limit.
            expected1, expected2: tokens of a step's answer that a budgeted rule reckons with before it has seen any; the second is what
                several answers of a step share a budget of tokens by, too.
            decomposer, assessor, rule: parts.
            rescore, force_last, last_step, max_steps, retries, temperature, top_p, top_k, score_tokens, outline_tokens, call_s, seed,
                samples2, batch2, least_gain2: as in `Settings`; a request with tools has one answer to each step.
            budget_tokens, budget_usd, budget_s: of one request; see `Budget`. The request's own purse and deadline hold beside them.
            language: of the prompts, or a file of them.
        """

        system1: str = ""
        system2: str = ""
        settings1: dict[str, Any] = Field(default_factory=dict)
        settings2: dict[str, Any] = Field(default_factory=dict)
        tokens1: int | None = Field(default=None, ge=1)
        tokens2: int | None = Field(default=None, ge=1)
        expected1: float = Field(default=EXPECTED_1, gt=0)
        expected2: float = Field(default=EXPECTED_2, gt=0)
        decomposer: Decomposer.Config = Prompted.Config()
        assessor: Assessor.Config = PromptScore.Config()
        rule: Rule.Config = Threshold.Config()
        rescore: Literal["online", "upfront"] = "online"
        force_last: Literal["system2", "score"] = "system2"
        last_step: Literal["join", "append", "replace"] = "join"
        max_steps: int = Field(default=16, ge=1, le=256)
        retries: int = Field(default=3, ge=1, le=16)
        temperature: float | None = Field(default=0.6, ge=0)
        top_p: float | None = Field(default=0.95, gt=0, le=1)
        top_k: int | None = Field(default=None, ge=1)
        score_tokens: int = Field(default=64, ge=1)
        outline_tokens: int | None = Field(default=None, ge=1)
        call_s: float = Field(default=300.0, gt=0)
        seed: int | None = Field(default=0, ge=0, le=2**31 - 1)
        samples2: int = Field(default=1, ge=1, le=64)
        batch2: int = Field(default=3, ge=1, le=64)
        least_gain2: float = Field(default=0.01, gt=0, lt=1)
        budget_tokens: int | None = Field(default=None, ge=1)
        budget_usd: float | None = Field(default=None, gt=0)
        budget_s: float | None = Field(default=None, gt=0)
        language: str = "en"

        def __post_init__(self) -> None:
            for name in ("settings1", "settings2"):
                ours = sorted(
                    {"model", "messages", "n", "best_of", "stream", "stream_options"} & getattr(self, name).keys()
                )
                if ours:
                    raise ConfigError(f"{name} has {', '.join(ours)}, which the program says itself")

    is_fast = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # What cannot be read is told at the start, not by the first request.
        self._prompts = Prompts.read(config.language)
        self._decomposer: Decomposer = config.decomposer.build()
        self._assessor: Assessor = config.assessor.build()
        self._rule: Rule = config.rule.build()
        if not self._assessor.is_ready:
            raise ConfigError("assessor has to learn first; give path, a file that a fitted Probe was saved in")

    @property
    def sender_knobs(self) -> tuple[str, ...]:  # type: ignore[override]
        """``threshold`` is tau, where the rule is one."""
        return (THRESHOLD,) if isinstance(self.config.rule, Threshold.Config) else ()

    # -- deciding

    def route(self, query: Query, pool: Pool) -> Decision:
        """System 2's model first, then System 1's, then the rest: who answers where the program cannot.

        Raises InputError for a pool without a model that the config names, and for a knob that is none.
        """
        tau = self._tau(query)
        one, two = self._models(pool)
        score_M = [
            2.0 if model.name == two else 1.0 if model.name == one else -float(at)
            for at, model in enumerate(pool.models)
        ]
        is_same = one == two and self.config.settings1 == self.config.settings2
        details = {"system1": one, "system2": two} | ({} if tau is None else {"tau": tau})
        return Decision(
            candidates=ordered(pool, score_M),
            strategy=self.name,
            reason=f"scale: {one} for easy steps, {two} for hard ones"
            + (", which are one and the same" if is_same else ""),
            details=details,
            probability=1.0,
        )

    def _tau(self, query: Query) -> float | None:
        wanted = knob_of(query.knobs, THRESHOLD, 1.0)
        own = self.config.rule.tau if isinstance(self.config.rule, Threshold.Config) else None
        return own if wanted is None else wanted

    def _models(self, pool: Pool) -> tuple[str, str]:
        """Names of the two systems' models."""
        ready = tuple(model for model in pool.models if model.is_available)
        usable = Pool(ready or pool.models, pool.now_s)
        places = by_price(usable)
        cheap, dear = usable.models[int(places[0])].name, usable.models[int(places[-1])].name
        one, two = self.config.system1 or cheap, self.config.system2 or dear
        for name in (one, two):
            if name not in pool.names:
                raise InputError(f"scale asks {one} and {two}; the pool has {', '.join(pool.names)}")
        return one, two

    # -- answering

    async def run(self, request: ProgramRequest, ask: Ask) -> AsyncIterator[Event]:
        """Outline, steps, and the last step's answer as it comes.

        Raises what the calls failed with where neither system answers, or nothing could be begun for want of money or time.
        """
        running = self._begin(request, ask)
        async with aclosing(running.events()) as events:
            async for event in events:
                yield event
        yield self._done(running)

    def _begin(self, request: ProgramRequest, ask: Ask) -> Running:
        config = self.config
        is_whole = request.asks_for(*WHOLE)
        messages = request.messages
        is_question = isinstance(messages, str) or (bool(messages) and messages[-1].get("role") == "user")
        problem = Problem.of(messages) if is_question else Problem(request.query.text or "(no words)", ())
        left_s = request.left_s
        seconds = [one for one in (config.budget_s, SOFT_SHARE * left_s) if one is not None and one < math.inf]
        tau = request.decision.details.get("tau")
        reasoner = SelectiveReasoner(
            system1=self._system(request, 1),
            system2=self._system(request, 2),
            decomposer=Identity.Config().build() if is_whole or not is_question else self._decomposer,
            assessor=self._assessor,
            rule=self._rule if tau is None else Threshold.Config(tau=tau).build(),
            budget=Budget(
                tokens=config.budget_tokens,
                usd=config.budget_usd,
                seconds=min(seconds, default=None),
                deadline_s=max(HARD_SHARE * left_s, 1e-3),
            ),
            settings=replace(self._settings(request), samples2=1) if is_whole else self._settings(request),
            language=self._prompts,
        )
        running = reasoner.begin(problem, ask, sender=self._sender(request), streams=request.is_streamed, is_plain=True)
        if not is_question:
            running.as_it_came = [dict(one) for one in messages if isinstance(one, Mapping)]
        return running

    def reasoner(self) -> SelectiveReasoner:
        """The same without a gateway, over any `Ask`: of models whose prices and windows nobody knows.

        Raises ConfigError where the config does not name both systems.
        """
        config = self.config
        if not config.system1 or not config.system2:
            raise ConfigError("name system1 and system2; without a gateway there is no pool to choose them from")
        one, two = (
            System(
                arm=Arm(getattr(config, f"system{number}"), dict(getattr(config, f"settings{number}"))),
                max_tokens=getattr(config, f"tokens{number}"),
                expected_tokens=getattr(config, f"expected{number}"),
            )
            for number in (1, 2)
        )
        return SelectiveReasoner(
            system1=one,
            system2=two,
            decomposer=self._decomposer,
            assessor=self._assessor,
            rule=self._rule,
            budget=Budget(tokens=config.budget_tokens, usd=config.budget_usd, seconds=config.budget_s),
            settings=settings_of(config, config.seed),
            language=self._prompts,
        )

    def _settings(self, request: ProgramRequest) -> Settings:
        seed = request.settings.get("seed")
        own = seed if type(seed) is int and self.config.seed is not None else self.config.seed
        return settings_of(self.config, own)

    def _sender(self, request: ProgramRequest) -> dict[str, Any]:
        """What the sender wants of the answer; seeds are the program's own."""
        return {name: value for name, value in request.settings.items() if name != "seed"}

    def _system(self, request: ProgramRequest, number: int) -> System:
        """Of the decision, where the request may use it; else the first that it may."""
        config, name = self.config, str(request.decision.details[f"system{number}"])
        if name not in request.names:
            name = request.names[0]
        model = next(one for one in request.pool.models if one.name == name)
        settings = dict(getattr(config, f"settings{number}"))
        return System(
            arm=Arm(name, settings),
            max_tokens=getattr(config, f"tokens{number}"),
            window=model.context,
            usd_per_token=usd_per_token(model),
            expected_tokens=getattr(config, f"expected{number}"),
        )

    def _done(self, running: Running) -> Done:
        if running.final is not None:
            return replace(Done.of(running.final), is_spare=running.work.is_degraded)
        # What there is without the last step; its end says that it is not all.
        model = running.work.calls.made[-1].model if running.work.calls.made else ""
        results = [
            f"Step {number}: {one.text}\n{one.answer}"
            for number, one in enumerate(running.earlier, start=1)
            if one.answer is not None
        ]
        return Done(message={"content": "\n\n".join(results)}, model=model, finish_reason="length", is_spare=True)


def settings_of(config: Any, seed: int | None) -> Settings:
    """Of a run by a config."""
    names = (
        "rescore",
        "force_last",
        "last_step",
        "max_steps",
        "retries",
        "temperature",
        "top_p",
        "top_k",
        "score_tokens",
        "outline_tokens",
        "call_s",
        "samples2",
        "batch2",
        "least_gain2",
    )
    return Settings(seed=seed, **{name: getattr(config, name) for name in names})


def usd_per_token(model: Model) -> float:
    """Of completion, by its price."""
    return model.price.output / 1e9 / 1e6
