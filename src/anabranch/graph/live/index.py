"""`LiveIndex`: an index whose changes are in a log before they are acknowledged."""
# Shapes: N vectors, D dimension

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch import machine
from anabranch.errors import AnabranchError, CapacityError, DataError, InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.checks import as_distinct, as_ids, as_positive, as_vectors
from anabranch.graph.interrupts import Interrupts
from anabranch.graph.live import log as log_module
from anabranch.graph.live.folder import (
    SNAPSHOT,
    FolderLock,
    apply,
    find,
    live_folder,
    log_path,
    replay,
    row_of,
    segments,
    write_snapshot,
)
from anabranch.graph.live.log import Change, Log, check_size, encode, payload_bytes
from anabranch.graph.names import fingerprint

logger = logging.getLogger(__name__)

FSYNC = ("always", "never")
SNAPSHOT_BYTES = 64 << 20
# Of one write to the disk; a change that is larger goes alone.
GROUP_BYTES = 16 << 20


class NoRoomError(InputError):
    """The index holds as many vectors as it may."""


class _RetiredError(DataError):
    """Another index has taken its place."""


@dataclass
class _Waiting:
    """A change that waits for its turn, and what became of it."""

    change: Change
    is_done: bool = False
    number: int = 0
    known: np.ndarray | None = None
    error: BaseException | None = None


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


