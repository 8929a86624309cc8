"""The backend of main memory: shared pages with a file descriptor, and ranges of addresses that they are mapped into.

`Pages` is what a memory manager owns: a memfd whose pages exist from the first write until they are let go. `Range` is a reserved run
of addresses in a process that attaches; pieces of several places of a file are mapped into it side by side (MAP_FIXED). Elsewhere than
on Linux there are temporary files instead of memfds, and a `Range` copies what Linux maps, with a warning.
"""

import ctypes
import mmap
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Protocol

from anabranch.errors import CapacityError
from anabranch.serving.elasticmoe.backend import CPU, Ask, Kind

__all__ = ["HOST", "PAGE", "HostBackend", "Opened", "Pages", "Range", "move_bytes", "padded"]

PAGE = mmap.PAGESIZE
_CHUNK = 4 << 20
_IS_LINUX = sys.platform == "linux"
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_RESERVED = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | _MAP_NORESERVE

# FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE.
_PUNCH_HOLE = 0x02 | 0x01
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22
_FAILED = ctypes.c_void_p(-1).value

if _IS_LINUX:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def padded(size: int, page: int = PAGE) -> int:
    """``size`` rounded up to whole pages."""
    return -(-size // page) * page


class _File(Protocol):
    """Something with an open file."""

    fd: int


class Opened:
    """Pages of another process, by the file descriptor that it gave."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the file; what is mapped of it stays mapped."""
        os.close(self.fd)


class Pages:
    """A run of shared memory of ``size`` bytes, none of which take memory before they are written."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        if _IS_LINUX:
            self.fd = os.memfd_create(f"anabranch-{name}", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile(prefix=f"anabranch-{name}-") as file:
                self.fd = os.dup(file.fileno())
        os.ftruncate(self.fd, size)

    @property
    def resident(self) -> int:
        """Bytes of memory that exist, as the kernel counts them."""
        return os.fstat(self.fd).st_blocks * 512

    def read(self, offset: int, file: int, start: int, count: int) -> int:
        """Fill from an open file, see `move_bytes`."""
        return move_bytes(self.fd, offset, file, start, count)

    def copy(self, offset: int, source: "Pages", source_offset: int, count: int) -> int:
        """Fill from other pages, see `move_bytes`."""
        return move_bytes(self.fd, offset, source.fd, source_offset, count)

    def export(self, offsets: Sequence[int]) -> tuple[None, list[int]]:
        """One file descriptor, whichever blocks are asked for: all are in one file."""
        return None, [os.dup(self.fd)]

    def release(self, offset: int, size: int) -> None:
        """Give pages back; they read as zeros from then on, also where they are mapped."""
        if _IS_LINUX and _libc.fallocate(self.fd, _PUNCH_HOLE, offset, size):
            raise OSError(ctypes.get_errno(), f"cannot release {size} bytes of {self.name}")

    def close(self) -> None:
        """Let go of it; the memory ends with the last process that has it mapped."""
        os.close(self.fd)


def move_bytes(target: int, target_offset: int, source: int, source_offset: int, count: int) -> int:
    """Copy ``count`` bytes from one open file to another, in the kernel where it can; gives ``count``.

    Raises CapacityError where memory runs out, EOFError where the source is too short.
    """
    done, in_kernel = 0, hasattr(os, "copy_file_range")
    while done < count:
        size = min(_CHUNK, count - done)
        try:
            if in_kernel:
                moved = os.copy_file_range(source, target, size, source_offset + done, target_offset + done)
            else:
                moved = os.pwrite(target, os.pread(source, size, source_offset + done), target_offset + done)
        except OSError as error:
            # Not between these two kinds of files: read and write instead.
            if in_kernel and error.errno not in (
                28,
                12,
            ):
                in_kernel = False
                continue
            raise CapacityError(f"no memory for {count:,} bytes: {error.strerror}") from None
        if not moved:
            # Some kernels answer 0 rather than an error.
            if in_kernel:
                in_kernel = False
                continue
            raise EOFError(f"{count - done} bytes are missing at {source_offset + done}")
        done += moved
    return count


class Range:
    """Addresses for ``slots`` blocks of ``block`` bytes side by side, without memory until they are mapped.

    Args:
        slots: most blocks.
        block: bytes from one block to the next, whole pages.
        is_writable: whether this process may write; a write to a range that is not ends the process.
        copies: copy blocks into memory of this process instead of mapping them; the default where mapping cannot be.
        huge: ask for huge pages.
    """

    def __init__(
        self, slots: int, block: int, *, is_writable: bool = False, copies: bool | None = None, huge: bool = False
    ) -> None:
        self.block, self.is_writable = block, is_writable
        self.size = max(1, slots) * block
        self.copies = not _IS_LINUX if copies is None else copies
        if copies is None and self.copies:
            warnings.warn("memory is mapped on Linux alone; here weights are copied into each process", stacklevel=2)
        # (inode, offset) of each slot.
        self.where: list[tuple[int, int]] = []
        self._prot = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        if self.copies:
            self._own = mmap.mmap(-1, self.size)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._own))
        else:
            self.address = self._map(None, self.size, _PROT_NONE, _RESERVED, -1, 0)
            if huge:
                _libc.madvise(self.address, self.size, _MADV_HUGEPAGE)

    @property
    def place(self) -> tuple[int, int]:
        """Main memory."""
        return CPU, 0

    def remap(self, pages: _File, offsets: Sequence[int]) -> tuple[int, int]:
        """Put the blocks at ``offsets`` of a file into slots 0, 1, ...; gives how many were mapped and how many stayed.

        What stands in its slot already is not touched: its pages and addresses stay.
        """
        fd = pages.fd
        inode = os.fstat(fd).st_ino
        wanted = [(inode, offset) for offset in offsets]
        changed = [slot for slot, place in enumerate(wanted) if self.where[slot : slot + 1] != [place]]
        for first, count in _runs(changed, offsets, self.block):
            self._put(first, count, fd, offsets[first])
        # What is behind the last slot must not be read by mistake.
        if not self.copies and len(self.where) > len(wanted):
            start, end = len(wanted) * self.block, len(self.where) * self.block
            self._map(self.address + start, end - start, _PROT_NONE, _RESERVED | _MAP_FIXED, -1, 0)
        self.where = wanted
        return len(changed), len(wanted) - len(changed)

    def touch(self) -> None:
        """Let the process's page tables point to what is mapped, so that the first use does not have to."""
        if not self.copies and self.where:
            _libc.madvise(self.address, len(self.where) * self.block, _MADV_POPULATE_READ)

    def close(self) -> None:
        """Give the addresses back. No tensor over them may be used after."""
        if self.copies:
            # The pages end with the last reference to them.
            self.address = 0
        elif self.address:
            _libc.munmap(self.address, self.size)
            self.address = 0

    def _put(self, slot: int, count: int, fd: int, offset: int) -> None:
        start, size = slot * self.block, count * self.block
        if self.copies:
            self._own[start : start + size] = os.pread(fd, size, offset)
        else:
            self._map(self.address + start, size, self._prot, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)

    @staticmethod
    def _map(address: int | None, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
        found = _libc.mmap(address, size, prot, flags, fd, offset)
        if found == _FAILED:
            raise CapacityError(f"cannot map {size:,} bytes: {os.strerror(ctypes.get_errno())}")
        return found


def _runs(slots: Sequence[int], offsets: Sequence[int], block: int) -> list[tuple[int, int]]:
    """(first slot, count) of neighbours whose blocks are neighbours in the file as well: one call maps them all."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs:
            first, count = runs[-1]
            if slot == first + count and offsets[slot] == offsets[first] + count * block:
                runs[-1] = (first, count + 1)
                continue
        runs.append((slot, 1))
    return runs


class HostBackend:
    """Main memory. See `anabranch.serving.elasticmoe.backend.Backend`; all devices of a host are in one memory."""

    kind: Kind = "cpu"
    page, num_memories = PAGE, 1

    def pages(self, device: int, name: str, size: int, starts: Sequence[int] | None = None) -> Pages:
        """Pages exist from their first write, wherever blocks begin."""
        return Pages(name, size)

    def opened(self, device: int, offsets: Sequence[int], ask: Ask) -> Opened:
        """The file that they are all in."""
        _, (fd,) = ask(offsets)
        return Opened(fd)

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
        """See `Range`."""
        return Range(slots, block, is_writable=is_writable, copies=copies, huge=huge)

    def warm(self, device: int) -> None:
        """Nothing takes long."""

    def close(self) -> None:
        """Nothing is held."""


HOST = HostBackend()
