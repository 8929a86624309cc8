"""`Coordinator`: an elastic group as an `EngineClient`, with an autoscaler.

engine = ElasticConfig(model="runs/moe", devices=1).build()
await engine.start()
async for output in engine.submit(request): ...
await engine.control("scale", devices=2)          # while requests are answered
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from anabranch.errors import AnabranchError, ConfigError, InputError
from anabranch.serving.core.client import EngineInfo, EngineStats
from anabranch.serving.core.request import Output, Request
from anabranch.serving.core.stream import Stream
from anabranch.serving.core.turns import Turns
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.fork_server import ForkServer
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.policy import Autoscaler, Load
from anabranch.serving.engine.depths import check_depth
from anabranch.serving.engine.rewired import check_rewired
from anabranch.serving.engine.skips import check_skips
from anabranch.serving.engine.stores import check_visits
from anabranch.serving.engine.variants import check_own_path
from anabranch.serving.grammar import try_out
from anabranch.serving.grammar.forms import key_of, text_of
from anabranch.serving.grammar.store import MOST_WAITING

__all__ = ["Coordinator"]

logger = logging.getLogger(__name__)
_CONTROLS = ("scale", "plan", "standby", "usage", "probe", "reset_prefix_cache")


class Coordinator:
    """See the module.

    Args:
        config: settings.
        on_phase, fork_server: see `Group`.
    """

    def __init__(
        self,
        config: ElasticConfig,
        on_phase: Callable[[str], None] = lambda name: None,
        fork_server: ForkServer | None = None,
    ) -> None:
        self.config = config
        self.autoscaler = Autoscaler(config.policy)
        self._judging = threading.Lock()
        self._trials = Turns(
            "anabranch-trial", "grammars wait to be tried out", threads=8, at_once=2, most_waiting=MOST_WAITING
        )
        self.group = Group(config, self._served, on_phase, fork_server)
        self._met = self._missed = 0
        self._is_draining = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken. They are while devices change, and while a rank that died is replaced."""
        return self.group.ledger.active is not None and not self.group.is_closed and not self._is_draining

    @property
    def is_whole(self) -> bool:
        """Whether nothing is being replaced that answers requests; until it is they are taken, and wait."""
        return self.group.is_serving

    async def start(self) -> EngineInfo:
        """Load, boot and warm up. Raises AnabranchError if it cannot."""
        await asyncio.to_thread(self.group.start)
        if self.config.policy.by != "manual":
            self._watch = asyncio.create_task(self._follow_policy())
        return self.group.info

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        """See `EngineClient.submit`."""
        if not self.is_ready:
            raise InputError("the engine takes no requests now")
        request.check_fields()
        self.group.info.check_streams(request.num_streams)
        if request.adapters or request.task is not None:
            what = "adapters" if request.adapters else "a task"
            raise InputError(f"a request has {what}, and a group of devices serves the model alone; leave it out")
        check_depth(request, self.group.routers)
        check_skips(request, self.group.skipper)
        check_rewired(request, None)
        if request.path is not None:
            self._check_path(request.path)
        # The ranks have no time for what cannot be followed.
        if request.sampling.grammar is not None:
            key_of(request.sampling.grammar)
            text = text_of(request.sampling.grammar)
            await asyncio.wrap_future(self._trials.submit(request.key, try_out, text, request.key))
        loop, ledger = asyncio.get_running_loop(), self.group.ledger
        stream = Stream(
            request.id,
            pause=ledger.pause_request,
            resume=ledger.resume_request,
            abort=ledger.abort,
            buffer=request.buffer,
            stall_s=request.stall_s,
        )

        def emit(output: Output) -> None:
            # The loop has ended, and with it whoever waited.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stream.push, output)

        ledger.submit(request, emit)
        with stream:
            while not stream.is_over:
                yield await stream.take()

    def _check_path(self, path: Sequence[int]) -> None:
        """Raise InputError for a path that no rank can run."""
        info = self.group.info
        try:
            check_own_path(path, info.num_layers)
            check_visits(len(path), info.max_depth or info.num_layers)
        except ConfigError as error:
            raise InputError(str(error)) from None

    async def abort(self, id: str) -> None:
        """End a request."""
        self.group.ledger.abort(id)

    def stats(self) -> EngineStats:
        """How the group is."""
        stats = self.group.counts.stats(self.group)
        stats.counters |= {"elastic_slo_met": self._met, "elastic_slo_missed": self._missed}
        return stats

    async def control(self, name: str, **arguments: Any) -> Any:
        """Commands: ``scale`` (devices, lost, mode), ``plan`` (the same, done to nothing), ``standby`` (devices), ``usage``, ``probe``
        (tokens), ``reset_prefix_cache``. Raises InputError for others, BackendError for a change that failed.
        """
        run = getattr(self, f"_control_{name}", None) if name in _CONTROLS else None
        if run is None:
            raise InputError(f"no control {name!r}; known: {', '.join(_CONTROLS)}")
        try:
            return await asyncio.to_thread(run, **arguments)
        except TypeError as error:
            raise InputError(f"control {name!r}: {error}") from None

    async def close(self, drain_s: float = 0.0) -> None:
        """See `EngineClient.close`."""
        self._is_draining = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.to_thread(self.group.close, drain_s)
        self._trials.close()

    def _control_scale(self, devices: Any, lost: Any = (), mode: str | None = None) -> dict[str, Any]:
        target = devices if isinstance(devices, int) else tuple(devices)
        report = self.group.scale(target, lost=tuple(lost), mode=mode)
        with self._judging:
            self.autoscaler.changed(time.monotonic())
        return {name: value for name, value in dataclasses.asdict(report).items() if name != "started"}

    def _control_plan(self, devices: Any, lost: Any = ()) -> str:
        return str(self.group.plan(devices if isinstance(devices, int) else tuple(devices), tuple(lost)))

    def _control_standby(self, devices: Any) -> list[tuple[int, ...]]:
        self.group.prepare_standby(devices if isinstance(devices, int) else tuple(devices))
        return self.group.standby.configurations()

    def _control_usage(self) -> dict[str, Any]:
        assert self.group.memory is not None
        return self.group.memory.usage()

    def _control_probe(self, tokens: Any) -> dict[int, Any]:
        assert self.group.ledger.active is not None
        return self.group.ledger.active.all("probe", tokens=tuple(tokens))

    def _control_reset_prefix_cache(self) -> int:
        assert self.group.ledger.active is not None
        return sum(self.group.ledger.active.all("reset_prefix_cache").values())

    def _served(self, ttft_s: float, tpot_s: float) -> None:
        with self._judging:
            if self.autoscaler.served(time.monotonic(), ttft_s, tpot_s):
                self._met += 1
            else:
                self._missed += 1

    async def _follow_policy(self, every_s: float = 0.25) -> None:
        """Ask the policy from time to time, and do what it says."""
        while True:
            await asyncio.sleep(every_s)
            ledger = self.group.ledger
            load = Load(len(self.group.devices), ledger.num_running, ledger.num_waiting, self.config.max_seqs)
            clock = time.localtime()
            with self._judging:
                wanted = self.autoscaler.decide(time.monotonic(), load, clock.tm_hour + clock.tm_min / 60)
            if wanted != load.devices:
                try:
                    await asyncio.to_thread(self._control_scale, wanted)
                except AnabranchError as error:
                    logger.warning("the policy wanted %d devices: %s", wanted, error)
                    with self._judging:
                        # Cool down before the next attempt.
                        self.autoscaler.changed(time.monotonic())
