"""One run of SCALE over the steps of a problem: score, choose a system, answer, carry the result along.

    C_1 = P;   C_i = P and (s_j, S(s_j)) of all j < i;   m_i = LLM2 if the rule says so of d_i, else LLM1;   S(s_i) = m_i(C_i, s_i)

(paper, eq. 3 to 6.) Nothing here waits without end: each call has a time, attempts are counted, and what is used up is looked at before
each call. Where the budget is used up the rest is System 1's; where hardly any time or calls are left, only the last step is done.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import AnabranchError, BackendError, DataError, LimitError
from anabranch.routers.contract.ask import Answered, Arm, Messages, Purpose, Said
from anabranch.routers.contract.program import Step
from anabranch.routers.scale.assess import Assessor, View
from anabranch.routers.scale.calls import LateError
from anabranch.routers.scale.decompose import Decomposer, Outline
from anabranch.routers.scale.parsing import boxed, final_content
from anabranch.routers.scale.records import StepRecord, Tokens, Trace
from anabranch.routers.scale.rules import Left, Rule, Score
from anabranch.routers.scale.several import LEAST_TOKENS, Room, Voted, is_cut_off, rules_of, vote
from anabranch.routers.scale.work import Earlier, Work

# Share of the time that must be left for a step that is not the last.
LAST_SHARE = 0.25
# Of the time that is left, what a system may take for whom the other could stand in, and a step that is not the last.
FIRST_SHARE, STEP_SHARE = 0.6, 0.75
# What a step's own answer is asked for as the sender wants it, and what of that the steps before have too.
CARRIED = ("temperature", "top_p", "top_k", "user", "service_tier", "safety_identifier", "prompt_cache_key")

# Places of a step's further answers, between which lie those of attempts.
SAMPLE = 100

UNSCORED = Score(1.0, 0.0, 1.0, is_fallback=True)


@dataclass(slots=True)
class Running:
    """A run. Iterate over `events` to its end; then it has a `trace`.

    Attributes:
        work: what its stages share.
        decomposer, assessor, rule: its parts.
        sender: settings that the last step is asked with; of those `CARRIED` all steps are.
        streams: the last step's answer is given as it comes.
        is_plain: a problem of one step is asked as it came, without words of ours.
        as_it_came: the conversation that such a problem is asked with; None for the problem's.
        final: the last step's answer as it was given; None without one.
    """

    work: Work
    decomposer: Decomposer
    assessor: Assessor
    rule: Rule
    sender: Mapping[str, Any] = field(default_factory=dict)
    streams: bool = False
    is_plain: bool = False
    as_it_came: list[dict[str, Any]] | None = None
    final: Answered | None = None
    outline: Outline | None = None
    records: list[StepRecord] = field(default_factory=list)
    earlier: list[Earlier] = field(default_factory=list)
    scores: dict[int, Score] = field(default_factory=dict)
    is_whole: bool = False
    _has_said: bool = field(default=False, init=False)
    _rule_spent: float = field(default=0.0, init=False)
    _told_budget: str = field(default="", init=False)
    # Of System 2's last step.
    _voted: Voted | None = field(default=None, init=False)

    async def events(self) -> AsyncGenerator[Said | Step, None]:
        """Its trace as it goes, and pieces of the last answer where it streams.

        Raises what its calls failed with where no step could be done, or neither system answers; DataError for a journal of another run.
        """
        work = self.work
        self.outline = outline = await self.decomposer.decompose(work)
        self.work.calls.settle()
        facts = {"steps": len(outline.steps), "chosen": outline.chosen, "candidates": outline.num_candidates}
        yield Step("outline", facts)
        if self.rule.needs_all or work.settings.rescore == "upfront":
            await self._score_upfront()
        for index, step in enumerate(outline.steps):
            is_last = index == len(outline.steps) - 1
            is_short = not is_last and self._is_short()
            score = None if is_short else await self._score(index)
            # A score takes time, and calls.
            if is_short or (not is_last and self._is_short()):
                self.earlier.append(Earlier(step))
                work.note(f"step {index + 1}: left out, for want of time or calls", degrades=True)
                continue
            wanted = self._wanted(index, score)
            answered = None
            try:
                async with aclosing(self._solve(index, wanted)) as coming:
                    async for event in coming:
                        if isinstance(event, Said):
                            yield event
                        else:
                            answered = event
            except (LimitError, LateError) as error:
                if not self.records or self._has_said:
                    raise
                # Money or time is gone: what was found until here is better than nothing, and says that it is not all.
                work.note(f"step {index + 1}: {type(error).__name__}; the rest is not done", degrades=True)
                break
            finally:
                work.calls.settle()
            self._record(index, step, score, wanted, answered)
            yield Step("step", self.records[-1].facts(index))
            self.is_whole = is_last
        yield Step("totals", self._totals())

    @property
    def trace(self) -> Trace:
        """What it did so far."""
        done = self.records[-1:] if self.is_whole else self.records
        text = next((one.answer for one in reversed(done) if one.answer), "")
        found = self.outline or Outline(())
        return Trace(
            problem=self.work.problem.digest,
            outline=found.chosen,
            num_candidates=found.num_candidates,
            steps=tuple(self.records),
            calls=tuple(self.work.calls.made),
            lost=self.work.calls.lost,
            notes=tuple(self.work.notes),
            is_degraded=self.work.is_degraded,
            is_whole=self.is_whole,
            text=text,
            answer=boxed(text) if self.is_whole else None,
        )

    # Scores

    @property
    def _num_steps(self) -> int:
        assert self.outline is not None
        return len(self.outline.steps)

    def _is_forced(self, index: int) -> bool:
        """The last of several steps, where that is System 2's."""
        is_last = index == self._num_steps - 1
        return is_last and self._num_steps > 1 and self.work.settings.force_last == "system2"

    async def _score_upfront(self) -> None:
        """Of all steps that a rule decides on, by their texts; those that no calls are left for count as hard."""
        assert self.outline is not None
        steps, work = self.outline.steps, self.work
        if work.calls.exhausted:
            return
        open_steps = [index for index in range(len(steps)) if not self._is_forced(index)]
        spare = work.calls.left - len(steps)
        if self.assessor.calls and not math.isinf(spare):
            affordable = max(0, int(spare // self.assessor.calls))
            if affordable < len(open_steps):
                work.note(
                    f"score: room for {affordable} of {len(open_steps)} steps; the others count as hard", degrades=True
                )
            open_steps = open_steps[:affordable]
        views = [View(index, steps[index], [Earlier(text) for text in steps[:index]]) for index in open_steps]
        found = await asyncio.gather(*(self.assessor.assess(work, view) for view in views))
        work.calls.settle()
        for view, score in zip(views, found, strict=True):
            if score is None:
                work.note(f"score {view.index + 1}: none could be read; the step counts as hard", degrades=True)
            else:
                self.scores[view.index] = score

    async def _score(self, index: int) -> Score | None:
        """Of the next step; None where nobody has to know: a forced one, and where System 2 is out of reach."""
        work, assessor = self.work, self.assessor
        if self._is_forced(index) or work.calls.exhausted:
            return None
        if work.settings.rescore == "upfront":
            return self.scores.get(index, UNSCORED)
        before = self.scores.get(index)
        if before is not None and not self.records:
            # Nothing is known now that was not known then.
            return before
        if assessor.calls and work.calls.left - assessor.calls < self._num_steps - index:
            work.note(f"score {index + 1}: no calls left for it", degrades=True)
            return before or UNSCORED
        assert self.outline is not None
        view = View(index, self.outline.steps[index], self.earlier, round=int(self.rule.needs_all))
        found = await assessor.assess(work, view)
        work.calls.settle()
        if found is None:
            work.note(f"score {index + 1}: none could be read; the step counts as hard", degrades=True)
        return found or before or UNSCORED

    def _wanted(self, index: int, score: Score | None) -> int:
        """The system that the rule wants, before it is known whether there is room."""
        if self._is_forced(index):
            return 2
        if score is None:
            return 1
        self.scores[index] = score
        later = range(index + 1, self._num_steps if self.rule.needs_all else index + 1)
        scores = [self.scores.get(at, UNSCORED) for at in range(index, later.stop)]
        has_forced = self.rule.needs_all and self._is_forced(self._num_steps - 1)
        left = Left(
            scores=scores,
            costs=[self._extra()] * len(scores),
            is_forced=has_forced,
            num_steps=self._num_steps,
            num_hard=sum(one.system == 2 for one in self.records),
            spent=self._rule_spent,
        )
        return 2 if self.rule.choose(left)[0] else 1

    # Costs

    def _expected(self, system: int) -> float:
        """Tokens of a step's answer in a system: what was seen in this run, with what is expected as one more."""
        seen = [one.completion_tokens for one in self.records if one.system == system and one.wanted == system]
        return (self.work.systems[system].expected_tokens + sum(seen)) / (1 + len(seen))

    def _expected_answer(self) -> float:
        """Tokens of one answer of System 2, likewise; a step may have several."""
        made = self.work.calls.made
        seen = [one.completion_tokens for one in made if (one.stage, one.system, one.status) == ("solve", 2, "ok")]
        return (self.work.systems[2].expected_tokens + sum(seen)) / (1 + len(seen))

    def _extra(self) -> float:
        """What System 2 costs more for a step, in the rule's unit."""
        one, two = self._expected(1), self._expected(2)
        if self.rule.unit == "usd":
            return two * self._price(2) - one * self._price(1)
        return two - one

    def _price(self, system: int) -> float:
        price = self.work.systems[system].usd_per_token
        return 0.0 if price is None else price

    def _pay_rule(self, record: StepRecord) -> None:
        """Of a step of System 2: what it cost more than System 1 was expected to."""
        if record.system == 2:
            usd = record.cost - self._expected(1) * self._price(1)
            self._rule_spent += usd if self.rule.unit == "usd" else record.completion_tokens - self._expected(1)

    # Answers

    def _is_short(self) -> bool:
        """Time or calls are left for hardly more than the last step."""
        left_s = self.work.calls.left_s
        total_s = left_s + self.work.calls.elapsed_s
        if math.isinf(total_s):
            return self.work.calls.left < 2
        return self.work.calls.left < 2 or left_s < LAST_SHARE * total_s or not self.work.calls.has_time_for(2)

    def _can_think(self, index: int) -> bool:
        """Whether the budget has room for System 2; noted once where it has none."""
        used_up = self.work.calls.exhausted or ("tokens" if self.work.calls.room < LEAST_TOKENS else "")
        if used_up and used_up != self._told_budget:
            self._told_budget = used_up
            self.work.note(
                f"step {index + 1}: the budget of {used_up} is used up; System 1 does the rest", degrades=True
            )
        return not used_up

    async def _solve(self, index: int, wanted: int) -> AsyncGenerator[Said | tuple[int, Answered], None]:
        """The answer of the wanted system, else of the other: which it was, and what it says.

        Raises what the last of them failed with.
        """
        work, is_last = self.work, index == self._num_steps - 1
        can_think = self._can_think(index)
        order = [1] if not can_think else [2, 1] if wanted == 2 else [1, 2]
        error: AnabranchError | None = None
        empty: tuple[int, Answered] | None = None
        for attempt, system in enumerate(order):
            if attempt and work.calls.left < 1:
                break
            try:
                share = FIRST_SHARE if attempt < len(order) - 1 else 1.0 if is_last else STEP_SHARE
                async with aclosing(self._asked(index, attempt, system, is_last, share)) as coming:
                    async for event in coming:
                        if isinstance(event, Said):
                            self._has_said = True
                            yield event
                        elif self._has_said or says_something(event):
                            yield system, event
                            return
                        else:
                            empty = system, event
                            work.note(f"step {index + 1}: system {system} gave no answer", degrades=True)
            except DataError:
                raise
            except AnabranchError as failure:
                error = failure
                work.note(f"step {index + 1}: system {system}: {type(failure).__name__}", degrades=True)
                if self._has_said:
                    raise
        if empty is not None and not is_last:
            # The step has no result; those that come may do without.
            yield empty
            return
        raise error or BackendError("neither system gave an answer to the last step")

    async def _asked(
        self, index: int, attempt: int, system: int, is_last: bool, share: float
    ) -> AsyncGenerator[Said | Answered, None]:
        work, found = self.work, self.work.systems[system]
        assert self.outline is not None
        step = self.outline.steps[index]
        sender = self.sender if is_last else {name: self.sender[name] for name in CARRIED if name in self.sender}
        arm = work.arm(system, sender)
        if self.is_plain and self._num_steps == 1:
            messages = work.problem.as_it_came if self.as_it_came is None else self.as_it_came
        else:
            work.fit(system, step, self.earlier)
            messages = work.problem.asked(work.prompt("last" if is_last else "solve", system, step, self.earlier))
        how: dict[str, Any] = {"max_tokens": self._most(system, found.max_tokens), "share": share}
        self._voted = None
        if system == 2 and work.settings.samples2 > 1 and arm.settings.get("temperature") != 0:
            self._voted = await self._several(index, attempt, arm, messages, how)
            yield self._voted.taken
        elif is_last and self.streams:
            streamed = work.calls.stream("solve", index, attempt, system, arm, messages, **how)
            async with aclosing(streamed) as coming:
                async for piece in coming:
                    yield piece
        else:
            purpose: Purpose = "answer" if is_last else "draft"
            yield await work.calls("solve", index, attempt, system, arm, messages, purpose=purpose, **how)

    async def _several(self, index: int, attempt: int, arm: Arm, messages: Messages, how: Mapping[str, Any]) -> Voted:
        """Answers of System 2 to a step, as many as pay and there is room for."""
        calls, later = self.work.calls, self._num_steps - index - 1

        def ask(sample: int, most: int | None) -> Awaitable[Answered]:
            place = attempt + SAMPLE * sample
            return calls("solve", index, place, 2, arm, messages, purpose="draft", **{**how, "max_tokens": most})

        def is_short() -> bool:
            return self._is_short() if later else not calls.has_time_for(1)

        room = Room(calls, most=how["max_tokens"], later=later, is_short=is_short, expected=self._expected_answer)
        voted = await vote(ask, rules_of(self.work.settings, self.scores.get(index)), room)
        if room.is_cut and voted.reason in ("budget", "deadline"):
            self.work.note(f"step {index + 1}: {voted.reason} ended it at {voted.samples} answers", degrades=True)
        return voted

    def _most(self, system: int, own: int | None) -> int | None:
        """Tokens of an answer: the system's, the sender's and, in System 2, what is left of the budget, whichever is least."""
        limits, room = self._limits(own), self.work.calls.room
        if system == 2 and not math.isinf(room):
            limits.append(max(1, int(room)))
        return min(limits, default=None)

    def _limits(self, own: int | None) -> list[int]:
        """Tokens of an answer, as the system and the sender have it."""
        wanted = [self.sender.get(name) for name in ("max_completion_tokens", "max_tokens")]
        return [one for one in (own, *wanted) if type(one) is int and one > 0]

    def _is_cut_by_budget(self, system: int, found: Answered) -> bool:
        """It ended before any limit but that of the budget."""
        if system != 2 or not is_cut_off(found) or math.isinf(self.work.calls.room):
            return False
        return found.completion_tokens < min(self._limits(self.work.systems[2].max_tokens), default=math.inf)

    def _record(
        self, index: int, step: str, score: Score | None, wanted: int, answered: tuple[int, Answered] | None
    ) -> None:
        assert answered is not None
        system, found = answered
        if self._is_cut_by_budget(system, found):
            self.work.note(f"step {index + 1}: the budget of tokens cut its answer off", degrades=True)
        elif system == 2 and is_cut_off(found):
            self.work.note(f"step {index + 1}: its answer was cut off at {found.completion_tokens} tokens")
        answer = final_content(found.text)
        self.earlier.append(Earlier(step, answer or None))
        if index == self._num_steps - 1:
            self.final = found
        calls = [one for one in self.work.calls.made if one.stage == "solve" and one.index == index]
        spent = sum((one.tokens for one in calls), Tokens())
        is_scored = score is not None and not score.is_fallback
        voted = self._voted if system == 2 else None
        self.records.append(
            StepRecord(
                text=step,
                score=None if score is None else score.difficulty,
                p1=None if score is None else score.p1,
                p2=None if score is None else score.p2,
                system=system,
                wanted=wanted,
                is_forced=self._is_forced(index),
                is_scored=is_scored,
                answer=answer,
                prompt_tokens=spent.prompt,
                completion_tokens=spent.completion,
                cost=spent.cost,
                latency_s=sum(one.latency_s for one in calls),
                samples=1 if voted is None else voted.samples,
                agreed=1 if voted is None else voted.agreed,
                stopped=None if voted is None else voted.reason,
            )
        )
        self._pay_rule(self.records[-1])

    def _totals(self) -> dict[str, Any]:
        trace = self.trace
        totals = trace.totals
        told = {
            name: {"prompt": one.prompt, "completion": one.completion, "cost": one.cost, "calls": one.calls}
            for name, one in (("overhead", totals.overhead), ("solving", totals.solving), ("lost", totals.lost))
        }
        notes = [note[:120] for note in trace.notes[:12]]
        return {**told, "is_degraded": trace.is_degraded, "is_whole": trace.is_whole, "notes": notes}


def says_something(found: Answered) -> bool:
    """Whether an answer has words beside its thoughts, or calls tools."""
    message = found.choices[0].get("message")
    return bool(final_content(found.text) or (isinstance(message, Mapping) and message.get("tool_calls")))
