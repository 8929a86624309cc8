"""The backend of CUDA devices: their memory in blocks that other processes map, through the driver's virtual memory.

Unlike a memfd, memory of a GPU cannot be mapped in part, so a block that comes, goes or changes its slot alone is an allocation of its own:
each matrix of each expert. The dense weights are one, and so is a cache. A block travels to another process as a file descriptor, in
batches, as a process has few of those; it is closed when the block is open.

Where an allocation or a mapping fails, what was done for it is undone before the error goes on.
"""

import itertools
import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.errors import ConfigError
from anabranch.serving.elasticmoe.backend import CPU, CUDA, Ask, Kind
from anabranch.serving.elasticmoe.cuda_copy import Lanes
from anabranch.serving.elasticmoe.cuda_driver import Driver
from anabranch.serving.elasticmoe.mapped import padded
from anabranch.serving.elasticmoe.wire import MOST_FDS

__all__ = ["Block", "CudaBackend", "CudaOpened", "CudaPages", "CudaRange"]


@dataclass(frozen=True)
class Block:
    """Memory of one GPU.

    Attributes:
        key: of this memory and none that was or will be at the same place.
        handle: this process's own.
        size: in bytes.
    """

    key: tuple[str, int]
    handle: int
    size: int


class CudaPages:
    """See `anabranch.serving.elasticmoe.backend.Pages`. All of it is mapped in this process too, where copies go.

    Args:
        backend: makes it.
        gpu: where.
        name: for messages.
        size: bytes of addresses.
        starts: where blocks begin, ascending; each is as long as there is room before the next, and exists from its first write. None for
            one block of ``size`` bytes that is there at once.
    """

    def __init__(
        self, backend: "CudaBackend", gpu: int, name: str, size: int, starts: Sequence[int] | None = None
    ) -> None:
        self.name, self.size, self.gpu = name, padded(size, backend.page), gpu
        self._backend, self._driver = backend, backend.driver
        self._edges = [*(starts or [0]), self.size]
        self._blocks: dict[int, Block] = {}
        self._lock = threading.Lock()
        self.address = self._driver.reserve(self.size)
        try:
            if starts is None:
                self._there(0, self.size)
        except BaseException:
            self._driver.free(self.address, self.size)
            raise

    @property
    def resident(self) -> int:
        """Bytes of memory that exist."""
        with self._lock:
            return sum(block.size for block in self._blocks.values())

    def read(self, offset: int, file: int, start: int, count: int) -> int:
        """Fill from an open file by way of pinned memory; gives ``count``. Raises EOFError, CapacityError."""
        target = self._there(offset, count)
        with self._backend.lanes(self.gpu).one() as lane:
            return lane.read(target, file, start, count)

    def copy(self, offset: int, source: "CudaPages", source_offset: int, count: int) -> int:
        """Fill from other pages, also of another GPU; gives ``count``. Raises CapacityError."""
        target = self._there(offset, count)
        with self._backend.lanes(self.gpu).one() as lane:
            return lane.copy((self.gpu, target), (source.gpu, source.address + source_offset), count)

    def block(self, offset: int) -> Block:
        """The block that begins there. Raises RuntimeError if it does not exist."""
        with self._lock:
            if offset not in self._blocks:
                raise RuntimeError(f"{self.name} has no block at {offset}")
            return self._blocks[offset]

    def export(self, offsets: Sequence[int]) -> tuple[list[tuple[tuple[str, int], int]], list[int]]:
        """(key, size) of each block, and a new file descriptor of each."""
        blocks = [self.block(offset) for offset in offsets]
        fds: list[int] = []
        try:
            fds.extend(self._driver.export(block.handle) for block in blocks)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return [(block.key, block.size) for block in blocks], fds

    def release(self, offset: int, size: int) -> None:
        """Give a block back, if it is there; the memory is free when nobody has it mapped any more."""
        with self._lock:
            block = self._blocks.pop(offset, None)
        if block is not None:
            self._let_go(self.address + offset, block)

    def close(self) -> None:
        """Give everything back."""
        for offset in list(self._blocks):
            self.release(offset, 0)
        self._driver.free(self.address, self.size)

    def _there(self, offset: int, count: int) -> int:
        """The address of an offset whose block exists from now on."""
        index = bisect_right(self._edges, offset) - 1
        start, size = self._edges[index], self._edges[index + 1] - self._edges[index]
        if offset + count > start + size:
            raise ValueError(f"{count} bytes at {offset} are not in one block of {self.name}")
        with self._lock:
            if start not in self._blocks:
                self._blocks[start] = self._new_block(self.address + start, size)
        return self.address + offset

    def _new_block(self, address: int, size: int) -> Block:
        block = Block(self._backend.new_key(), self._driver.create(self.gpu, size), size)
        try:
            self._driver.map(address, size, block.handle)
        except BaseException:
            self._driver.release(block.handle)
            raise
        try:
            self._driver.allow(address, size, self.gpu)
            with self._backend.lanes(self.gpu).one() as lane:
                lane.clear(address, size)
        except BaseException:
            self._let_go(address, block)
            raise
        return block

    def _let_go(self, address: int, block: Block) -> None:
        self._driver.unmap(address, block.size)
        self._driver.release(block.handle)


