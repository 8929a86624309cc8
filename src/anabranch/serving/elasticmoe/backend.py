"""Memory that other processes may map, of either kind: what the rest of elastic serving knows of the machine that it runs on.

    owner     pages = backend.pages(device, "experts", size, starts)     pages.read(...), pages.copy(...), pages.release(...)
    other     opened = backend.opened(device, offsets, ask)              ask is answered by pages.export(offsets)
    other     part = backend.range(device, slots, block)                 part.remap(opened, offsets): blocks side by side, none copied

`anabranch.serving.elasticmoe.mapped` does it with the pages of Linux, `anabranch.serving.elasticmoe.cuda` with the virtual memory of CUDA
devices. Plans, the ledger of what is where, and the switch are the same for both.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

__all__ = ["CPU", "CUDA", "Ask", "Backend", "Kind", "Mappable", "Pages", "Range", "backend_of"]

# kDLCPU and kDLCUDA: how DLPack numbers kinds of devices.
CPU, CUDA = 1, 2

Kind = Literal["cpu", "cuda"]
Ask = Callable[[Sequence[int]], tuple[Any, list[int]]]
"""Blocks by offset to what `Pages.export` gives for them; the file descriptors are the caller's to close."""


class Mappable(Protocol):
    """Pages, seen by a process that may map them."""

    def close(self) -> None:
        """Let go of it; what is mapped stays mapped."""


class Pages(Mappable, Protocol):
    """A run of ``size`` bytes that this process owns, in blocks which come and go. They read as zeros until they are written.

    Offsets and sizes are in bytes. Raises CapacityError where memory runs out.
    """

    name: str
    size: int

    @property
    def resident(self) -> int:
        """Bytes of memory that exist."""

    def read(self, offset: int, file: int, start: int, count: int) -> int:
        """Fill from an open file; gives ``count``. Raises EOFError for a file that is too short."""

    def copy(self, offset: int, source: Any, source_offset: int, count: int) -> int:
        """Fill from other pages of the same backend; gives ``count``."""

    def export(self, offsets: Sequence[int]) -> tuple[Any, list[int]]:
        """(description, new file descriptors) of blocks, for another process to open."""

    def release(self, offset: int, size: int) -> None:
        """Give a block back, if it is there."""


class Range(Protocol):
    """Addresses for ``slots`` blocks side by side, without memory until something is mapped.

    Attributes:
        address: of slot 0.
        block: bytes from one slot to the next.
        where: what stands in each slot.
    """

    address: int
    block: int
    where: list[Any]

    @property
    def place(self) -> tuple[int, int]:
        """(`CPU`, 0) or (`CUDA`, number of the GPU): where tensors over it are."""

    def remap(self, pages: Any, offsets: Sequence[int]) -> tuple[int, int]:
        """Put the blocks at ``offsets`` into slots 0, 1, ...; gives how many were mapped and how many stayed.

        What stands in its slot already is not touched. Raises CapacityError if it cannot be mapped.
        """

    def touch(self) -> None:
        """Let the first use of what is mapped be as quick as the later ones."""

    def close(self) -> None:
        """Give the addresses back. No tensor over them may be used after."""


class Backend(Protocol):
    """Makes pages and ranges.

    Attributes:
        kind: its name.
        page: bytes that blocks are multiples of.
        num_memories: separate memories of the machine; devices are dealt to them in turn.
    """

    kind: Kind
    page: int
    num_memories: int

    def pages(self, device: int, name: str, size: int, starts: Sequence[int] | None = None) -> Pages:
        """New pages in the memory of a device. ``starts``: where blocks begin that come and go; None for one that is there at once, where
        memory does not come by itself."""

    def opened(self, device: int, offsets: Sequence[int], ask: Ask) -> Mappable:
        """Open the blocks at ``offsets`` of another process's pages."""

    def range(
        self,
        device: int,
        slots: int,
        block: int,
        *,
        is_writable: bool = False,
        copies: bool | None = None,
        huge: bool = False,
    ) -> Range:
        """A range in the addresses of this process, for what computes on a device."""

    def warm(self, device: int) -> None:
        """Do before the first use of a device what takes long."""

    def close(self) -> None:
        """Let go of the devices."""


@functools.cache
def backend_of(kind: Kind) -> Backend:
    """This process's backend. Raises BackendError where there are no such devices."""
    if kind == "cuda":
        # A machine without CUDA needs none of it.
        from anabranch.serving.elasticmoe.cuda import CudaBackend

        return CudaBackend()
    from anabranch.serving.elasticmoe.mapped import HOST

    return HOST
