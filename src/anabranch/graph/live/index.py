"""`LiveIndex`: an index whose changes are in a log before they are acknowledged."""
# Shapes: N vectors, D dimension

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch import machine
from anabranch.errors import AnabranchError, CapacityError, DataError, InputError
from anabranch.graph.beside import FolderLock, live_folder, segments
from anabranch.graph.hnsw.checks import as_distinct, as_ids, as_positive, as_vectors
from anabranch.graph.live.background import Flusher, RetiredError, Snapshots
from anabranch.graph.live.changes import Change
from anabranch.graph.live.folder import SNAPSHOT, Found, apply, check_named, find, log_path, names_mark, replay, row_of
from anabranch.graph.live.group import Groups, Waiting
from anabranch.graph.live.log import check_size
from anabranch.graph.live.logs import Counts, Logs
from anabranch.graph.live.naming import Naming, names_for
from anabranch.graph.names import GrowingNames, fingerprint
from anabranch.graph.workers import asked_workers

logger = logging.getLogger(__name__)

FSYNC = ("always", "never")
SNAPSHOT_BYTES = 64 << 20


class NoRoomError(InputError):
    """The index holds as many vectors as it may."""


class LiveIndex:
    """An `HNSW` that takes changes for good. Use `open`. Any number of threads may call it at once.

    A change is written to the log, brought to the disk as ``fsync`` says, made, and then its call returns; changes of several threads
    share one write and one wait. The ones that were acknowledged are there when it is opened again, whatever ended the process; of a change
    that was under way all is there, or nothing. Searches go on ``index`` meanwhile. Nothing else may change that.

    Attributes:
        path: of the index file that it began with, which stays as it is.
        index: for searches.
        names: what its elements are called, by id; None where they have none. Of one that is empty, the first that come say.
        num_named: how many names the file beside the index has.
        logs: of its changes.
        groups: in which they are made.
        is_closed: whether none are taken any more.
    """

    def __init__(
        self,
        path: Path,
        found: Found,
        lock: FolderLock | None,
        *,
        fsync: str | float,
        snapshot_bytes: int,
        most: int | None,
    ) -> None:
        """Use `open`."""
        self.path, self.index, self.base = path, found.index, found.base
        self.names: GrowingNames | None = found.names
        self.fsync, self.snapshot_bytes, self.most = fsync, snapshot_bytes, most
        self.logs = Logs(path, row_of(found.index), found.base, lock)
        self.groups = Groups(self.check, self._write)
        self.is_closed = False
        self._process = os.getpid()
        self._names_mark, self.num_named = found.names_mark, found.num_named
        self._failure: str | None = None
        self._snapshots = Snapshots(self)
        self._flusher: Flusher | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        fsync: str | float = "always",
        snapshot_bytes: int = SNAPSHOT_BYTES,
        most: int | None = None,
        mmap: bool = False,
        workers: int | None = None,
        **former: Any,
    ) -> Self:
        """An index with all that was acknowledged. Nothing is written before the first change.

        Args:
            path: what `HNSW.save` wrote. Changes lie in a folder beside it.
            fsync: when changes are brought to the disk: "always", before they are acknowledged; a number, every so many seconds, so that a
                loss of power (not of the process) may cost what came since; "never", when the system likes.
            snapshot_bytes: write a snapshot and begin a new log once logs are larger.
            most: vectors that the index may hold; None for as many as there is memory for.
            mmap: as of `HNSW.load`.
            workers: as of `HNSW.load`, and so is ``former``.

        Raises:
            DataError: files are missing, damaged, or do not belong together; or another process writes the folder.
            InputError: an argument has a value it may not have.
        """
        path, workers = Path(path), asked_workers(workers, former, "open")
        if fsync not in FSYNC and (isinstance(fsync, str | bool) or not 0 < fsync < float("inf")):
            raise InputError(f"fsync is {fsync!r}; it must be always, never, or a positive number of seconds")
        snapshot_bytes = as_positive(snapshot_bytes, "snapshot_bytes")
        most = None if most is None else as_positive(most, "most")
        folder = live_folder(path)
        held = FolderLock(folder) if segments(folder) else None
        try:
            # The first snapshot would give what is damaged a checksum that is right.
            found = find(path, mmap=mmap, workers=workers, verify=True)
            live = cls(path, found, held, fsync=fsync, snapshot_bytes=snapshot_bytes, most=most)
            if found.logs:
                live._resume(found, workers)
            check_named(path, found.index, found.names)
        except BaseException:
            if held is not None:
                held.release()
            raise
        return live

    def _resume(self, found: Found, workers: int | None) -> None:
        for name in (".log-*", f".{SNAPSHOT}.*"):
            # Of a write that a crash broke off.
            for left in self.logs.folder.glob(name):
                left.unlink(missing_ok=True)
        self.counts.replayed = replay(self.index, found.frames(), workers)
        if torn := self.logs.resume(found):
            last = log_path(self.logs.folder, max(found.logs))
            logger.warning("%s: %d bytes of a change that nobody was told of are cut off", last, torn)
        self._begin_flushing()
        self._snapshots.begin_if_due()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.index)

    # What is known of it

    @property
    def counts(self) -> Counts:
        """See `Counts`."""
        return self.logs.counts

    @property
    def takes_names(self) -> bool:
        """Whether elements have names, or may have some: those that come into an empty index say so."""
        return self.names is not None or not len(self.index)

    @property
    def has_changes(self) -> bool:
        """Whether it ever took one."""
        return self.logs.current is not None

    @property
    def number(self) -> int:
        """Of the last write, 0 for none."""
        return self.logs.number

    @property
    def log_bytes(self) -> int:
        """Bytes of the logs."""
        return self.logs.size

    @property
    def failure(self) -> str | None:
        """Why no changes are taken any more, or None."""
        return self._failure or self.logs.failure

    def is_of_this_file(self) -> bool:
        """Whether the index file, and that of its names, are still those that it began with. Raises DataError if there is none."""
        return fingerprint(self.path) == self.base and names_mark(self.path) == self._names_mark

    def is_current(self) -> bool:
        """Whether files say what is here: no other process took changes since they were read, or replaced the index file.

        Raises DataError as `is_of_this_file`.
        """
        return self.is_of_this_file() and (self.has_changes or not segments(self.logs.folder))

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
        return self._make(Waiting(Change(as_distinct(as_ids(ids, len(vector_ND))), vector_ND)))

    def upsert_named(self, names: Sequence[Any], vectors: Any) -> tuple[int, np.ndarray]:
        """`upsert` by names, of an index whose elements have some, or which is empty. A name keeps its id, also while its element is gone.

        Args:
            names: N of them, each once: integers or text, as those of the index. The first say for all.
            vectors: [N, D].

        Returns and raises as `upsert`, and raises InputError where elements have no names.
        """
        vector_ND = as_vectors(vectors, self.index.dim, self.index.metric, "vectors")
        called = self._called(names)
        if len(called) != len(vector_ND):
            raise InputError(f"there are {len(called):,} names for {len(vector_ND):,} vectors; give one each")
        return self._make(Waiting(Change(np.zeros(len(called), np.int64), vector_ND, tuple(called)), called))

    def delete(self, ids: Any) -> tuple[int, np.ndarray]:
        """Take elements out; those that are not there stay so.

        Returns:
            The number of the write, and which of the ids were there, bool [N].

        Raises:
            InputError: ids that are none, or the same one twice; more than 2 GiB of them.
            CapacityError: as `upsert`, as are others.
            DataError: as `upsert`.
        """
        return self._make(Waiting(Change(as_distinct(as_ids(ids, None)), None)))

    def delete_named(self, names: Sequence[Any]) -> tuple[int, np.ndarray]:
        """`delete` by names; those that are of no element are among the ones that were not there.

        Returns and raises as `delete`, and raises InputError where elements have no names.
        """
        called = self._called(names)
        return self._make(Waiting(Change(np.zeros(len(called), np.int64), None), called))

    def _called(self, names: Sequence[Any]) -> list[Any]:
        called = list(names)
        # Looked at again when it is their turn: until then others may have brought the first.
        names_for(self.names, called, is_empty=not len(self.index))
        return called

    def _make(self, mine: Waiting) -> tuple[int, np.ndarray]:
        if not len(mine.change.ids):
            return self.number, np.empty(0, bool)
        self._check_process()
        check_size(mine.change)
        self.groups.make(mine)
        assert mine.known is not None
        return mine.number, mine.known

    def _check_process(self) -> None:
        """Before any lock, which a thread of the other process may have held."""
        if self._process != os.getpid():
            raise DataError(
                f"{self.path} takes changes in the process that opened it, not in one that was forked from it"
            )

    def check(self) -> None:
        """Raise DataError where no changes are taken any more."""
        if self.is_closed:
            raise RetiredError(f"{self.path} takes no changes any more: it was closed")
        if self._failure is not None:
            raise DataError(f"no changes are taken any more: {self._failure}; start again")

    def _write(self, group: list[Waiting]) -> None:
        """Log and make changes. Those that cannot be made get their error and are not logged."""
        self.check()
        room = None if self.most is None else self.most - len(self.index)
        kept, naming = [], Naming(self.names, is_empty=not len(self.index))
        for one in group:
            try:
                change = naming.resolved(one)
                room = self._check_room(change, room)
            except AnabranchError as error:
                one.error = error
                continue
            naming.take(change)
            one.change = change
            if len(change.ids):
                kept.append(one)
            else:
                # Names of no element.
                one.number, one.known = self.number, np.zeros(len(one.called or ()), bool)
        if not kept:
            return
        self._begin_log()
        self._check_there()
        number = self.logs.append([one.change for one in kept], sync=self.fsync == "always")
        self.names = naming.names
        for one in kept:
            one.number = number
            try:
                one.known = self._apply(one)
            except BaseException as error:
                # It is in the log, so what is here is less than what will be there again.
                self._failure = f"a change that is logged could not be made ({error})"
                logger.exception("%s: %s", self.path, self._failure)
                raise
        self._snapshots.begin_if_due()

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

    def _begin_log(self) -> None:
        def check() -> None:
            if not self.is_current():
                raise DataError(f"{self.path} was changed by another process since it was read; read it again")

        if not self.has_changes:
            self.logs.begin(check)
            self._begin_flushing()

    def _check_there(self) -> None:
        """Raise DataError where nobody would find what is written now: a file was removed or renamed. Nothing has changed then."""
        log = self.logs.current
        assert log is not None
        # Another file in the index's place is told when that is read (`is_current`); changes of the old one go on.
        gone = log.path if not log.is_there() else self.path if not self.path.exists() else None
        if gone is not None:
            raise DataError(f"{gone} was removed or renamed while changes are taken; bring it back, or start again")

    def _apply(self, one: Waiting) -> np.ndarray:
        change = one.change
        if change.names:
            assert self.names is not None
            # Before its element is found.
            self.names.add(change.names)
        known = apply(self.index, change)
        if change.vectors is not None:
            self.counts.upserted += len(change.ids)
            return known
        self.counts.deleted += int(known.sum())
        if one.called is None or len(known) == len(one.called):
            return known
        assert self.names is not None
        found = np.array([self.names.find(name) is not None for name in one.called])
        found[found] = known
        return found

    # In the background

    def snapshot(self) -> None:
        """Write the index as it is into the folder, and cut the log. Searches go on, and so do changes, but while it is copied in memory.

        Where memory does not suffice for a copy, changes wait until it is written.

        Raises as `anabranch.files.atomic_file`; the log then still holds all.
        """
        self._check_process()
        self._snapshots.write()

    def new_names(self) -> list[Any]:
        """Names that changes brought."""
        return [] if self.names is None else self.names.since(self.num_named)

    def _begin_flushing(self) -> None:
        if not isinstance(self.fsync, str) and self._flusher is None:
            self._flusher = Flusher(self, self.fsync)

    def retire(self) -> bool:
        """Take no changes any more, unless some were taken; whether that is so. For who puts another index in its place."""
        with self.groups.turn, self.groups.changed:
            if self.has_changes:
                return False
            self.is_closed = True
            return True

    def close(self) -> None:
        """Bring the log to the disk and let go of the folder. Changes that come later are refused; searches are not."""
        if self._process != os.getpid():
            return
        with self.groups.changed:
            self.is_closed = True
        if self._flusher is not None:
            self._flusher.close()
        self._snapshots.join()
        with self._snapshots.lock, self.groups.turn:
            self.logs.close()