class CudaOpened:
    """Blocks of another process's pages, by offset."""

    def __init__(self, driver: Driver, offsets: Sequence[int], ask: Ask) -> None:
        self._driver = driver
        self._blocks: dict[int, Block] = {}
        try:
            for first in range(0, len(offsets), MOST_FDS):
                self._open(offsets[first : first + MOST_FDS], ask)
        except BaseException:
            self.close()
            raise

    def block(self, offset: int) -> Block:
        """The block that begins there. Raises RuntimeError if it was not opened."""
        if offset not in self._blocks:
            raise RuntimeError(f"no block at {offset} was opened")
        return self._blocks[offset]

    def close(self) -> None:
        """Let go of the handles; what is mapped stays mapped."""
        while self._blocks:
            self._driver.release(self._blocks.popitem()[1].handle)

    def _open(self, offsets: Sequence[int], ask: Ask) -> None:
        told, fds = ask(offsets)
        try:
            for offset, (key, size), fd in zip(offsets, told, fds, strict=True):
                self._blocks[offset] = Block(key, self._driver.import_(fd), size)
        finally:
            for fd in fds:
                os.close(fd)


class CudaRange:
    """See `anabranch.serving.elasticmoe.backend.Range`.

    Args:
        driver: maps.
        gpu: that computes with it.
        slots: most blocks.
        block: bytes of each, whole pages.

    Writes are not refused: access for reading alone is not known to work on every driver.
    """

    def __init__(self, driver: Driver, gpu: int, slots: int, block: int) -> None:
        self.block, self.size = block, max(1, slots) * block
        self.where: list[tuple[str, int] | None] = []
        self._driver, self._gpu = driver, gpu
        self.address = driver.reserve(self.size)

    @property
    def place(self) -> tuple[int, int]:
        """The GPU; main memory where the driver says that the memory is there, as on a stand-in for one. Something must be mapped."""
        return (CPU, 0) if self._driver.is_host_memory(self.address) else (CUDA, self._gpu)

    def remap(self, pages: CudaPages | CudaOpened, offsets: Sequence[int]) -> tuple[int, int]:
        """Put blocks into slots 0, 1, ...; gives how many were mapped and how many stayed."""
        wanted = [pages.block(offset) for offset in offsets]
        if any(block.size != self.block for block in wanted):
            raise ValueError(f"blocks of other sizes than the range's {self.block} bytes")
        changed = [slot for slot, block in enumerate(wanted) if self.where[slot : slot + 1] != [block.key]]
        gone = [slot for slot in (*changed, *range(len(wanted), len(self.where))) if self._is_mapped(slot)]
        if gone:
            # What was begun on the old blocks ends on them.
            self._driver.synchronize(self._gpu)
        for slot in gone:
            self._unmap(slot)
        self.where = [*self.where[: len(wanted)], *[None] * (len(wanted) - len(self.where))]
        for first, count in _runs(changed):
            self._map(first, wanted[first : first + count])
        return len(changed), len(wanted) - len(changed)

    def touch(self) -> None:
        """Nothing to do: a GPU's page tables are complete once `remap` is."""

    def close(self) -> None:
        """Give the addresses back, when what was begun on them is done. No tensor over them may be used after."""
        if self.address:
            self._driver.synchronize(self._gpu)
            for slot in range(len(self.where)):
                if self._is_mapped(slot):
                    self._unmap(slot)
            self._driver.free(self.address, self.size)
            self.where, self.address = [], 0

    def _is_mapped(self, slot: int) -> bool:
        return slot < len(self.where) and self.where[slot] is not None

    def _unmap(self, slot: int) -> None:
        self._driver.unmap(self.address + slot * self.block, self.block)
        self.where[slot] = None

    def _map(self, first: int, blocks: Sequence[Block]) -> None:
        """Into slots side by side, all or none."""
        try:
            for slot, block in enumerate(blocks, first):
                self._driver.map(self.address + slot * self.block, self.block, block.handle)
                self.where[slot] = block.key
            self._driver.allow(self.address + first * self.block, len(blocks) * self.block, self._gpu)
        except BaseException:
            for slot in range(first, first + len(blocks)):
                if self._is_mapped(slot):
                    self._unmap(slot)
            raise


