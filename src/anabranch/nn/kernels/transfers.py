"""`Transfers`: threads of the compiled kernels that copy pieces of files or memory, while the interpreter does something else."""

import ctypes
from collections.abc import Sequence
from typing import Final

from anabranch.nn.kernels import load

__all__ = ["CACHED", "CANCELLED", "DIRECT", "MEMORY", "Piece", "Transfers"]

MEMORY, CACHED, DIRECT = 0, 1, 2  # where a piece lies: in memory, in a file, in a file opened with O_DIRECT
CANCELLED: Final = -1
ROOM = 64  # endings that are taken at once

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


class Transfers:
    """Copies in threads of its own. Urgent ones go first; the others begin when none is under way, one at a time.

    Args:
        threads: that copy.
        seconds_per_byte: above 0, copies take at least so long, one after another, as over a wire.

    Attributes:
        seen: endings that were taken so far, for `wait`.

    Raises RuntimeError where there are no compiled kernels.
    """

    def __init__(self, threads: int, seconds_per_byte: float = 0.0) -> None:
        library = load()
        if library is None:
            raise RuntimeError("transfers need the compiled kernels")
        self._waiting = library
        # These are over at once. Letting go of the interpreter for them would hand it to whoever waits for it, for much longer.
        self._library = ctypes.PyDLL(library._name)
        self._library.anabranch_transfers_take.restype = _int
        made = library.anabranch_transfers_new(_int(threads), ctypes.c_double(seconds_per_byte))
        self._self = ctypes.c_void_p(made)
        self._ids, self._results, self._count = (_int * ROOM)(), (_int * ROOM)(), _int(0)
        self.seen = 0

    def begin(self, id: int, urgent: bool, pieces: Sequence[Piece]) -> None:
        """Copy these pieces, in order. What they point at must stay until it has ended."""
        array = (Piece * len(pieces))(*pieces)
        self._library.anabranch_transfers_begin(self._self, _int(id), urgent, array, _int(len(pieces)))

    def change(self, id: int, *, urgent: bool, cancelled: bool) -> None:
        """How urgent a transfer is, and whether anybody still wants it: if not, it ends with `CANCELLED` unless it is done before."""
        self._library.anabranch_transfers_change(self._self, _int(id), urgent, cancelled)

    def take(self) -> list[tuple[int, int]]:
        """(id, result) of what has ended; 0 is success, `CANCELLED`, or an errno."""
        found: list[tuple[int, int]] = []
        while True:
            arguments = (self._self, self._ids, self._results, _int(ROOM), ctypes.byref(self._count))
            taken = self._library.anabranch_transfers_take(*arguments)
            found += zip(self._ids[:taken], self._results[:taken], strict=True)
            if taken < ROOM:
                self.seen = self._count.value
                return found

    def wait(self, seen: int, timeout_s: float) -> bool:
        """Until something has ended since `seen` was this, or `poke` was called; False if nothing has in time."""
        return self._waiting.anabranch_transfers_wait(self._self, _int(seen), ctypes.c_double(timeout_s)) > seen

    def poke(self) -> None:
        """End a `wait`, as an ending would."""
        self._library.anabranch_transfers_poke(self._self)

    def wait_for_kick(self) -> bool:
        """Until `kick` is called, or something ends while nobody waits for it. False when all is over."""
        return not self._waiting.anabranch_transfers_feed(self._self)

    def kick(self) -> None:
        """Wake who waits for it."""
        self._library.anabranch_transfers_kick(self._self)

    def stop(self) -> None:
        """Let waits return; transfers under way end first, others never begin."""
        self._waiting.anabranch_transfers_stop(self._self)

    def close(self) -> None:
        """Free it; nobody may be in any of the other calls."""
        if self._self:
            self._waiting.anabranch_transfers_delete(self._self)
            self._self = ctypes.c_void_p()
