"""What `best_of` learns: at which sample questions of a model and a task are solved first, counted, kept and put together of processes.

A question counts once: when it was verified, as soon as its request is told of; else when somebody scores its answer, which then says
whether the commonest answer was right, and so at which sample it came first.

Names of tasks are the sender's, so only those that the config lists, or that recorded outcomes had, are told apart; all else counts for
the model alone, as far as a key may teach it (a gateway's ``feedback.share``). Where recorded questions have vectors, a prior for each
question is learned too (`difficulty`). Curves are fitted in a thread beside: who decides goes by
what was fitted last.
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Outcome, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Strategy
from anabranch.routers.samples import RIGHT, Drawn, drawn
from anabranch.routers.score_scale import UNIT, ScoreScale
from anabranch.routers.strategies.difficulty import DifficultyEncoder, told_of
from anabranch.test_time import BetaTTSPM, Priors, ends_at_first
from anabranch.test_time.difficulty import odds_left
from anabranch.test_time.priors import ANY, LONGEST

logger = logging.getLogger(__name__)

# Requests that may still be told of.
WAITING = 4096


@dataclass(slots=True)
class Ran:
    """One request's samples.

    Attributes:
        model, task: that they count for.
        tried: samples that came.
        first: place of the first sample that says what was given, from 1; 0 where nothing was given.
        solved: as a verifier said; None where there was none.
        tenant: whose request it was.
        is_counted: once.
    """

    model: str
    task: str | None
    tried: int
    first: int
    solved: bool | None
    tenant: str = ""
    is_counted: bool = False


class Waiting:
    """Requests that may still be told of. When it is full, those go of whoever has most: nobody's push out those of others."""

    def __init__(self) -> None:
        self._by: dict[str, OrderedDict[str, Ran]] = {}
        self._tenant: dict[str, str] = {}

    def put(self, id: str, ran: Ran) -> None:
        """Remember one."""
        self.take(id)
        self._by.setdefault(ran.tenant, OrderedDict())[id] = ran
        self._tenant[id] = ran.tenant
        while len(self._tenant) > WAITING:
            own = self._by[ran.tenant]
            fullest = own if len(own) * len(self._by) >= WAITING else max(self._by.values(), key=len)
            self.take(next(iter(fullest)))

    def get(self, id: str) -> Ran | None:
        """One of them; None if it is not there."""
        tenant = self._tenant.get(id)
        return None if tenant is None else self._by[tenant][id]

    def take(self, id: str) -> None:
        """Remember one no more."""
        tenant = self._tenant.pop(id, None)
        if tenant is not None:
            own = self._by[tenant]
            del own[id]
            if not own:
                del self._by[tenant]


class Beside:
    """A thread for work that nobody waits for, which takes a tenth of a processor at most; what is left as the process ends is not done."""

    def __init__(self) -> None:
        self._works: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="best-of-fits", daemon=True).start()

    def put(self, work: Callable[[], None]) -> None:
        """Have it done after what was put before."""
        self._works.put(work)

    def _run(self) -> None:
        while True:
            work, began = self._works.get(), time.monotonic()
            try:
                work()
            except Exception as error:
                logger.warning("a curve could not be fitted: %s", type(error).__name__)
            del work
            time.sleep(9 * (time.monotonic() - began))


@cache
def _beside(pid: int) -> Beside:
    """One for a process, whatever its number of strategies."""
    return Beside()


