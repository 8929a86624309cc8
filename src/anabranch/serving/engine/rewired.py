"""`RewiredRequests`: requests whose routers are turned to their own text, before they begin and each so many tokens (phase 1).

The steps that fit vectors run beside the engine's, in a thread of their own, one request at a time and the keys in turn: the others go on
meanwhile, and are told nothing. A request whose vectors have changed computes its keys and values anew, as one that was preempted, so that
they are always those of the vectors that it has, whoever is beside it.

Su et al.: "Rewiring Experts on the Fly", 2025, arXiv 2510.14853; `anabranch.adapters.rewiring`.
"""

import copy
import itertools
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring, RewiringState
from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.routing.override import Override
from anabranch.serving.core.batch import Batch, Sampled
from anabranch.serving.core.client import EngineStats, FieldInputError
from anabranch.serving.core.hooks import RequestOverride
from anabranch.serving.core.queue import WaitingQueue
from anabranch.serving.core.request import Output, Request
from anabranch.serving.core.rewires import Rewires
from anabranch.serving.engine.overrides import OPTION
from anabranch.serving.rewiring import RewiringConfig

__all__ = ["RewiredRequests", "check_rewired"]

# Of a setting of a request.
_FIELD = re.compile(r"rewire\.\w+")


class _DroppedError(Exception):
    """Nobody waits for a phase any longer."""


@dataclass(eq=False)
class _Phase:
    """A phase 1 that is to be run: of one request that goes on, or of all that begin with the same prompt.

    ``rank``, ``own_priority``, ``key`` and ``cost`` are for `WaitingQueue`; ``waiting`` are futures by request.
    """

    rank: tuple[int, float, int]
    own_priority: int
    key: str
    cost: int
    context: tuple[int, ...]
    state: RewiringState
    config: Rewiring
    waiting: dict[str, "Future[Request | None]"] = field(default_factory=dict)

    @property
    def is_wanted(self) -> bool:
        return any(not future.done() for future in list(self.waiting.values()))


@dataclass
class _Rewired:
    """A request, as it goes on: what it says now, its text, how it is turned, what the phase under way of it is, and overrides by layer."""

    request: Request
    text: list[int]
    options: tuple[tuple[str, str], ...]
    serial: int
    state: RewiringState
    config: Rewiring
    phase: _Phase | None = None
    turns: int = 0
    num_told: int = 0
    routing: Mapping[int | str, Override] = field(default_factory=dict)


