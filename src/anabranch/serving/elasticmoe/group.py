"""`Group`: the memory manager, the active instance, those on standby, and the change from one to the next.

    command -> plan -> prepare (peer copies, beside: take or boot the instance) -> attach -> warm -> switch -> release -> commit

Until the switch nothing that serves is touched; whatever fails before leaves the old instance as it was, with new memory let go. A
failure after it, or of the active instance at any time, is a recovery (`anabranch.serving.elasticmoe.recovery`).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from anabranch.errors import BackendError, CheckpointError, InputError
from anabranch.lm.checkpoint import find_model
from anabranch.lm.seen_model import check_unchanged, see_model
from anabranch.serving.core.request import Finish
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.counts import Counts
from anabranch.serving.elasticmoe.fork_server import ForkServer
from anabranch.serving.elasticmoe.instance import Event, Instance, InstanceError, Standby
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.ledger import Ledger
from anabranch.serving.elasticmoe.memory import MemoryManager, Which
from anabranch.serving.elasticmoe.plan import Placement, ScalePlan, check_memory, place, plan_scale
from anabranch.serving.elasticmoe.rank_boot import Boot
from anabranch.serving.elasticmoe.recovery import FAULTS, recover, recover_if_broken, recover_memory
from anabranch.serving.elasticmoe.report import ScaleReport
from anabranch.serving.elasticmoe.sizes import backend_for, sizes_of
from anabranch.serving.elasticmoe.switch import drain, migrate
from anabranch.serving.elasticmoe.watchdog import Watchdog, Watched, in_thread
from anabranch.serving.elasticmoe.wire import ChannelClosedError

__all__ = ["Group", "ScaleReport"]

logger = logging.getLogger(__name__)

# For a fork server to import what ranks need, on a busy machine.
START_S = 120.0
PHASES = ("plan", "prepare", "attach", "warm", "switch", "release", "commit")


class Group:
    """An elastic group of devices. Methods may be called from any thread; changes of devices are done one after the other.

    Args:
        config: settings.
        served: told (time to first token, mean time per later token) of each request.
        on_phase: told of the start of each phase; for tests and traces. What it raises ends the change.
        fork_server: makes processes; None for one of its own.
    """

    def __init__(
        self,
        config: ElasticConfig,
        served: Callable[[float, float], None] = lambda ttft_s, tpot_s: None,
        on_phase: Callable[[str], None] = lambda name: None,
        fork_server: ForkServer | None = None,
    ) -> None:
        self.config, self.on_phase = config, on_phase
        # Once: a training run may have a newer checkpoint at any time.
        found = find_model(config.model)
        seen, beside = see_model(found), config.depth.seen()
        self.layout = layout_of(found, backend_for(config).page)
        self.limits, info, self.kv_bytes = sizes_of(config, self.layout)
        self.info = replace(info, files=seen, beside=beside)
        # Once, too.
        self.routers, self.skipper = _read_depth(config.depth)
        if changed := beside.difference(config.depth.seen()):
            raise CheckpointError(f"{changed} is another file than when it was read; start again, once it is written")
        self.ledger = Ledger(self.limits, self.info.vocab_size, served)
        self.counts = Counts()
        self.standby = Standby(config.standby)
        self._own_fork_server, self.fork_server = fork_server is None, fork_server
        self.memory: MemoryManager | None = None
        self.placement: Placement | None = None
        # The instance of a change that is under way.
        self.coming: Instance | None = None
        self.is_closed = False
        self.reports: list[ScaleReport] = []
        # Held by whoever changes or mends the group.
        self.operator = threading.RLock()
        self._forking = threading.Lock()
        self._ahead: threading.Thread | None = None
        self._watchdog: Watchdog | None = None

    @property
    def devices(self) -> tuple[int, ...]:
        """Those of the active configuration; none before `start`."""
        return self.placement.devices if self.placement is not None else ()

    @property
    def is_serving(self) -> bool:
        """Whether an instance is active and whole."""
        active = self.ledger.active
        return active is not None and not active.is_broken and not self.is_closed

    @property
    def pids(self) -> list[int]:
        """All processes: ranks that serve, come or stand by, memory manager, fork server."""
        instances = [self.ledger.active, self.coming, *self.standby.instances()]
        found = [pid for each in instances if each is not None for pid in each.pids.values()]
        found += [self.memory.process.pid] if self.memory is not None else []
        found += [self.fork_server.pid] if self.fork_server is not None and self.fork_server.pid is not None else []
        return sorted(set(found))

    # Life

    def start(self) -> None:
        """Load, boot, warm up and serve. Raises AnabranchError if it cannot."""
        with self.operator:
            self.placement = place(self.layout.num_experts, len(self.layout.layers), range(self.config.devices))
            plan = plan_scale(self.placement, self.devices, expert_bytes=self.layout.expert_bytes)
            self._check_memory(plan)
            self.memory = self.start_memory()
            try:
                instance = self.boot(self.devices)
                self.memory.load(self.placement)
                self.bring_up(instance, "current")
                instance.all("start")
            except BaseException:
                self.close()
                raise
            self.ledger.resume(instance)
        if self.config.watchdog_s is not None:
            self._watchdog = Watchdog(self._watched, self.config.watchdog_s)
        self.look_ahead()

    def close(self, drain_s: float = 0.0) -> None:
        """Let requests end for up to ``drain_s`` seconds, abort the rest, end all processes."""
        end = time.monotonic() + drain_s
        with self.ledger.changed:
            while self.ledger.live and time.monotonic() < end:
                self.ledger.changed.wait(end - time.monotonic())
        self.is_closed = True
        if self._watchdog is not None:
            self._watchdog.close()
        self.ledger.end_all(Finish.ABORT)
        with self.operator:
            active, self.ledger.active = self.ledger.active, None
            if active is not None:
                active.close()
            ahead = self._ahead
        if ahead is not None:
            ahead.join()
        self.standby.close()
        if self.memory is not None:
            self.memory.close()
        if self._own_fork_server and self.fork_server is not None:
            self.fork_server.close()

    # Change

    def plan(self, devices: int | Sequence[int], lost: Sequence[int] = ()) -> ScalePlan:
        """What a change would do. Raises InputError and CapacityError for what cannot be."""
        assert self.placement is not None
        target = self._target(devices, lost)
        plan = plan_scale(
            self.placement,
            target,
            expert_bytes=self.layout.expert_bytes,
            shard_bytes=self.layout.dense_bytes,
            lost=lost,
            heat=self._heat(),
        )
        self._check_memory(plan)
        return replace(plan, shared=self.config.weights == "shared")

    def scale(self, devices: int | Sequence[int], *, lost: Sequence[int] = (), mode: str | None = None) -> ScaleReport:
        """Change to so many devices, or to these. ``lost`` are gone already.

        Raises InputError for what cannot be, BackendError for a change that failed: the group serves on as it was.
        """
        if not self.operator.acquire(blocking=self.config.busy == "queue"):
            raise InputError("a change of devices is under way; try again when it is done, or set busy='queue'")
        try:
            return self._scale(devices, tuple(lost), mode or self.config.mode)
        finally:
            self.operator.release()
            self.look_ahead()

    def _scale(self, devices: int | Sequence[int], lost: tuple[int, ...], mode: str) -> ScaleReport:
        started = time.perf_counter()
        if mode not in ("migrate", "drain"):
            raise InputError(f"mode is {mode!r}; it must be 'migrate' or 'drain'")
        if self.is_closed or self.ledger.active is None or self.memory is None:
            raise InputError("the group does not serve")
        old, memory = self.ledger.active, self.memory
        plan = self.plan(devices, lost)
        report = ScaleReport(self.devices, plan.new.devices, mode, moves=plan.moves, started=started)
        if plan.new.devices == self.devices:
            return report
        logger.info("scale: %s", plan)
        new: Instance | None = None
        name = "plan"
        try:
            for name in PHASES[:5]:
                with self._phase(name, report):
                    if name == "prepare":
                        new = self._prepare(plan, report)
                    elif name == "attach":
                        assert new is not None
                        new.all("attach", which="prepared")
                    elif name == "warm":
                        assert new is not None
                        new.all("warm")
                    elif name == "switch":
                        assert new is not None
                        (migrate if mode == "migrate" else drain)(self, plan, old, new, report)
                        self.placement = plan.new
                        # Had the old instance failed meanwhile, the new one took its place.
                        self.counts.up()
        except BaseException as error:
            self._roll_back(old, new, name, error)
            if isinstance(error, FAULTS) or not isinstance(error, Exception):
                kept = ", ".join(map(str, self.devices))
                raise BackendError(f"scaling failed in phase {name}: {error}; devices {kept} serve on") from error
            raise
        self._finish(old, memory, report)
        self.reports.append(report)
        self.counts.scaled(report)
        return report

    def _prepare(self, plan: ScalePlan, report: ScaleReport) -> Instance:
        """Copies, and beside them the instance."""
        assert self.memory is not None
        memory = self.memory
        with ThreadPoolExecutor(1) as pool:
            copied = pool.submit(memory.prepare, plan, from_disk=not self.config.p2p)
            new = self.standby.take(plan.new.devices)
            # One on standby has read what it needs.
            reads = new is None or not self.config.p2p
            if new is None:
                new = self.boot(plan.new.devices)
            self.coming = new
            try:
                new.wait_ready()
                report.bytes = copied.result()
                if reads:
                    self.check_files()
            except BaseException:
                new.close()
                raise
        return new

    def _finish(self, old: Instance, memory: MemoryManager, report: ScaleReport) -> None:
        """After the switch: the old instance lets go, then the memory that it alone needed goes."""
        try:
            with self._phase("release", report):
                if self.config.standby and not old.is_broken:
                    old.all("release")
                    self.standby.put(old)
                else:
                    old.close()
            with self._phase("commit", report):
                report.freed = memory.commit()
        except FAULTS as error:
            logger.warning(
                "the change is done, but what is left of the old configuration could not be let go: %s", error
            )
            old.close()
            self._commit_again(memory)
        # What died just now is found by the next who needs it.
        with contextlib.suppress(ChannelClosedError):
            assert self.memory is not None
            self.counts.peak(self.memory)
        if self.ledger.active is not None and self.ledger.active.is_broken:
            recover(self)

    def _commit_again(self, memory: MemoryManager) -> None:
        """Release failed; the placement has changed all the same."""
        try:
            if memory.usage()["is_prepared"]:
                memory.commit()
        except ChannelClosedError:
            recover(self, is_memory_lost=True)

    def _roll_back(self, old: Instance, new: Instance | None, phase: str, error: BaseException) -> None:
        logger.warning("scaling failed in phase %s, the group stays as it was: %s", phase, error)
        self.counts.failed(phase)
        if new is not None:
            new.close()
        is_memory_lost = False
        try:
            assert self.memory is not None
            self.memory.drop()
        except ChannelClosedError:
            is_memory_lost = True
        if is_memory_lost or old.is_broken:
            recover(self, is_memory_lost=is_memory_lost)

    def _event(self, instance: Instance, device: int, event: Event) -> None:
        """What a rank says by itself, in its listener's thread."""
        if event[0] == "outputs":
            if event[2] is not None:
                self.counts.picture(instance, device, event[2])
            self.ledger.take(instance, device, event[1])
        elif event[0] == "given_back":
            self.ledger.given_back(instance, device, event[1])
        elif event[0] in ("died", "failed"):
            logger.warning("device %d: %s", device, event[1] if len(event) > 1 else "its rank has died")
            with self.ledger.changed:
                self.ledger.changed.notify_all()
            if instance is self.ledger.active:
                self.counts.down()
                in_thread(partial(recover_if_broken, self), "anabranch-recover")
            else:
                in_thread(partial(self._replace_standby, instance), "anabranch-standby")

    def _replace_standby(self, broken: Instance) -> None:
        """One that was on standby is gone; what is to be ready is made ready again."""
        if broken in self.standby.instances():
            self.standby.drop(broken)
            self.look_ahead()

    def _watched(self) -> list[Watched]:
        """The processes to look after; of ranks those that have nothing else that waits for them, with a bound."""
        active, memory, fork_server = self.ledger.active, self.memory, self.fork_server
        instances = [each for each in (active, *self.standby.instances()) if each is not None]
        watched = [
            Watched(
                (instance, device),
                f"device {device}: its rank{'' if instance is active else ' on standby'}",
                partial(instance.call, device, "ping"),
                partial(instance.kill, device),
            )
            for instance in instances
            if not (instance.is_broken or instance.is_closed)
            for device in instance.devices
        ]
        if memory is not None and not self.is_closed:
            lost = partial(in_thread, partial(recover_memory, self, memory), "anabranch-recover")
            ping = partial(in_thread, memory.ping, "anabranch-ping")
            process = memory.process
            watched.append(Watched((memory,), "the memory manager", ping, process.kill, lambda: process.is_alive, lost))
        if fork_server is not None and fork_server.pid is not None and not self.is_closed:
            lost = partial(in_thread, self.start_fork_server, "anabranch-fork-server")
            ping = partial(in_thread, fork_server.ping, "anabranch-ping")
            watched.append(
                Watched(
                    (fork_server,),
                    "the fork server",
                    ping,
                    fork_server.kill,
                    lambda: fork_server.is_alive,
                    lost,
                    start_s=START_S,
                )
            )
        return watched

    # Parts

    def start_memory(self) -> MemoryManager:
        """A memory manager, in which nothing is loaded yet."""
        shares = self.config.weights == "shared"
        return MemoryManager.start(self.layout, self.kv_bytes, shares=shares, kind=self.config.device)

    def start_fork_server(self) -> ForkServer:
        """A fork server that can make ranks: the one there is, or another if it has died."""
        with self._forking:
            dead = self.fork_server
            if dead is None or not dead.is_alive:
                self.fork_server = ForkServer(forks=self.config.forks)
                if dead is not None and self._own_fork_server:
                    dead.close()
                self._own_fork_server = True
            assert self.fork_server is not None
            return self.fork_server

    def boot(self, devices: Sequence[int]) -> Instance:
        """Start the processes of a configuration."""
        assert self.memory is not None
        boots = [
            Boot(
                layout=self.layout,
                device=device,
                rank=rank,
                num_ranks=len(devices),
                limits=self.limits,
                copies=not self.config.mapped,
                kind=self.config.device,
                routers=self.routers,
                control=self.config.depth.control,
                skipper=self.skipper,
            )
            for rank, device in enumerate(devices)
        ]
        fork_server = self.start_fork_server()
        try:
            return Instance.boot(fork_server, self.memory, boots, self._event)
        except ChannelClosedError:
            # One that died, or was ended as it hung, while it was asked: there is another.
            if not fork_server.is_gone():
                raise
            return Instance.boot(self.start_fork_server(), self.memory, boots, self._event)

    def check_files(self) -> None:
        """Raise CheckpointError where what processes have read by now may be of another model than what was read before."""
        check_unchanged(self.info.files, self.config.model)

    def bring_up(self, instance: Instance, which: Which) -> None:
        """Wait for the ranks, give them their weights, and warm them up. Raises InstanceError, and CheckpointError as `check_files`."""
        instance.wait_ready()
        self.check_files()
        instance.all("attach", which=which)
        instance.all("warm")

    def look_ahead(self) -> None:
        """Have the instances that are likely to be asked for next on standby, in the background."""
        with self.operator:
            is_busy = self._ahead is not None and self._ahead.is_alive()
            if self.config.ahead and self.config.standby and not is_busy and not self.is_closed and self.devices:
                self._ahead = threading.Thread(target=self._fill_standby, daemon=True, name="anabranch-standby")
                self._ahead.start()

    def settle(self) -> None:
        """Wait until what `look_ahead` began is done."""
        ahead = self._ahead
        if ahead is not None:
            ahead.join()

    def _fill_standby(self) -> None:
        policy, count = self.config.policy, len(self.devices)
        for wanted in (count + policy.step, count - policy.step):
            if not policy.min_devices <= wanted <= policy.max_devices:
                continue
            # Without one on standby the change boots it itself, and says what is wrong.
            with contextlib.suppress(*FAULTS):
                self.prepare_standby(wanted)

    def prepare_standby(self, devices: int | Sequence[int]) -> None:
        """Have an instance for so many devices on standby. Raises InstanceError."""
        target = self._target(devices, ())
        if target in self.standby.configurations() or target == self.devices or self.is_closed:
            return
        instance = self.boot(target)
        try:
            instance.wait_ready()
            self.check_files()
        except BaseException:
            instance.close()
            raise
        self.standby.put(instance)
        if self.is_closed:
            self.standby.close()

    def _target(self, devices: int | Sequence[int], lost: Sequence[int]) -> tuple[int, ...]:
        """The devices that so many are: those that serve, then new ones; fewer leave out the last."""
        if not isinstance(devices, int):
            return tuple(devices)
        if not 1 <= devices <= self.config.policy.max_devices:
            raise InputError(
                f"devices is {devices}; it must be 1 to policy.max_devices={self.config.policy.max_devices}"
            )
        kept = [device for device in self.devices if device not in lost]
        fresh = (number for number in range(devices + len(self.devices)) if number not in self.devices)
        return (*kept[:devices], *(next(fresh) for _ in range(devices - len(kept))))

    def _check_memory(self, plan: ScalePlan) -> None:
        if self.config.device_memory is not None:
            check_memory(
                plan,
                capacity_bytes=self.config.device_memory,
                expert_bytes=self.layout.expert_bytes,
                shard_bytes=self.layout.dense_bytes,
                kv_bytes=self.kv_bytes,
            )

    def _heat(self) -> dict[tuple[int, int], float]:
        """Tokens of each (layer, expert), from all ranks; none where they cannot tell."""
        heat: dict[tuple[int, int], float] = {}
        active = self.ledger.active
        if active is None or active.is_broken:
            return heat
        # The change itself will find out.
        with contextlib.suppress(InstanceError):
            for layers in active.all("heat").values():
                for layer, loads in enumerate(layers):
                    for expert, load in enumerate(loads):
                        heat[layer, expert] = heat.get((layer, expert), 0.0) + load
        return heat

    @contextlib.contextmanager
    def _phase(self, name: str, report: ScaleReport) -> Iterator[None]:
        self.on_phase(name)
        started = time.perf_counter()
        yield
        report.phases[name] = time.perf_counter() - started


def _read_depth(depth: DepthConfig) -> tuple[Any, Any]:
    """(depth routers, a skipper of tokens) as ranks are told them; None for what there is not. Raises CheckpointError."""
    routers: Any = None
    skipper: Any = None
    if depth.routers is not None:
        from anabranch.depth.dr_llm.bank import RouterBank

        routers = RouterBank.load(depth.routers)
    if depth.skipper is not None:
        from anabranch.depth.ftp.saving import read_skipper

        skipper = read_skipper(depth.skipper)
    return routers, skipper
