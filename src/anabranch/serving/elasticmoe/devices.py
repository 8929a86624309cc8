"""The memory of one device, and filling it: from disk, from another device, or not at all because it is there already."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anabranch.errors import CheckpointError, ConfigError
from anabranch.serving.elasticmoe.backend import Backend, Pages
from anabranch.serving.elasticmoe.layout import Layout, Matrix
from anabranch.serving.elasticmoe.mapped import HOST
from anabranch.serving.elasticmoe.plan import Copy, Placement, ScalePlan

__all__ = ["Device", "Disk", "Host"]


class Disk:
    """The files of a model folder, and how many bytes were read of each tensor (`disk-copy` reads none twice)."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.read: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def copy(self, name: str, file: str, start: int, count: int, target: Pages, offset: int) -> int:
        """Read ``count`` bytes of a tensor into memory. Raises CheckpointError for a file that is gone or too short."""
        try:
            moved = target.read(offset, self._open(file), start, count)
        except (FileNotFoundError, EOFError) as error:
            raise CheckpointError(f"cannot read {name} in {self.layout.folder}: {error}") from None
        with self._lock:
            self.read[name] = self.read.get(name, 0) + count
        return moved

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(Path(self.layout.folder) / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]


class Weights:
    """Two runs of memory for weights: the dense part, and the experts (pages only of those that are there)."""

    def __init__(self, device: int, name: str, layout: Layout, backend: Backend = HOST) -> None:
        self.dense = backend.pages(device, f"{name}-dense", layout.dense_bytes)
        try:
            self.experts = backend.pages(device, f"{name}-experts", layout.expert_run, layout.expert_starts)
        except BaseException:
            self.dense.close()
            raise

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of memory by kind."""
        return {"dense": self.dense.resident, "experts": self.experts.resident}

    def close(self) -> None:
        """Let go of both."""
        self.dense.close()
        self.experts.close()


class Device:
    """The memory of a device: its key-value cache, and weights, of its own or those that all devices of the host map.

    Args:
        number: its name.
        layout: of the model.
        kv_bytes: of the cache.
        shared: the host's weights; None for weights of its own.
        backend: whose memory it is.

    Raises CapacityError where memory runs out; nothing is held then.
    """

    def __init__(
        self, number: int, layout: Layout, kv_bytes: int, shared: Weights | None = None, backend: Backend = HOST
    ) -> None:
        self.number, self.shares = number, shared is not None
        self.kv = backend.pages(number, f"{number}-kv", kv_bytes)
        try:
            self.weights = shared or Weights(number, str(number), layout, backend)
        except BaseException:
            self.kv.close()
            raise

    @property
    def dense(self) -> Pages:
        """Where the dense weights are."""
        return self.weights.dense

    @property
    def experts(self) -> Pages:
        """Where the experts are."""
        return self.weights.experts

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of memory by kind, of what is its own."""
        return {**({} if self.shares else self.weights.resident), "kv": self.kv.resident}

    def close(self) -> None:
        """Let go of what is its own."""
        self.kv.close()
        if not self.shares:
            self.weights.close()


def _offset(matrix: Matrix, expert: int) -> int:
    return matrix.offset + expert * matrix.block


