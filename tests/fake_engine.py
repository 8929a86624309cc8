"""An `EngineClient` that answers by script: it says the prompt again, byte for byte, with delays, errors and crashes on demand.

The last byte of the prompt that is a control character decides what happens: see `Script`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import CapacityError, InputError
from anabranch.serving.core.client import EngineInfo, EngineStats
from anabranch.serving.core.request import Finish, Output, Request, TokenLogprob

EOS, VOCABULARY, LAYERS = 256, 257, {1: 4, 3: 4}


@dataclass
class Script:
    """How it behaves.

    Attributes:
        delay_s: before each token.
        start_s: how long loading takes.
        start_fails: starts that fail before one works.
        crash_after: tokens in all after which it dies; None for never.
        bad: ids (their beginning) of requests that end in an error while the engine lives.
        slots: requests that run at once; others wait.
        say: what it answers; None for the prompt.
        endless: goes on with the answer until max_tokens.
        positions: most tokens of prompt and answer.
        width: of the vectors that it makes; None for none.
        layers: experts of each routed layer.
        gauges: what it tells beside the usual ones.
    """

    delay_s: float = 0.0
    start_s: float = 0.0
    start_fails: int = 0
    crash_after: int | None = None
    bad: str = "bad"
    slots: int = 1000
    say: str | bytes | None = None
    endless: bool = False
    positions: int = 4096
    width: int | None = None
    layers: dict[int, int] = field(default_factory=lambda: dict(LAYERS))
    gauges: dict[str, float] = field(default_factory=dict)
    made: list["FakeEngine"] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __call__(self) -> "FakeEngine":
        self.made.append(FakeEngine(self))
        return self.made[-1]


class FakeEngine:
    """See the module."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.aborted: list[str] = []
        self.controls: list[tuple[str, dict[str, Any]]] = []
        self.running: set[str] = set()
        self._ready = self._is_dead = False
        self._slots = asyncio.Semaphore(self.script.slots)
        self._counters = dict.fromkeys(
            ("prompt_tokens", "generation_tokens", "preemptions", "steps", "expert_hits"), 0.0
        )
        self._steps: list[float] = []
        self._left = self.script.crash_after

    @property
    def is_ready(self) -> bool:
        return self._ready and not self._is_dead

    async def start(self) -> EngineInfo:
        await asyncio.sleep(self.script.start_s)
        if self.script.start_fails:
            self.script.start_fails -= 1
            raise CapacityError("no memory")
        self._ready = True
        return EngineInfo(
            model="fake",
            vocab_size=VOCABULARY,
            max_positions=self.script.positions,
            block_tokens=16,
            num_blocks=100,
            stop_tokens=(EOS,),
            routed_layers=self.script.layers,
            pooling=None if self.script.width is None else "last",
            width=self.script.width or 0,
        )

    def kill(self) -> None:
        """Die, as a process that gets a signal."""
        self._is_dead = True

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        begin = time.monotonic()
        self.script.requests.append(request)
        if len(request.prompt) >= self.script.positions:
            raise InputError("the prompt is too long")
        self.running.add(request.id)
        is_over = False
        try:
            async with self._slots:
                async for output in self._answer(request, begin):
                    is_over = output.finish is not None
                    yield output
        finally:
            self.running.discard(request.id)
            if not is_over:
                self.aborted.append(request.id)

    async def _answer(self, request: Request, begin: float) -> AsyncIterator[Output]:
        first = {"cached_tokens": len(request.prompt) // 16 * 16, "queue_s": time.monotonic() - begin}
        self._counters["prompt_tokens"] += len(request.prompt)
        if request.id.startswith(self.script.bad):
            yield Output(id=request.id, finish=Finish.ERROR, error="not a number", **first)
            return
        if request.pooling is not None and self.script.width is not None:
            vector = tuple(1.0 / (1 + place) for place in range(self.script.width))
            yield Output(id=request.id, embedding=vector, finish=Finish.LENGTH, **first)
            return
        tokens = self._tokens(request)
        for scores in self._scores(request):
            await asyncio.sleep(self.script.delay_s)
            yield Output(id=request.id, prompt_logprobs=scores, **first)
            first = {}
        for at, token in enumerate(tokens):
            await asyncio.sleep(self.script.delay_s)
            if self._left is not None:
                self._left -= 1
                self._is_dead = self._is_dead or self._left < 0
            if self._is_dead:
                yield Output(id=request.id, finish=Finish.ERROR, error="the process died", engine_failed=True)
                return
            if request.id in self.aborted:
                yield Output(id=request.id, finish=Finish.ABORT)
                return
            self._counters["generation_tokens"] += 1
            self._counters["steps"] += 1
            self._counters["expert_hits"] += len(self.script.layers)
            self._steps.append(0.001)
            yield self._output(request, token, first if at == 0 else {})
        is_full = len(tokens) >= request.sampling.max_tokens
        yield Output(id=request.id, finish=Finish.LENGTH if is_full else Finish.STOP, **({} if tokens else first))

    def _tokens(self, request: Request) -> list[int]:
        said = self.script.say
        tokens = list(request.prompt) if said is None else list(said.encode() if isinstance(said, str) else said)
        if self.script.endless:
            tokens = tokens * (request.sampling.max_tokens // len(tokens) + 1)
        return tokens[: request.sampling.max_tokens]

    def _scores(self, request: Request) -> list[tuple[TokenLogprob, ...]]:
        """Scores of the prompt, as an engine that computes it in two chunks tells them."""
        most, half = request.sampling.prompt_logprobs, len(request.prompt) // 2
        if most is None:
            return []
        rows = [
            TokenLogprob(
                token=token, logprob=-float(at), top=tuple(((token + k) % 256, -float(k)) for k in range(most))
            )
            for at, token in enumerate(request.prompt[1:], 1)
        ]
        return [tuple(rows[:half]), tuple(rows[half:])]

    def _output(self, request: Request, token: int, first: dict[str, Any]) -> Output:
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.sampling.logprobs is not None:
            top = tuple(((token + at) % 256, -0.5 - at) for at in range(request.sampling.logprobs))
            logprobs = (TokenLogprob(token=token, logprob=-0.5, top=top),)
        routing = (
            ({layer: (token % count, (token + 1) % count) for layer, count in self.script.layers.items()},)
            if request.record_routing
            else ()
        )
        return Output(id=request.id, tokens=(token,), logprobs=logprobs, routing=routing, **first)

    async def abort(self, id: str) -> None:
        self.aborted.append(id)

    def stats(self) -> EngineStats:
        steps, self._steps = self._steps, []
        gauges = {"running": float(len(self.running)), "waiting": 0.0, "kv_usage_ratio": 0.25, **self.script.gauges}
        return EngineStats(
            counters=dict(self._counters),
            gauges=gauges,
            samples={"step_time": steps, "batch_tokens": [1.0] * len(steps)},
        )

    async def control(self, name: str, **arguments: Any) -> Any:
        if name not in ("reset_prefix_cache", "scale"):
            raise InputError(f"no control {name!r}")
        self.controls.append((name, arguments))
        return True

    async def close(self, drain_s: float = 0.0) -> None:
        self._ready = False