class Counting(Strategy):
    """The learning side: whoever answers calls `ran`."""

    @configclass
    class Config(Strategy.Config):
        """What is taken to be so before anything was seen.

        Attributes:
            f_max, a, b: curve of a model on a task nobody has seen, as `BetaTTSPM` has it.
            weight: questions that it counts for.
            tasks: names of tasks (header ``x-task``) that are told apart, beside those of recorded outcomes it was fitted to.
            right: of the scale of scores, from 0 to 1, where an answer begins to count as right.
            scale: scores of the worst and the best answer in recorded outcomes; others are refused. Feedback is from 0 to 1.
            difficulty: whether recorded outcomes teach a prior for each question, from an embedding of its text.
        """

        f_max: float = Field(default=0.9, gt=0, le=1)
        a: float = Field(default=1.0, gt=0, le=1e6)
        b: float = Field(default=1.0, gt=0, le=1e6)
        weight: float = Field(default=20.0, gt=0, le=1e6)
        tasks: tuple[str, ...] = ()
        right: float = Field(default=RIGHT, gt=0, le=1)
        scale: tuple[float, ...] = UNIT
        difficulty: bool = True

    adds_up = True

    @property
    def needs_vector(self) -> bool:  # type: ignore[override]
        """A prior for each question was learned."""
        return bool(self.encoder)

    @property
    def learned_dim(self) -> int | None:
        """See `Strategy`."""
        return self.encoder.dim

    @property
    def learns_vectors(self) -> bool:  # type: ignore[override]
        """See the config."""
        return bool(self.config.difficulty)

    @property
    def in_order(self) -> bool:
        """Whether samples of a question follow from one another, so that their order counts."""
        return False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ScoreScale.of(config.scale)
        # What it started from, what was counted here since, and what others counted.
        self._base, self._own, self._others = self._none(), self._none(), self._none()
        self._all: Priors | None = None
        # What was fitted before others were heard of.
        self._fits = self._none()
        self._tasks = {task[:LONGEST] for task in config.tasks}
        # Tasks of recorded outcomes.
        self._recorded: set[str] = set()
        # Pairs that are being fitted, or will be.
        self._due: set[tuple[str, str]] = set()
        # Models of the outcomes that it was fitted to.
        self._models: tuple[str, ...] = ()
        self._ran = Waiting()
        self.encoder = DifficultyEncoder()
        # Requests run on an event loop, and are told of in a thread.
        self._lock = threading.Lock()

    def _none(self) -> Priors:
        config = self.config
        return Priors(BetaTTSPM(config.f_max, config.a, config.b), weight=config.weight)

    @property
    def priors(self) -> Priors:
        """All that is known."""
        if self._all is None:
            self._all = self._base.plus(self._own).plus(self._others)
            self._all.keep_fits(self._fits)
            self._fits = self._all
        return self._all

    def known(self, model: str, task: str | None) -> tuple[BetaTTSPM, int]:
        """What is known of a model on a task so far, and of how many questions. Takes no time; what is due is fitted beside."""
        priors, task = self.priors, self._told(task)
        # For what others told of; what is learned here has it fitted at once.
        self._fit_beside(priors, model, task)
        return priors.known(model, task), priors.questions(model, task)

    def settle(self) -> None:
        """Fit here and now whatever is due."""
        for pair in [*self.priors, *((model, ANY) for model, _ in self.priors)]:
            self.priors.curve(*pair)

    def _fit_beside(self, priors: Priors, model: str, task: str) -> None:
        for pair in {(model, ANY), (model, task)}:
            if pair not in self._due and priors.is_due(*pair):
                self._due.add(pair)
                _beside(os.getpid()).put(partial(self._fit, priors, pair))

    def _fit(self, priors: Priors, pair: tuple[str, str]) -> None:
        try:
            priors.curve(*pair)
        finally:
            self._due.discard(pair)

    def _told(self, task: str | None) -> str:
        """A task by its name, if it is told apart."""
        name = (task or ANY)[:LONGEST]
        return name if name in self._tasks or name in self._recorded else ANY

    def ran(self, request_id: str, ran: Ran) -> None:
        """Remember what became of a request, until it is told of."""
        if not request_id:
            return
        with self._lock:
            self._ran.put(request_id, ran)

    def observe(self, outcome: Outcome) -> None:
        """Count a question, if by now it is known whether it was solved."""
        id = outcome.query.request_id
        with self._lock:
            found = self._ran.get(id) if id else None
            quality = outcome.quality
            is_right = None if quality is None or not np.isfinite(quality) else quality >= self.config.right
            if found is None:
                # Somebody else answered, or long ago: one sample of that model.
                found = Ran(outcome.model, outcome.query.task, 1, 1, None) if is_right is not None else None
            if found is None or found.is_counted:
                return
            solved = found.solved if found.solved is not None else is_right
            if solved is None or not found.tried:
                return
            found.is_counted = True
        self._count(self._own, found, bool(solved))

    def _count(self, counts: Priors, ran: Ran, solved: bool) -> None:
        tried = max(1, ran.first) if solved else ran.tried
        task = self._told(ran.task)
        counts.add(ran.model, task, tried, solved)
        if self._all is not None:
            self._all.add(ran.model, task, tried, solved)
            self._fit_beside(self._all, ran.model, task)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Count recorded outcomes, a question once for each model, whose answers are its samples. Raises DataError without scores."""
        if not np.isfinite(data.score_NM).any():
            raise DataError(f"{self.name} learns from scores, and the data have none")
        self._base, self._all, self._fits = self._none(), None, self._none()
        self._recorded = {(task or ANY)[:LONGEST] for task in data.task}
        for model in data.models:
            found = drawn(data, model, right=self.config.right, scale=self.config.scale)
            is_in_order = self.in_order or ends_at_first([one.tolist() for one in found.right])
            for task in sorted(set(found.task_Q)):
                self._count_all(found.take(np.flatnonzero(found.task_Q == task)), str(task), is_in_order)
        self.settle()
        self.encoder = DifficultyEncoder()
        if data.vector_ND is not None and self.config.difficulty:
            for model in data.models:
                self._learn_difficulty(
                    drawn(data, model, right=self.config.right, scale=self.config.scale), data.vector_ND, seed
                )
        self._models = data.models
        return self

    def _learn_difficulty(self, found: Drawn, vector_ND: np.ndarray, seed: int) -> None:
        """Of single samples where those of a question do not tell the same of it, whatever their order."""
        curves = {task: self.priors.curve(found.model, str(task)) for task in set(found.task_Q)}
        of_task = {task: (float(curve.value(1)), odds_left(curve)) for task, curve in curves.items()}
        mean_Q, odds_Q = np.array([of_task[task] for task in found.task_Q]).reshape(-1, 2).T
        is_in_order = self.in_order or ends_at_first([one.tolist() for one in found.right])
        # Of questions drawn for until one was right the first sample alone is drawn as any.
        correct_Q = np.array([int(one[0]) for one in found.right]) if is_in_order else found.correct_Q
        samples_Q = np.ones(len(correct_Q), np.int64) if is_in_order else found.samples_Q
        ended_Q2 = None
        if is_in_order:
            ended_Q2 = np.array([[one.any(), one.argmax() + 1 if one.any() else len(one)] for one in found.right], int)
        self.encoder.learn(
            found.model, vector_ND[found.row_Q], correct_Q, samples_Q, mean_Q, odds_Q, ended_Q2=ended_Q2, seed=seed
        )

    def told(self) -> Sequence[str]:
        """Whose questions have a prior of their own."""
        return told_of(self.encoder, self._models) if self.config.difficulty and self._models else ()

    def prior_of(self, query: Query, model: str) -> tuple[BetaTTSPM, Facts]:
        """The curve to go by, of the question itself where there is one, and what is told of it. Raises as `DifficultyEncoder.prior`."""
        curve, num_questions = self.known(model, query.task)
        own = self.encoder.prior(model, query.vector_D, curve)
        used = curve if own is None else own
        facts: Facts = {
            "curve": {"f_max": float(used.f_max), "a": float(used.a), "b": float(used.b)},
            "questions": num_questions,
        }
        if own is not None:
            # Digits that count: of one right sample in a hundred thousand four behind the point show none.
            known = {name: float(f"{of.value(1):.4g}") for name, of in (("chance", own), ("of_task", curve))}
            facts["difficulty"] = known | self.encoder.facts(model)
        return used, facts

    def _count_all(self, found: Drawn, task: str, is_in_order: bool) -> None:
        if not is_in_order:
            self._base.add_samples(found.model, task, found.correct_Q, found.samples_Q)
            return
        for one in found.right:
            self._base.add(found.model, task, int(one.argmax()) + 1 if one.any() else len(one), bool(one.any()))

    # Kept, told and heard

    def state(self) -> tuple[Arrays, Facts]:
        """All counts."""
        arrays, facts = self.priors.state()
        weights, heads = self.encoder.state()
        return {**arrays, **weights}, {**facts, "tasks": sorted(self._recorded), **heads}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        recorded = facts.get("tasks", ())
        if not isinstance(recorded, Sequence) or not all(isinstance(task, str) for task in recorded):
            raise DataError(f"tasks of test-time samples are damaged: {str(recorded)[:80]}")
        read, encoder = self._none(), DifficultyEncoder.of(arrays, facts)
        read.load_state(arrays, facts)
        self.encoder = encoder
        self._recorded = set(recorded)
        read = read.folded(self._tasks | self._recorded)
        self._base, self._own, self._others, self._all = read, self._none(), self._none(), None
        self._fits = read

    def part(self) -> tuple[Arrays, Facts]:
        """What was counted here since the start."""
        return self._own.state()

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """Take what all others counted in the place of what was heard before. Raises InputError, and nothing has changed."""
        self._others, self._all = self._read(arrays, facts), None

    @staticmethod
    def joined(parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """Several parts as one. Raises InputError for what is none."""
        total = Priors()
        for arrays, facts in parts:
            total = total.plus(_read(Priors(), arrays, facts))
        return total.state()

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """Let go of what an earlier part told of: it will be heard. Raises InputError, and nothing has changed."""
        self._own, self._all = self._own.less(self._read(arrays, facts)), None

    def _read(self, arrays: Arrays, facts: Facts) -> Priors:
        return _read(self._none(), arrays, facts).folded(self._tasks | self._recorded)


def _read(into: Priors, arrays: Arrays, facts: Facts) -> Priors:
    if not facts:
        return into
    try:
        into.load_state(arrays, facts)
    except DataError as error:
        raise InputError(str(error)) from None
    return into
