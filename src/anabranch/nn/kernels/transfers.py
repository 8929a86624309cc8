"""`Transfers`: threads of the compiled kernels that copy pieces of files or memory, while the interpreter does something else."""

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np

from anabranch.errors import CapacityError
from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel

__all__ = ["CACHED", "CANCELLED", "DIRECT", "MEMORY", "Piece", "Transfers"]

# Where a piece lies: in memory, in a file, in a file opened with O_DIRECT.
MEMORY, CACHED, DIRECT = 0, 1, 2
CANCELLED: Final = -1

# Endings that are taken at once.
ROOM = 64

_int = ctypes.c_int64


class Piece(ctypes.Structure):
    """What to copy.

    Attributes:
        kind: `MEMORY`, `CACHED` or `DIRECT`.
        handle: of the file.
        start: address in memory, or offset in the file.
        bytes: length.
        target: address to write to.
    """

    _fields_ = (("kind", _int), ("handle", _int), ("start", _int), ("bytes", _int), ("target", ctypes.c_void_p))


NEW = Kernel("anabranch_transfers_new", "threads_of_it: int64, seconds_per_byte: double", result="handle")
BEGIN = Kernel(
    "anabranch_transfers_begin",
    "transfers: handle, id: int64, urgent: int, pieces: Piece, count: int64",
    structures={"Piece": Piece},
    result="status",
    holds_interpreter=True,
)
CHANGE = Kernel(
    "anabranch_transfers_change", "transfers: handle, id: int64, urgent: int, cancelled: int", holds_interpreter=True
)
TAKE = Kernel(
    "anabranch_transfers_take",
    "transfers: handle, ids: int64[R] array out, results: int64[R] array out, R, count: int64[1] array out",
    result="int64",
    holds_interpreter=True,
)
POKE = Kernel("anabranch_transfers_poke", "transfers: handle", holds_interpreter=True)
KICK = Kernel("anabranch_transfers_kick", "transfers: handle", holds_interpreter=True)
WAIT = Kernel("anabranch_transfers_wait", "transfers: handle, seen: int64, seconds: double", result="int64")
FEED = Kernel("anabranch_transfers_feed", "transfers: handle", result="int")
STOP = Kernel("anabranch_transfers_stop", "transfers: handle")
DELETE = Kernel("anabranch_transfers_delete", "transfers: handle")


class Transfers:
    """Copies in threads of its own. Urgent ones go first; the others begin when none is under way, one at a time.

    Args:
        threads: that copy.
        seconds_per_byte: above 0, copies take at least so long, one after another, as over a wire.

    Attributes:
        seen: endings that were taken so far, for `wait`.

    Raises RuntimeError where there are no compiled kernels, and CapacityError where there is no room for its threads.
    """

    def __init__(self, threads: int, seconds_per_byte: float = 0.0) -> None:
        if load() is None:
            raise RuntimeError("transfers need the compiled kernels")
        self._self: int | None = NEW(threads, seconds_per_byte)
        if self._self is None:
            raise CapacityError(f"no room for {threads} threads that copy; use fewer")
        self._ids, self._results, self._count = (np.zeros(size, np.int64) for size in (ROOM, ROOM, 1))
        self.seen = 0

    def begin(self, id: int, urgent: bool, pieces: Sequence[Piece]) -> None:
        """Copy these pieces, in order. What they point at must stay until it has ended."""
        BEGIN(self._self, id, urgent, (Piece * len(pieces))(*pieces), len(pieces))

    def change(self, id: int, *, urgent: bool, cancelled: bool) -> None:
        """How urgent a transfer is, and whether anybody still wants it: if not, it ends with `CANCELLED` unless it is done before."""
        CHANGE(self._self, id, urgent, cancelled)

    def take(self) -> list[tuple[int, int]]:
        """(id, result) of what has ended; 0 is success, `CANCELLED`, or an errno."""
        found: list[tuple[int, int]] = []
        while True:
            taken = TAKE(self._self, self._ids, self._results, self._count)
            found += zip(self._ids[:taken].tolist(), self._results[:taken].tolist(), strict=True)
            if taken < ROOM:
                self.seen = int(self._count[0])
                return found

    def wait(self, seen: int, timeout_s: float) -> bool:
        """Until something has ended since `seen` was this, or `poke` was called; False if nothing has in time."""
        return WAIT(self._self, seen, timeout_s) > seen

    def poke(self) -> None:
        """End a `wait`, as an ending would."""
        POKE(self._self)

    def wait_for_kick(self) -> bool:
        """Until `kick` is called, or something ends while nobody waits for it. False when all is over."""
        return not FEED(self._self)

    def kick(self) -> None:
        """Wake who waits for it."""
        KICK(self._self)

    def stop(self) -> None:
        """Let waits return; transfers under way end first, others never begin."""
        STOP(self._self)

    def close(self) -> None:
        """Free it; nobody may be in any of the other calls."""
        if self._self:
            DELETE(self._self)
            self._self = None