class LiveIndex:
    """An `HNSW` that takes changes for good. Use `open`. Any number of threads may call it at once.

    A change is written to the log, brought to the disk as ``fsync`` says, made, and then its call returns; changes of several threads
    share one write and one wait. The ones that were acknowledged are there when it is opened again, whatever ended the process; of a change
    that was under way all is there, or nothing. Searches go on ``index`` meanwhile. Nothing else may change that.

    Attributes:
        path: of the index file that it began with, which stays as it is.
        index: for searches.
        counts: see `Counts`.
    """

    def __init__(
        self, path: Path, index: HNSW, base: str, *, fsync: str | float, snapshot_bytes: int, most: int | None
    ) -> None:
        """Use `open`."""
        self.path, self.index, self.base, self.fsync = path, index, base, fsync
        self.snapshot_bytes, self.most = snapshot_bytes, most
        self.counts = Counts()
        self._folder, self._process = live_folder(path), os.getpid()
        self._lock: FolderLock | None = None
        self._log: Log | None = None
        # Of logs before the one that is written, by segment.
        self._older: dict[int, int] = {}
        self._number = 0
        # Whose turn it is to write: of a leader with all changes that wait, or of a snapshot, of which there is one at a time.
        self._turn, self._snapshotting = threading.Lock(), threading.Lock()
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._is_led = self._is_closed = False
        self._failure: str | None = None
        self._end = threading.Event()
        self._snapshot_thread: threading.Thread | None = None
        self._retry_bytes = 0
        self._flusher: threading.Thread | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        fsync: str | float = "always",
        snapshot_bytes: int = SNAPSHOT_BYTES,
        most: int | None = None,
        mmap: bool = False,
        num_threads: int | None = None,
    ) -> Self:
        """An index with all that was acknowledged. Nothing is written before the first change.

        Args:
            path: what `HNSW.save` wrote. Changes lie in a folder beside it.
            fsync: when changes are brought to the disk: "always", before they are acknowledged; a number, every so many seconds, so that a
                loss of power (not of the process) may cost what came since; "never", when the system likes.
            snapshot_bytes: write a snapshot and begin a new log once logs are larger.
            most: vectors that the index may hold; None for as many as there is memory for.
            mmap: as of `HNSW.load`.
            num_threads: as of `HNSW.load`.

        Raises:
            DataError: files are missing, damaged, or do not belong together; or another process writes the folder.
            InputError: an argument has a value it may not have.
        """
        path = Path(path)
        if fsync not in FSYNC and (isinstance(fsync, str | bool) or not 0 < fsync < float("inf")):
            raise InputError(f"fsync is {fsync!r}; it must be always, never, or a positive number of seconds")
        snapshot_bytes = as_positive(snapshot_bytes, "snapshot_bytes")
        most = None if most is None else as_positive(most, "most")
        folder = live_folder(path)
        held = FolderLock(folder) if segments(folder) else None
        try:
            # The first snapshot would give what is damaged a checksum that is right.
            found = find(path, mmap=mmap, num_threads=num_threads, verify=True)
            live = cls(path, found.index, found.base, fsync=fsync, snapshot_bytes=snapshot_bytes, most=most)
            live._lock = held
            if found.logs:
                live._resume(found, num_threads)
        except BaseException:
            if held is not None:
                held.release()
            raise
        return live

    def _resume(self, found: Any, num_threads: int | None) -> None:
        for name in (".log-*", f".{SNAPSHOT}.*"):
            # Of a write that a crash broke off.
            for left in self._folder.glob(name):
                left.unlink(missing_ok=True)
        self.counts.replayed = replay(self.index, found.frames(), num_threads)
        last = max(found.logs)
        read = found.logs[last]
        if read.torn:
            logger.warning(
                "%s: %d bytes of a change that nobody was told of are cut off", log_path(self._folder, last), read.torn
            )
        self._log = Log.resume(log_path(self._folder, last), read)
        self._older = {segment: one.size for segment, one in found.logs.items() if segment != last}
        self._number = self._log.number
        self._begin_flushing()
        if self.log_bytes > self.snapshot_bytes:
            self._begin_snapshot()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.index)

    # What is known of it

    @property
    def has_changes(self) -> bool:
        """Whether it ever took one."""
        return self._log is not None

    @property
    def number(self) -> int:
        """Of the last write, 0 for none."""
        return self._number

    @property
    def log_bytes(self) -> int:
        """Bytes of the logs."""
        return sum(list(self._older.values())) + (0 if self._log is None else self._log.size)

    @property
    def failure(self) -> str | None:
        """Why no changes are taken any more, or None."""
        return self._failure or (None if self._log is None else self._log.failure)

    def is_of_this_file(self) -> bool:
        """Whether the index file is still the one that it began with. Raises DataError if there is none."""
        return fingerprint(self.path) == self.base

    def is_current(self) -> bool:
        """Whether files say what is here: no other process took changes since they were read, or replaced the index file.

        Raises DataError as `is_of_this_file`.
        """
        return self.is_of_this_file() and (self.has_changes or not segments(self._folder))

    # Changing

    def upsert(self, ids: Any, vectors: Any) -> tuple[int, np.ndarray]:
        """Bring elements in, or move those that are there.

        Args:
            ids: int [N], not negative, each once.
            vectors: [N, D], as of `HNSW.add`.

        Returns:
            The number of the write, and which of the ids were there before, bool [N].

        Raises:
            InputError: as `HNSW.add`, and for more than 2 GiB at once; NoRoomError where the index would hold more than ``most``. Nothing
                changes.
            CapacityError: no room on the disk or in memory. Nothing changes.
            DataError: the log cannot be written, or this is closed. Whether the change is there is known when it is opened again.
        """
        vector_ND = as_vectors(vectors, self.index.dim, self.index.metric, "vectors")
        id_N = as_distinct(as_ids(ids, len(vector_ND)))
        return self._make(Change(id_N, vector_ND))

    def delete(self, ids: Any) -> tuple[int, np.ndarray]:
        """Take elements out; those that are not there stay so.

        Returns:
            The number of the write, and which of the ids were there, bool [N].

        Raises:
            InputError: ids that are none, or the same one twice; more than 2 GiB of them.
            CapacityError: as `upsert`, as are others.
            DataError: as `upsert`.
        """
        return self._make(Change(as_distinct(as_ids(ids, None)), None))

    def _make(self, change: Change) -> tuple[int, np.ndarray]:
        if not len(change.ids):
            return self._number, np.empty(0, bool)
        self._check_process()
        check_size(change)
        mine = _Waiting(change)
        # An interrupt waits: in between lies what is in the log and not in the index.
        with Interrupts():
            with self._changed:
                self._check()
                self._waiting.append(mine)
                while not mine.is_done and self._is_led:
                    self._changed.wait()
                if not mine.is_done:
                    self._is_led = True
            if not mine.is_done:
                self._lead(mine)
        if mine.error is not None:
            raise mine.error
        assert mine.known is not None
        return mine.number, mine.known

    def _check_process(self) -> None:
        """Before any lock, which a thread of the other process may have held."""
        if self._process != os.getpid():
            raise DataError(
                f"{self.path} takes changes in the process that opened it, not in one that was forked from it"
            )

    def _check(self) -> None:
        if self._is_closed:
            raise _RetiredError(f"{self.path} takes no changes any more: it was closed")
        if self._failure is not None:
            raise DataError(f"no changes are taken any more: {self._failure}; start again")

    def _lead(self, mine: _Waiting) -> None:
        """Make the changes that wait, one write for as many as fit, until one's own is done."""
        try:
            while not mine.is_done:
                with self._turn:
                    with self._changed:
                        group = self._next_group()
                    try:
                        self._write(group)
                    except BaseException as error:
                        for one in group:
                            if one.known is None and one.error is None:
                                one.error = error
                    finally:
                        with self._changed:
                            for one in group:
                                one.is_done = True
                            self._changed.notify_all()
        finally:
            with self._changed:
                self._is_led = False
                self._changed.notify_all()

    def _next_group(self) -> list[_Waiting]:
        size, count = 0, 0
        for one in self._waiting:
            size += payload_bytes(one.change)
            if count and size > min(GROUP_BYTES, log_module.MOST_PAYLOAD):
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group

    def _write(self, group: list[_Waiting]) -> None:
        """Log and make changes. Those that cannot be made get their error and are not logged."""
        self._check()
        room = None if self.most is None else self.most - len(self.index)
        kept = []
        for one in group:
            try:
                room = self._check_room(one.change, room)
                kept.append(one)
            except AnabranchError as error:
                one.error = error
        if not kept:
            return
        log = self._begin_log()
        self._number = number = log.append(encode([one.change for one in kept]))
        if self.fsync == "always":
            self._sync(log)
        self.counts.writes += 1
        for one in kept:
            one.number = number
            try:
                one.known = self._apply(one.change)
            except BaseException as error:
                # It is in the log, so what is here is less than what will be there again.
                self._failure = f"a change that is logged could not be made ({error})"
                logger.exception("%s: %s", self.path, self._failure)
                raise
        if self.log_bytes > max(self.snapshot_bytes, self._retry_bytes):
            self._begin_snapshot()

    def _check_room(self, change: Change, room: int | None) -> int | None:
        """What room is left behind a change. Raises NoRoomError, or CapacityError where arrays must grow and memory is short."""
        if change.vectors is None:
            return room
        new = int((~self.index.contains(change.ids)).sum())
        if room is not None and new > room:
            raise NoRoomError(
                f"the index holds {len(self.index):,} vectors and takes {self.most:,}; {new:,} more do not fit"
            )
        need = self.index.growth_bytes(len(change.ids))
        if need and need > machine.room_bytes():
            raise CapacityError(f"no memory for {new:,} more vectors: arrays of {need:,} bytes do not fit")
        return None if room is None else room - new

    def _begin_log(self) -> Log:
        if self._log is None:
            lock = FolderLock(self._folder)
            try:
                if not self.is_current():
                    raise DataError(f"{self.path} was changed by another process since it was read; read it again")
                self._log = self._new_log(1, 1)
            except BaseException:
                # Others may write what this one may not.
                lock.release(clean=True)
                raise
            self._lock = lock
            self._begin_flushing()
        return self._log

    def _new_log(self, segment: int, first: int) -> Log:
        dim, row = row_of(self.index)
        return Log.create(
            log_path(self._folder, segment), dim=dim, base=self.base, segment=segment, first=first, row=row
        )

    def _sync(self, log: Log) -> None:
        begun = time.perf_counter()
        log.sync()
        self.counts.syncs += 1
        self.counts.sync_s += time.perf_counter() - begun

    def _apply(self, change: Change) -> np.ndarray:
        known = apply(self.index, change)
        if change.vectors is None:
            self.counts.deleted += int(known.sum())
        else:
            self.counts.upserted += len(change.ids)
        return known

    # In the background

    def _begin_flushing(self) -> None:
        if isinstance(self.fsync, str) or self._flusher is not None:
            return

        def flush(every_s: float) -> None:
            while not self._end.wait(every_s):
                log = self._log
                try:
                    # One that was replaced meanwhile is on the disk.
                    if log is not None and log.failure is None:
                        self._sync(log)
                except (AnabranchError, OSError) as error:
                    logger.error("%s: no changes are taken any more: %s", self.path, error)

        self._flusher = threading.Thread(target=flush, args=(self.fsync,), name="flush", daemon=True)
        self._flusher.start()

    def _begin_snapshot(self) -> None:
        running = self._snapshot_thread
        if self._is_closed or (running is not None and running.is_alive()):
            return
        self._snapshot_thread = threading.Thread(target=self._snapshot_or_warn, name="snapshot", daemon=True)
        self._snapshot_thread.start()

    def _snapshot_or_warn(self) -> None:
        try:
            self.snapshot()
        except _RetiredError:
            logger.debug("%s was closed before its snapshot", self.path)
        except Exception as error:
            # Not at every change from now on.
            self._retry_bytes = self.log_bytes + self.snapshot_bytes
            logger.warning("%s: a snapshot could not be written, the log goes on: %s", self.path, error)

    def snapshot(self) -> None:
        """Write the index as it is into the folder, and cut the log. Searches go on, and so do changes, but while it is copied in memory.

        Where memory does not suffice for a copy, changes wait until it is written.

        Raises as `anabranch.files.atomic_file`; the log then still holds all.
        """
        self._check_process()
        with Interrupts(), self._snapshotting, contextlib.ExitStack() as turn:
            turn.enter_context(self._turn)
            with self._changed:
                self._check()
            if self._log is None:
                return
            try:
                self._write_snapshot(turn)
            except BaseException:
                self.counts.failed += 1
                raise
            self.counts.snapshots += 1
            self.counts.snapshot_at = time.time()
            self._retry_bytes = 0

    def _write_snapshot(self, turn: contextlib.ExitStack) -> None:
        assert self._log is not None
        old, number, segment = self._log, self._log.number, self._log.header.segment
        # Nothing may be on the disk that comes after what is not.
        self._sync(old)
        self._log = self._new_log(segment + 1, number + 1)
        old.close()
        self._older[segment] = old.size
        is_copied = 2 * self.index.size_bytes < machine.room_bytes()
        state = self.index._state(copy=is_copied)
        if is_copied:
            # The rest is between this thread and the disk.
            turn.close()
        write_snapshot(self._folder, state, self.base, number)
        # The oldest first: what is left after a crash has no gap.
        for one in sorted(self._older):
            log_path(self._folder, one).unlink(missing_ok=True)
            del self._older[one]

    def retire(self) -> bool:
        """Take no changes any more, unless some were taken; whether that is so. For who puts another index in its place."""
        with self._turn, self._changed:
            if self._log is not None:
                return False
            self._is_closed = True
            return True

    def close(self) -> None:
        """Bring the log to the disk and let go of the folder. Changes that come later are refused; searches are not."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._is_closed = True
        self._end.set()
        for thread in (self._flusher, self._snapshot_thread):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        with self._snapshotting, self._turn:
            if self._log is not None:
                if self._log.failure is None:
                    with contextlib.suppress(AnabranchError):
                        self._sync(self._log)
                self._log.close()
            if self._lock is not None:
                self._lock.release()