class CudaBackend:
    """The GPUs of the machine. See `anabranch.serving.elasticmoe.backend.Backend`; device n is on GPU n modulo their number.

    Args:
        library: see `Driver`.

    Raises BackendError where there are none.
    """

    kind: Kind = "cuda"

    def __init__(self, library: str | None = None) -> None:
        self.driver = Driver(library)
        self.num_memories = self.driver.num_gpus
        self.page = max(self.driver.granularity(gpu) for gpu in range(self.num_memories))
        self._lanes: dict[int, Lanes] = {}
        self._lock = threading.Lock()
        self._origin, self._numbers = os.urandom(8).hex(), itertools.count()

    def pages(self, device: int, name: str, size: int, starts: Sequence[int] | None = None) -> CudaPages:
        """See `CudaPages`. Raises CapacityError."""
        return CudaPages(self, self._gpu(device), name, size, starts)

    def opened(self, device: int, offsets: Sequence[int], ask: Ask) -> CudaOpened:
        """See `CudaOpened`."""
        return CudaOpened(self.driver, offsets, ask)

    def range(
        self,
        device: int,
        slots: int,
        block: int,
        *,
        is_writable: bool = False,
        copies: bool | None = None,
        huge: bool = False,
    ) -> CudaRange:
        """See `CudaRange`. Raises ConfigError for ``copies``."""
        if copies:
            raise ConfigError("weights on CUDA devices are mapped, not copied into each process; leave mapped=True")
        return CudaRange(self.driver, self._gpu(device), slots, padded(block, self.page))

    def warm(self, device: int) -> None:
        """Make the context of the device's GPU."""
        self.driver.context(self._gpu(device))

    def close(self) -> None:
        """Let go of streams, pinned memory and contexts; pages and ranges are closed before."""
        with self._lock:
            for lanes in self._lanes.values():
                lanes.close()
            self._lanes.clear()
        self.driver.close()

    def lanes(self, gpu: int) -> Lanes:
        """Ways to fill the memory of a GPU."""
        with self._lock:
            if gpu not in self._lanes:
                self._lanes[gpu] = Lanes(self.driver, gpu)
            return self._lanes[gpu]

    def new_key(self) -> tuple[str, int]:
        """That no other block of any process has."""
        return self._origin, next(self._numbers)

    def _gpu(self, device: int) -> int:
        return device % self.num_memories


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of neighbours."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((slot, 1))
    return runs
