"""Goes through stored questions: who may be asked, what was answered, what that is worth."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError, InputError
from anabranch.gateway.collect.calls import Calls, OutOfBudgetError, Said
from anabranch.gateway.collect.labels import Labels
from anabranch.gateway.collect.origins import Answers, Origin, may_ask, told_requests
from anabranch.gateway.collect.table import Table
from anabranch.gateway.config import GatewayConfig, StrategyConfig
from anabranch.gateway.store import COLLECT, KeyRecord
from anabranch.routers.judges import HUMAN, Judge, verdict
from anabranch.routers.money import dollars
from anabranch.routers.strategies.training import share

if TYPE_CHECKING:
    from anabranch.gateway.gateway import Gateway

# Questions in a row that were asked and came to nothing, after which there is no use in going on.
IN_VAIN = 10

# Of what went wrong: kinds that are told, and characters of one.
REASONS, SHOWN = 3, 200
NO_TEXTS = (
    "the store holds no texts of requests: set prompts = true under [log] of the gateway's config; what is asked from then on can be "
    "collected"
)


@dataclass(slots=True)
class Collected:
    """What a run came to.

    Attributes:
        questions: written in this run.
        there: written before.
        calls: made to answer, without the judge's.
        reused: answers that were there already.
        judge_calls: made to judge.
        judge_reused: judgements that were there already.
        cost_usd: dollars of all calls of this run, also of those that brought nothing.
        unjudged: questions that the judge knows nothing of, or said nothing clear about.
        failed: questions that a model did not answer.
        waiting: questions whose answers a person has still to judge, at ``/ui/label``.
        not_allowed: questions of keys that may not use all of the models.
        unreadable: the first judgements that said nothing clear, cut short; "" where the judge gave no answer.
        unanswered: how often a model, or the judge, gave no answer, by its name and why.
        stopped: why the run ended before its end; "" if it did not.
        wait_s: seconds after which it may go on; None if waiting does not help.
    """

    questions: int = 0
    there: int = 0
    calls: int = 0
    reused: int = 0
    judge_calls: int = 0
    judge_reused: int = 0
    cost_usd: float = 0.0
    unjudged: int = 0
    failed: int = 0
    waiting: int = 0
    not_allowed: int = 0
    unreadable: list[str] = field(default_factory=list)
    unanswered: dict[str, int] = field(default_factory=dict)
    stopped: str = ""
    wait_s: float | None = None


def for_collecting(config: GatewayConfig) -> GatewayConfig:
    """A gateway's config for a collector beside it: the operator's, so without keys, and each model answers for itself alone."""
    cache = config.cache.replace(exact=False, semantic=False)
    strategies = {"static": StrategyConfig(use="static")}
    return config.replace(
        require_key=False,
        fallbacks={},
        ab={},
        cache=cache,
        strategies=strategies,
        default_strategy=None,
        embedder=None,
        shadow=None,
    )


class Collector:
    """Asks and judges.

    Every call is a request of the gateway like any other: money is reserved for it, it has a row in the ledger, and it carries the tag
    ``collect``, whose budget is the collector's own. What users were told, and what any earlier run has paid for, answers and
    verdicts, is found again and not asked.

    Args:
        gateway: started, with a config of `for_collecting`; its store holds the questions.
        models: to be compared.
        judge: of the answers.
        per_minute: calls, the judge's among them.
        max_tokens: of an answer; None for the model's.
        told: called with a sentence after each question.
        tag: of the calls.

    Raises InputError for fewer than two models, one that the config does not have, or more tokens than its limit.
    """

    def __init__(
        self,
        gateway: "Gateway",
        models: Sequence[str],
        judge: Judge,
        *,
        per_minute: float = 60.0,
        max_tokens: int | None = None,
        told: Callable[[str], None] = lambda text: None,
        tag: str = COLLECT,
    ) -> None:
        known = [model.name for model in gateway.config.models]
        if unknown := [name for name in (*models, *judge.models) if name not in known]:
            raise InputError(f"there is no model {unknown[0]!r} in the config; it has {', '.join(known)}")
        if len(set(models)) < 2:
            raise InputError(f"{len(set(models))} model is nothing to compare; name at least two")
        most = gateway.config.limits.most_tokens
        if max_tokens is not None and not 1 <= max_tokens <= most:
            raise InputError(f"max_tokens is {max_tokens}; it must be 1 to {most:,}, the limit of the config")
        self.gateway, self.models, self.judge = gateway, tuple(dict.fromkeys(models)), judge
        self._calls, self._told, self._labels = Calls(gateway, per_minute, tag), told, Labels(gateway.store)
        self._max_tokens = max_tokens
        self._fields: Mapping[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        self.done = Collected()
        # Questions that this collector has done with; what came to nothing is left to the next one. And those that it passed over for a
        # key: what one key may not, another may.
        self._tried: set[str] = set()
        self._passed: set[tuple[str, str]] = set()

    async def run(
        self, out: Path, *, limit: int | None = None, share_of: float = 1.0, since_s: float = 0.0, waits: bool = False
    ) -> Collected:
        """Go through the stored questions, oldest first; called again, through those that have come since.

        Args:
            out: JSON lines; made, or gone on with.
            limit: questions to add at most.
            share_of: of the questions that are looked at, always the same ones.
            since_s: unix second from which on.
            waits: for questions to come; else a store without texts is an error.

        Raises DataError if ``out`` cannot be written or is of something else, the store holds no texts, or another run is at work.
        """
        with self.gateway.store.alone(COLLECT) as is_alone, Table.open(out, self.models, self.judge.name) as table:
            if not is_alone:
                raise DataError("another anabranch gateway collect is at work on this store; wait for its end")
            self.done.there = table.lines - self.done.questions
            self.done.stopped, self.done.wait_s, self.done.waiting = "", None, 0
            try:
                any_text = await self._through(table, limit, share_of, since_s)
            finally:
                self.note_calls()
            if not any_text and not table.lines and not waits:
                raise DataError(NO_TEXTS)
        return self.done

    def note_calls(self) -> None:
        """Bring ``done`` up to what the calls came to."""
        self.done.cost_usd = dollars(self._calls.spent_nano)
        self.done.unanswered = dict(self._calls.unanswered.most_common(REASONS))

    async def _through(self, table: Table, limit: int | None, share_of: float, since_s: float) -> bool:
        """All questions that are not in the table; whether there was any text."""
        store = self.gateway.store
        keys = {key.id: key for key in await store.keys()}
        answers, any_text, in_vain, secret = Answers(), False, 0, await store.secret(COLLECT)
        async for origin in told_requests(store, 0):
            answers.note(origin)
        async for origin in told_requests(store, int(since_s * 1e6)):
            any_text = True
            key = origin.identity
            if key in self._tried or (key, origin.key_id) in self._passed or table.has(key, origin.request_id):
                continue
            # Keyed, or who asks could choose words that are drawn.
            if share(COLLECT, secret, key) >= share_of:
                continue
            if limit is not None and self.done.questions >= limit:
                break
            if origin.key_id and origin.key_id not in keys:
                # Made since; one that is not there at all stays away.
                keys = {key.id: key for key in await store.keys()}
            # What is passed over costs nothing; what is asked in vain does.
            if not self.may_collect(origin, keys.get(origin.key_id)):
                self._passed.add((key, origin.key_id))
                continue
            waiting = self.done.waiting
            try:
                line = await self.outcome(origin, answers)
            except OutOfBudgetError as error:
                self.done.stopped, self.done.wait_s = str(error), error.wait_s
                break
            if self.done.waiting > waiting:
                continue
            self._tried.add(key)
            in_vain = in_vain + 1 if line is None else 0
            if line is not None:
                table.add(key, line)
                self.done.questions += 1
                self._told(f"{self.done.questions + self.done.there} questions, {self.done.calls} calls")
            if in_vain >= IN_VAIN:
                self.done.stopped = (
                    f"{IN_VAIN} questions in a row came to nothing ({self.done.failed} of all were not answered, {self.done.unjudged} not "
                    f"judged); see to the models, or to the judge, {self.judge.name}{self._commonest()}"
                )
                break
        return any_text

    def _commonest(self) -> str:
        """Which failed most, for who may leave a model out."""
        why = next((why for why, _ in self._calls.unanswered.most_common(1)), None)
        return "" if why is None else f". Most often {why}; --model NAME, once for each of the others, leaves one out"

    def may_collect(self, origin: Origin, key: KeyRecord | None) -> bool:
        """Whether all models, the judge's too, may see a question, and the judge knows what to say of it."""
        if not may_ask(key, origin.key_id, (*self.models, *self.judge.models)):
            self.done.not_allowed += 1
            return False
        if not self.judge.knows(origin.shown):
            self.done.unjudged += 1
            # Whoever asks it.
            self._tried.add(origin.identity)
            return False
        return True

    async def outcome(self, origin: Origin, answers: Answers) -> dict[str, Any] | None:
        """The line of a question, see `anabranch.routers.data.jsonl`; None if it cannot be had. Raises OutOfBudgetError.

        Args:
            origin: of the question, which `may_collect` lets through.
            answers: of users that need not be asked for.
        """
        asked = (self._answer(origin, model, answers) for model in self.models)
        found = await asyncio.gather(*asked, return_exceptions=True)
        # Only once all are there: what the others said is paid for, and in the store.
        for one in found:
            if isinstance(one, BaseException):
                raise one
        answers_of = {model: one for model, one in zip(self.models, found, strict=True) if isinstance(one, Said)}
        if len(answers_of) < len(self.models):
            self.done.failed += 1
            return None

        heard: list[str] = []

        async def judged(model: str, prompt: str) -> str:
            if model == HUMAN:
                heard.append(await self._labels.ask(prompt, origin.asked_us, origin.request_id))
                return heard[-1]
            messages, fields = [{"role": "user", "content": prompt}], {"temperature": 0}
            said = await self._calls.find(model, messages, fields)
            if said is None:
                self.done.judge_calls += 1
                said = await self._calls.make(model, messages, fields, origin.asked_us)
            else:
                self.done.judge_reused += 1
            heard.append("" if said is None else said.text)
            return heard[-1]

        scores = await self.judge.scores(origin.shown, {model: one.text for model, one in answers_of.items()}, judged)
        if scores is None and not self.judge.models and "" in heard:
            self.done.waiting += 1
            return None
        if scores is None:
            self.done.unjudged += 1
            if self.judge.models:
                self._note_unreadable(heard)
            return None
        return {
            "query": origin.query,
            "task": origin.task,
            "scores": scores,
            "cost": {model: one.cost for model, one in answers_of.items()},
            "tokens": {model: list(one.tokens) for model, one in answers_of.items()},
            "latency": {model: one.latency_s for model, one in answers_of.items()},
            "answers": {model: one.text for model, one in answers_of.items()},
            "judge": self.judge.name,
            "request_id": origin.request_id,
            **({} if origin.is_plain else {"messages": origin.messages}),
        }

    def _note_unreadable(self, heard: Sequence[str]) -> None:
        """Keep the first judgement of a question that could not be read: the end, where it should be."""
        text = next((text for text in heard if verdict(text) is None), "")
        shown = " ".join(text.split())[-SHOWN:]
        if len(self.done.unreadable) < REASONS and shown not in self.done.unreadable:
            self.done.unreadable.append(shown)

    async def _answer(self, origin: Origin, model: str, answers: Answers) -> Said | None:
        said = await answers.of(origin, model, self.gateway.store)
        if said is not None and self._max_tokens is not None and said.tokens[1] > self._max_tokens:
            said = None
        if said is None:
            said = await self._calls.find(model, origin.messages, self._fields)
        if said is not None:
            self.done.reused += 1
            return said
        self.done.calls += 1
        return await self._calls.make(model, origin.messages, self._fields, origin.asked_us, origin.task)
