"""The logs of an index: the one that is written, and those before it that no snapshot holds yet."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import AnabranchError
from anabranch.graph.beside import FolderLock, live_folder
from anabranch.graph.live.changes import Change, encode
from anabranch.graph.live.folder import Found, log_path
from anabranch.graph.live.log import Log


@dataclass
class Counts:
    """What a `LiveIndex` did since it was opened.

    Attributes:
        upserted: elements that came or moved.
        deleted: elements that went.
        replayed: elements that the log changed when it was opened.
        writes: frames written to the log.
        syncs: how often the disk was waited for, ``sync_s`` seconds in all.
        snapshots: that were written; ``failed`` could not be.
        snapshot_at: when the last one was, seconds since 1970; 0 for never.
    """

    upserted: int = 0
    deleted: int = 0
    replayed: int = 0
    writes: int = 0
    syncs: int = 0
    sync_s: float = 0.0
    snapshots: int = 0
    failed: int = 0
    snapshot_at: float = 0.0


class Logs:
    """Logs of the index at a path, in its folder, which one process holds while it writes.

    Args:
        path: of the index.
        row: numbers of a vector, and their type.
        base: fingerprint of the index file.
        lock: of the folder, where it is held already.

    Attributes:
        folder: where they lie.
        counts: see `Counts`.
        current: the log that is written; None before the first change.
        number: of the last write.
    """

    def __init__(self, path: Path, row: tuple[int, str], base: str, lock: FolderLock | None) -> None:
        self.folder, self.counts = live_folder(path), Counts()
        self._row, self._base, self._lock = row, base, lock
        self.current: Log | None = None
        self.number = 0
        # Sizes of those before it, by segment.
        self._older: dict[int, int] = {}

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(list(self._older.values())) + (0 if self.current is None else self.current.size)

    @property
    def failure(self) -> str | None:
        """Why nothing can be written any more, or None."""
        return None if self.current is None else self.current.failure

    def resume(self, found: Found) -> int:
        """Go on behind what was read; how many bytes of a torn tail were cut off."""
        last = max(found.logs)
        read = found.logs[last]
        self.current = Log.resume(log_path(self.folder, last), read)
        self._older = {segment: one.size for segment, one in found.logs.items() if segment != last}
        self.number = self.current.number
        return read.torn

    def begin(self, check: Callable[[], None]) -> None:
        """Begin the first log. ``check`` is asked once nobody else can write the folder.

        Raises DataError where another process does, and as `Log.create`; then nothing is held.
        """
        lock = FolderLock(self.folder)
        try:
            check()
            self.current = self._new(1, 1)
        except BaseException:
            # Others may write what this one may not.
            lock.release(clean=True)
            raise
        self._lock = lock

    def append(self, changes: Sequence[Change], *, sync: bool) -> int:
        """Write changes; the number of the write. Raises as `Log.append` and `Log.sync`."""
        assert self.current is not None
        self.number = number = self.current.append(encode(changes))
        if sync:
            self.sync(self.current)
        self.counts.writes += 1
        return number

    def sync(self, log: Log) -> None:
        """Wait until all that was written of a log is on the disk."""
        begun = time.perf_counter()
        log.sync()
        self.counts.syncs += 1
        self.counts.sync_s += time.perf_counter() - begun

    def rotate(self) -> int:
        """Begin another log; the number of the last write before it."""
        assert self.current is not None
        old, number, segment = self.current, self.current.number, self.current.header.segment
        # Nothing may be on the disk that comes after what is not.
        self.sync(old)
        self.current = self._new(segment + 1, number + 1)
        old.close()
        self._older[segment] = old.size
        return number

    def _new(self, segment: int, first: int) -> Log:
        dim, row = self._row
        return Log.create(
            log_path(self.folder, segment), dim=dim, base=self._base, segment=segment, first=first, row=row
        )

    def forget_older(self) -> None:
        """Remove the logs before the one that is written: a snapshot holds what they say."""
        # The oldest first: what is left after a crash has no gap.
        for one in sorted(self._older):
            log_path(self.folder, one).unlink(missing_ok=True)
            del self._older[one]

    def close(self) -> None:
        """Bring the log to the disk and let go of the folder."""
        if self.current is not None:
            if self.current.failure is None:
                with contextlib.suppress(AnabranchError):
                    self.sync(self.current)
            self.current.close()
        if self._lock is not None:
            self._lock.release()
