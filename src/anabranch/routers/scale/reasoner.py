"""`SelectiveReasoner`: SCALE as a library, over any `Ask`.

reasoner = SelectiveReasoner(
    system1=Arm("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}),
    system2=Arm("qwen3", {"chat_template_kwargs": {"enable_thinking": True}}),
    tau=0.5, k=8,
)
trace = reasoner.solve_sync("How many primes below 100 are sums of two squares?", ClientAsk(OpenAI(base_url=...)))
trace.answer, trace.totals.all.completion
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError, InputError
from anabranch.routers.contract.ask import Arm, Ask
from anabranch.routers.scale.assess import Assessor, PromptScore
from anabranch.routers.scale.calls import Budget, Calls
from anabranch.routers.scale.decompose import Decomposer, Prompted
from anabranch.routers.scale.journal import Journal, digest_of
from anabranch.routers.scale.prompts import Prompts
from anabranch.routers.scale.records import Trace
from anabranch.routers.scale.rules import Rule, Threshold
from anabranch.routers.scale.running import Running
from anabranch.routers.scale.work import Problem, Settings, System, Work

# The paper's limit of an answer, and what each system is expected to write where nobody says.
MOST_TOKENS, EXPECTED_1, EXPECTED_2 = 32_768, 256.0, 2048.0


class SelectiveReasoner:
    """Splits a problem into steps and answers the hard ones in System 2, the others in System 1.

    Args:
        system1, system2: the modes: one model with its thinking off and on, or two models. A `System` says its limits too.
        decomposer: from problem to steps; None asks System 1 for ``k`` outlines.
        assessor: how hard a step is; None asks System 1 for a number.
        rule: which steps are hard; None for ``difficulty > tau``.
        tau, k: of those two.
        budget: of a run; none by default.
        settings: of a run.
        language: of the prompts, a file of them, or `Prompts` that were read.

    Raises ConfigError where two say the same, and for a budget in dollars of systems whose price nobody said.
    """

    def __init__(
        self,
        *,
        system1: Arm | System | str,
        system2: Arm | System | str,
        decomposer: Decomposer | None = None,
        assessor: Assessor | None = None,
        rule: Rule | None = None,
        tau: float | None = None,
        k: int | None = None,
        budget: Budget | None = None,
        settings: Settings | None = None,
        language: str | Prompts = "en",
    ) -> None:
        if tau is not None and rule is not None:
            raise ConfigError(f"tau is {tau!r} beside a rule; a threshold is a rule of its own, give one of the two")
        if k is not None and decomposer is not None:
            raise ConfigError(f"k is {k!r} beside a decomposer, which has its own; give one of the two")
        self.systems = {1: _system(system1, EXPECTED_1), 2: _system(system2, EXPECTED_2)}
        made_rule = Threshold.Config() if tau is None else Threshold.Config(tau=tau)
        made_decomposer = Prompted.Config() if k is None else Prompted.Config(k=k)
        self.decomposer: Decomposer = decomposer or made_decomposer.build()
        self.assessor: Assessor = assessor or PromptScore.Config().build()
        self.rule: Rule = rule or made_rule.build()
        self.budget, self.settings = budget or Budget(), settings or Settings()
        self.prompts = language if isinstance(language, Prompts) else Prompts.read(language)
        if self.rule.unit == "usd" and any(one.usd_per_token is None for one in self.systems.values()):
            raise ConfigError(
                "the rule's budget is in dollars; say usd_per_token of both systems, or give it in tokens"
            )

    def with_settings(self, settings: Settings) -> "SelectiveReasoner":
        """The same with other settings."""
        made = copy(self)
        made.settings = settings
        return made

    def begin(
        self,
        problem: Problem,
        ask: Ask,
        *,
        journal: Journal | None = None,
        sender: Mapping[str, Any] | None = None,
        streams: bool = False,
        is_plain: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> Running:
        """A run, not yet begun: see `Running`. Whoever gives a journal closes it."""
        calls = Calls(
            ask,
            problem=problem.digest,
            seed=self.settings.seed,
            budget=self.budget,
            call_s=self.settings.call_s,
            journal=journal,
            clock=clock,
        )
        work = Work(problem, self.systems, self.settings, self.prompts, calls)
        if journal is not None and journal.dropped:
            work.note(f"journal: answers that are none were dropped ({journal.dropped:,})")
        return Running(
            work, self.decomposer, self.assessor, self.rule, sender=sender or {}, streams=streams, is_plain=is_plain
        )

    async def solve(
        self, problem: "str | Sequence[Mapping[str, Any]] | Problem", ask: Ask, *, journal: str | Path | None = None
    ) -> Trace:
        """The whole run.

        Args:
            problem: a question, or a conversation that ends with one.
            ask: who makes the calls.
            journal: a file for its calls; where it is there, what it holds is not asked again.

        Raises InputError for a problem without words or too long for a system's window, what the calls failed with where neither system
        answers, and DataError for a journal of another run, or one that another run is using.
        """
        found = problem if isinstance(problem, Problem) else Problem.of(problem)
        with nullcontext() if journal is None else Journal(journal, self._run_digest(found)) as kept:
            running = self.begin(found, ask, journal=kept)
            async with aclosing(running.events()) as events:
                async for _ in events:
                    # All of it is in the trace.
                    pass
            return running.trace

    def solve_sync(
        self, problem: "str | Sequence[Mapping[str, Any]] | Problem", ask: Ask, *, journal: str | Path | None = None
    ) -> Trace:
        """`solve`, for who has no event loop. Raises InputError where one runs."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.solve(problem, ask, journal=journal))
        raise InputError("solve_sync was called where an event loop runs; await solve instead")

    def _run_digest(self, problem: Problem) -> str:
        arms = [[one.arm.model, dict(one.arm.settings), one.max_tokens] for one in self.systems.values()]
        return digest_of([problem.digest, self.settings.seed, arms])


def _system(given: Arm | System | str, expected: float) -> System:
    if isinstance(given, System):
        return given
    arm = Arm(given) if isinstance(given, str) else given
    return replace(System(arm=arm), max_tokens=MOST_TOKENS, expected_tokens=expected)