class RewiredRequests:
    """An `OverrideHook` of the engine's runner, and what its loop asks when requests begin and go on.

    Args:
        model: as the runner runs it; from now on none of its weights wants a gradient.
        config: how, and what requests may say of it for themselves.

    Raises ConfigError for a model without routers of experts, or through which no gradient comes.
    """

    def __init__(self, model: Decoder, config: RewiringConfig) -> None:
        self._config, self.config, self._device = config, config.rewiring, model.embedding.weight.device
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._rerouter = Rerouter(_beside(model), self.config)
        self._requests: dict[str, _Rewired] = {}
        # Phases of prompts that wait, by salt, prompt and how they are turned from where: chains that begin alike are fitted once.
        self._first: dict[tuple[Any, ...], _Phase] = {}
        # What was asked for last, and what was read of it: a request is read as it is looked at, and again as it begins.
        self._asked: tuple[Rewires, tuple[Rewiring, RewiringState]] | None = None
        self._serial = itertools.count()
        # Of the queue, what begins alike, and the counts.
        self._lock = threading.Lock()
        self._queue: WaitingQueue[_Phase] = WaitingQueue()
        self._worker = ThreadPoolExecutor(1, "anabranch-rewiring")
        self._is_closed = False
        self._counts = {"rewiring_phases": 0.0, "rewiring_steps": 0.0, "rewiring_seconds": 0.0}
        self._try_out()

    def _try_out(self) -> None:
        """Raise ConfigError where no gradient comes, before anybody asks."""
        rerouter = Rerouter(self._rerouter.model, Rewiring(steps=1, guard=False))
        rerouter.adapt([[0, 0]], [rerouter.new_state()])

    # In the loop's thread

    def read(self, wanted: bool | Rewires) -> tuple[Rewiring, RewiringState]:
        """How a request that wants it is turned, and where it begins. Raises FieldInputError for what cannot be, or not here."""
        if not isinstance(wanted, Rewires):
            return self.config, self._rerouter.new_state()
        if self._asked is None or self._asked[0] is not wanted:
            self._asked = wanted, self._read(wanted)
        config, state = self._asked[1]
        return config, state.copy()

    def _read(self, wanted: Rewires) -> tuple[Rewiring, RewiringState]:
        try:
            config = self._config.of_request(wanted.settings) if wanted.settings else self.config
        except ConfigError as error:
            field = str(error).split(" ", 1)[0]
            raise FieldInputError(str(error), field if _FIELD.fullmatch(field) else "rewire") from None
        if wanted.state is None:
            return config, self._rerouter.new_state()
        try:
            return config, self._rerouter.state_from_told(wanted.state)
        except ConfigError as error:
            raise FieldInputError(f"rewire.state cannot be gone on with: {error}", "rewire.state") from None

    def prepare(self, request: Request) -> "Future[Request | None] | None":
        """Begin a request: fit its vectors to its prompt. None for one that is computed as ever."""
        if not request.rewires:
            return None
        config, state = self.read(request.rewires)
        one = _Rewired(request, list(request.prompt), request.options, next(self._serial), state, config)
        if not state.is_zero:
            one.routing = self._overrides(state)
        self._requests[request.id] = one
        future: Future[Request | None] = Future()
        begins = (state.steps, state.seconds, *(delta_E.numpy().tobytes() for delta_E in state.delta))
        where = (request.cache_salt, request.prompt, config, begins)
        with self._lock:
            phase = self._first.get(where)
            if phase is None or not phase.is_wanted:
                phase = self._first[where] = self._phase(one, request.prompt)
                self._add(phase)
            phase.waiting[request.id] = future
            # Within the lock: a phase that ends tells those alone whose phase it is.
            one.phase = phase
        return future

    def bind(self, request: Request) -> Request:
        """The request as the scheduler gets it: nobody shares its keys and values, and after so many new tokens it waits to be turned."""
        one = self._requests.get(request.id)
        if one is None:
            return request
        one.options = request.options
        one.request = replace(request, options=self._options(one), turn_every=one.config.interval)
        return one.request

    def turn(self, output: Output) -> "Future[Request | None] | None":
        """Take note of news of a request; where its next phase 1 is due, what it waits for: how it goes on, None for as before."""
        one = self._requests.get(output.id)
        if one is None:
            return None
        output.rewiring = tuple(self._told(one))
        wanted = one.request.rewires
        if isinstance(wanted, Rewires) and wanted.returns_state:
            if output.finish is not None or (wanted.may_be_cut and output.rewiring):
                output.rewire_state = self._rerouter.told_state(one.state)
        one.text += output.tokens
        num_new, interval = len(one.text) - len(one.request.prompt), one.config.interval
        if not output.tokens or output.finish is not None or interval is None or num_new % interval:
            return None
        future: Future[Request | None] = Future()
        with self._lock:
            one.phase = self._phase(one, tuple(one.text))
            one.phase.waiting[output.id] = future
            self._add(one.phase)
        return future

    def release(self, id: str) -> None:
        """A request has ended."""
        one = self._requests.pop(id, None)
        if one is not None and one.phase is not None and id in one.phase.waiting:
            one.phase.waiting[id].cancel()

    def _told(self, one: _Rewired) -> list[dict[str, Any]]:
        new = one.state.phases[one.num_told :]
        one.num_told = len(one.state.phases)
        return [{name: _finite(value) for name, value in asdict(phase).items()} for phase in new]

    def _options(self, one: _Rewired) -> tuple[tuple[str, str], ...]:
        # A number of its own for each time that its vectors change.
        return (*one.options, (OPTION, f"rewired {one.serial} {one.turns}"))

    def _phase(self, one: _Rewired, context: tuple[int, ...]) -> _Phase:
        request = one.request
        rank = (request.priority, request.arrival or time.monotonic(), one.serial)
        # Whoever takes more steps waits for it more often than others.
        cost = max(1, len(context)) * one.config.steps
        return _Phase(rank, request.own_priority, request.key, cost, context, one.state, one.config)

    def _add(self, phase: _Phase) -> None:
        self._queue.add(phase)
        # Closed: the future is cancelled with its request.
        with suppress(RuntimeError):
            self._worker.submit(self._run_next)

    # In the thread that fits

    def _run_next(self) -> None:
        with self._lock:
            phase = self._queue.pop()
        try:
            state = phase.state.copy()
            self._rerouter.adapt([phase.context], [state], clock=lambda: self._clock(phase), config=phase.config)
        except _DroppedError:
            self._end(phase)
            for future in list(phase.waiting.values()):
                future.cancel()
        except BaseException as error:
            self._end(phase)
            for future in list(phase.waiting.values()):
                with suppress(InvalidStateError):
                    future.set_exception(error)
        else:
            self._end(phase, state)
            for id, future in list(phase.waiting.items()):
                one = self._requests.get(id)
                # It was aborted, and its id may have come again.
                if one is not None and one.phase is phase:
                    with suppress(InvalidStateError):
                        future.set_result(self._turned(one, state.copy()))

    def _end(self, phase: _Phase, state: RewiringState | None = None) -> None:
        """Whoever begins alike from now on is fitted anew."""
        with self._lock:
            for where, first in list(self._first.items()):
                if first is phase:
                    del self._first[where]
            self._counts["rewiring_phases"] += 1
            if state is not None:
                self._counts["rewiring_steps"] += state.own_steps - phase.state.own_steps
                self._counts["rewiring_seconds"] += state.own_seconds - phase.state.own_seconds

    def _clock(self, phase: _Phase) -> float:
        """Looked at before each step."""
        if self._is_closed or not phase.is_wanted:
            raise _DroppedError
        return time.perf_counter()

    def _turned(self, one: _Rewired, state: RewiringState) -> Request | None:
        """Give a request its new vectors; how it goes on, None where they are the old ones. It is in no step."""
        is_same = all(torch.equal(old_E, new_E) for old_E, new_E in zip(one.state.delta, state.delta, strict=True))
        one.state = state
        if is_same:
            return None
        one.turns += 1
        one.routing = self._overrides(state)
        return replace(one.request, options=self._options(one))

    def _overrides(self, state: RewiringState) -> dict[int | str, Override]:
        """What a row with these vectors has, by router."""
        return {
            name: Override(logit_NE=delta_E.to(self._device))
            for name, delta_E in zip(self._rerouter.names, state.delta, strict=True)
        }

    # In the runner's

    def before_step(self, batch: Batch, tokens: Sequence[int]) -> None:
        """See `StepHook`."""

    def override(self, batch: Batch, tokens: Sequence[int]) -> Mapping[str, RequestOverride]:
        """See `OverrideHook`."""
        found = {chunk.id: self._requests.get(chunk.id) for chunk in batch.chunks}
        return {
            id: RequestOverride(routing=one.routing) for id, one in found.items() if one is not None and one.routing
        }

    def after_step(self, batch: Batch, sampled: Sequence[Sampled]) -> None:
        """See `StepHook`."""

    def close(self) -> None:
        """The engine ends."""
        self._is_closed = True
        self._worker.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> EngineStats:
        """Phases 1 that were run, steps in them and seconds."""
        with self._lock:
            return EngineStats(counters=dict(self._counts))


def _beside(model: Decoder) -> Decoder:
    """Modules of their own with the numbers of ``model``: what a step changes of its modules while it runs is of no account to them."""
    numbers = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(one): one for one in numbers})


def _finite(value: Any) -> Any:
    """What is no number is None, as JSON has it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_rewired(request: Request, rewired: RewiredRequests | None) -> None:
    """Raise FieldInputError for a request that cannot have what it asks for."""
    if not isinstance(request.rewires, bool | Rewires):
        raise InputError(f"rewires is {request.rewires!r:.80}; it must be True or False, or a table of settings")
    if not request.rewires:
        return
    if rewired is None:
        raise FieldInputError("rewire is set, but the server turns no routers (--rewire); leave it out", "rewire")
    others = {
        "adapters": request.adapters,
        "task": request.task,
        "num_streams": request.num_streams,
        "depth": request.path,
        "pooling": request.pooling,
    }
    taken = next((name for name, value in others.items() if value not in (None, ())), None)
    if request.routes_depth or request.skips_tokens:
        taken = "depth"
    if taken is not None:
        raise FieldInputError(f"rewire is set, which does not go with {taken}; leave one of them out", "rewire")
    rewired.read(request.rewires)