class Host:
    """All devices of a host and what leads from one placement to the next. Thread-safe; `prepare` runs beside everything else.

    Args:
        layout: of the model.
        kv_bytes: of the cache of each device.
        shares: all devices map the same pages of weights. Every expert has one place then, whichever device answers for it, so a change
            of the placement copies nothing, no expert is there twice while it lasts, and a device that dies takes none with it.
        backend: whose memory it is; shared weights are in the first of its memories.
    """

    def __init__(self, layout: Layout, kv_bytes: int, *, shares: bool = False, backend: Backend = HOST) -> None:
        if layout.page % backend.page:
            raise ConfigError(
                f"the layout has pages of {layout.page} bytes; the devices need multiples of {backend.page}"
            )
        self.layout, self.kv_bytes, self.backend = layout, kv_bytes, backend
        self.shared = Weights(0, "host", layout, backend) if shares else None
        self.devices: dict[int, Device] = {}
        self.placement: Placement | None = None
        # Prepared, neither committed nor dropped.
        self.plan: ScalePlan | None = None
        self.disk = Disk(layout)
        self.moved = {"p2p": 0, "disk": 0, "zero_copy": 0}
        self._lock = threading.Lock()

    def load(self, placement: Placement) -> None:
        """Fill the devices of a first placement: each expert from disk once, the dense part once, then from device to device."""
        first, *others = placement.devices
        for number in placement.devices:
            self.devices[number] = self._device(number)
        work = [self._dense_from_disk(first)]
        for layer in range(len(self.layout.layers)):
            for number in placement.devices:
                work += [self._from_disk(number, layer, expert) for expert in placement.of(layer, number)]
        self._run(work)
        if self.shared is None:
            self._run([self._dense_between(first, number) for number in others])
        self.placement = placement

    def prepare(self, plan: ScalePlan, *, from_disk: bool = False) -> dict[str, float]:
        """Bring what ``plan`` copies, beside what there is; nothing that serves is touched. ``from_disk``: as if no device could give.

        Gives ``p2p`` and ``disk`` bytes and ``seconds``. Whatever fails leaves the old placement as it was.
        """
        if from_disk and self.shared is not None:
            raise RuntimeError("weights that devices share are in use; they cannot be read from disk again")
        started, before = time.perf_counter(), dict(self.moved)
        with self._lock:
            if self.plan is not None:
                raise RuntimeError("a plan is prepared already; commit or drop it first")
            self.plan = plan
            for number in plan.lost:
                self._forget(number)
        try:
            for number in plan.new.devices:
                if number not in self.devices:
                    self.devices[number] = self._device(number)
            if self.shared is None:
                self._run([self._task(copy, from_disk) for copy in (*plan.attention, *plan.copy)])
        except BaseException:
            self.drop()
            raise
        kept = sum(self.layout.expert_bytes[layer] for _, layer, _ in plan.keep)
        # What changes its device keeps its pages as well.
        if self.shared is not None:
            kept += sum(copy.bytes for copy in (*plan.attention, *plan.copy))
        with self._lock:
            self.moved["zero_copy"] += kept + self.layout.dense_bytes * len(plan.kv_keep)
        moved = {kind: self.moved[kind] - before[kind] for kind in ("p2p", "disk")}
        return {**moved, "zero_copy": kept, "seconds": time.perf_counter() - started}

    def commit(self) -> int:
        """The prepared placement is what serves: let go of what only the old one held. Gives the bytes that became free."""
        plan, before = self._prepared(), self.resident
        with self._lock:
            for number, layer, expert in plan.drop:
                if number in plan.new.devices:
                    self._release(number, layer, expert)
            for number in set(self.devices) - set(plan.new.devices):
                self._forget(number)
            self.placement, self.plan = plan.new, None
        return before - self.resident

    def drop(self) -> None:
        """The prepared placement is not to be: let go of what was brought for it."""
        plan = self._prepared()
        with self._lock:
            for copy in plan.copy:
                if copy.target in plan.old.devices and copy.target in self.devices:
                    assert copy.layer is not None
                    assert copy.expert is not None
                    self._release(copy.target, copy.layer, copy.expert)
            for number in set(plan.new.devices) - set(plan.old.devices):
                self._forget(number)
            self.plan = None

    @property
    def resident(self) -> int:
        """Bytes of memory of all devices."""
        return sum(sum(kinds.values()) for kinds in self._resident())

    def usage(self) -> dict:
        """Bytes in all, by device and kind, of shared weights by kind, moved by kind since the start, read of each tensor; and whether a
        plan is prepared."""
        return {
            "resident": self.resident,
            "devices": {number: device.resident for number, device in sorted(self.devices.items())},
            "shared": self.shared.resident if self.shared is not None else {},
            "moved": dict(self.moved),
            "read": dict(self.disk.read),
            "is_prepared": self.plan is not None,
        }

    def close(self) -> None:
        """Let go of everything."""
        for number in list(self.devices):
            self._forget(number)
        if self.shared is not None:
            self.shared.close()
        self.disk.close()

    def _device(self, number: int) -> Device:
        return Device(number, self.layout, self.kv_bytes, self.shared, self.backend)

    def _resident(self) -> list[dict[str, int]]:
        """Of each device what is its own, and what they share."""
        own = [device.resident for device in list(self.devices.values())]
        return own if self.shared is None else [*own, self.shared.resident]

    def _prepared(self) -> ScalePlan:
        if self.plan is None:
            raise RuntimeError("no plan is prepared")
        return self.plan

    def _forget(self, number: int) -> None:
        device = self.devices.pop(number, None)
        if device is not None:
            device.close()

    def _release(self, number: int, layer: int, expert: int) -> None:
        # Another device answers for it now; the pages are the same.
        if self.shared is not None:
            return
        for matrix in self.layout.layers[layer]:
            self.devices[number].experts.release(_offset(matrix, expert), matrix.block)

    def _task(self, copy: Copy, from_disk: bool) -> Callable[[], None]:
        source = None if from_disk else copy.source
        if copy.expert is None:
            return self._dense_from_disk(copy.target) if source is None else self._dense_between(source, copy.target)
        assert copy.layer is not None
        if source is None:
            return self._from_disk(copy.target, copy.layer, copy.expert)
        return self._between(source, copy.target, copy.layer, copy.expert)

    def _dense_from_disk(self, target: int) -> Callable[[], None]:
        def work() -> None:
            dense = self.devices[target].dense
            for t in self.layout.dense:
                self._count("disk", self.disk.copy(t.name, t.file, t.start, t.bytes, dense, t.offset))

        return work

    def _dense_between(self, source: int, target: int) -> Callable[[], None]:
        def work() -> None:
            here, there = self.devices[target].dense, self.devices[source].dense
            self._count("p2p", here.copy(0, there, 0, self.layout.dense_bytes))

        return work

    def _from_disk(self, target: int, layer: int, expert: int) -> Callable[[], None]:
        def work() -> None:
            experts = self.devices[target].experts
            for m in self.layout.layers[layer]:
                start = m.start + expert * m.bytes
                self._count("disk", self.disk.copy(m.name, m.file, start, m.bytes, experts, _offset(m, expert)))

        return work

    def _between(self, source: int, target: int, layer: int, expert: int) -> Callable[[], None]:
        def work() -> None:
            here, there = self.devices[target].experts, self.devices[source].experts
            for m in self.layout.layers[layer]:
                offset = _offset(m, expert)
                self._count("p2p", here.copy(offset, there, offset, m.bytes))

        return work

    def _count(self, kind: str, count: int) -> None:
        with self._lock:
            self.moved[kind] += count

    @staticmethod
    def _run(work: Iterable[Callable[[], None]], threads: int = 2) -> None:
        """Do it all, a few at a time; the first error is raised when those under way have ended."""
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(task) for task in work]:
                done.result()
