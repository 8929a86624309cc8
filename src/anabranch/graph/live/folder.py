"""The files of an index that takes changes: which there are, who may write them, and what they hold together."""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.files import explained
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.disk import DiskIndex, is_on_disk
from anabranch.graph.hnsw import HNSW, storage
from anabranch.graph.live.log import BYTES, FLOATS, Change, Frame, Read, read_log
from anabranch.graph.names import fingerprint

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SNAPSHOT = "snapshot.anb"
LOCK = "lock"
# Elements that are there already are moved so many at a time, so that each is missing for a short while only.
MOVED = 64
# To read a folder that a server changes meanwhile.
TRIES = 5


@dataclass(frozen=True)
class Found:
    """An index and what changed since it was saved.

    Attributes:
        index: as it was saved.
        base: fingerprint of the file that its changes began with.
        number: of the last change that is in it already.
        logs: by segment, rising; the last is the one that was being written.
    """

    index: HNSW
    base: str
    number: int
    logs: dict[int, Read]

    def frames(self) -> list[Frame]:
        """Those that are not in the index yet, in their order."""
        return [frame for read in self.logs.values() for frame in read.frames if frame.number > self.number]


def live_folder(path: str | Path) -> Path:
    """Where the changes of the index at ``path`` lie."""
    return Path(f"{path}.live")


def row_of(index: HNSW | DiskIndex) -> tuple[int, str]:
    """Numbers in a row that a change brings, and their type."""
    return index.row_size, BYTES if index.metric == "hamming" else FLOATS


def log_path(folder: Path, segment: int) -> Path:
    """The log of a number."""
    return folder / f"log-{segment:08}"


def segments(folder: Path) -> list[int]:
    """Numbers of the logs there are, rising. Raises DataError where they may not be looked at."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return []
        # Not as if there were none: what changed would be missing from answers.
        raise DataError(f"cannot read {folder}: {(error.strerror or str(error)).lower()}") from error
    found = (name.removeprefix("log-") for name in names if name.startswith("log-"))
    return sorted(int(number) for number in found if number.isascii() and number.isdigit())


def find(path: Path, *, mmap: bool = False, num_threads: int | None = None, verify: bool = False) -> Found:
    """What the index file and the folder beside it hold. Changes nothing.

    Checksums of all arrays are looked at, but those of an index file that is mapped and has no changes: there ``verify`` says whether.

    Raises DataError for files that are missing, damaged, or do not belong together.
    """
    folder, base = live_folder(path), fingerprint(path)
    numbers = segments(folder)
    has_snapshot = (folder / SNAPSHOT).exists()
    if not numbers:
        if has_snapshot:
            raise DataError(
                f"{folder} holds a snapshot and no log, so what changed last is not known; bring the log back"
            )
        return Found(_load(path, mmap, num_threads, verify=verify or not mmap), base, 0, {})
    index, number, began_with = _index(path, folder, has_snapshot, mmap, num_threads)
    logs = {segment: read_log(log_path(folder, segment), is_last=segment == numbers[-1]) for segment in numbers}
    _check(folder, index, number, logs)
    began_with = began_with or next(iter(logs.values())).header.base
    if began_with != base or any(read.header.base != base for read in logs.values()):
        raise DataError(
            f"{folder} holds changes of another index than {path}, which was replaced since; bring the old file back, or move the "
            "folder away to begin with the new one"
        )
    return Found(index, base, number, logs)


def _index(
    path: Path, folder: Path, has_snapshot: bool, mmap: bool, num_threads: int | None
) -> tuple[HNSW, int, str | None]:
    """The index that the logs change, the last change in it, and what it began with."""
    if not has_snapshot:
        return _load(path, mmap, num_threads), 0, None
    source = folder / SNAPSHOT
    # Also where it is mapped: the next snapshot would give what is damaged here a checksum that is right.
    read = read_arrays(source, storage.KIND, versions=(storage.VERSION,), mmap=mmap, verify=True)
    about = read.meta.get("live")
    if (
        not isinstance(about, dict)
        or not isinstance(about.get("number"), int)
        or not isinstance(about.get("base"), str)
    ):
        raise DataError(f"{source} is an index, but no snapshot of one that takes changes")
    index = HNSW._made(read.arrays, read.meta, mapped=mmap, source=str(source), num_threads=num_threads)
    return index, about["number"], about["base"]


def _load(path: Path, mmap: bool, num_threads: int | None, *, verify: bool = True) -> HNSW:
    """An index file."""
    read = read_arrays(path, storage.KIND, versions=(storage.VERSION,), mmap=mmap, verify=verify)
    return HNSW._made(read.arrays, read.meta, mapped=mmap, source=str(path), num_threads=num_threads)


def _check(folder: Path, index: HNSW, number: int, logs: dict[int, Read]) -> None:
    """That no log is missing and all are of this index."""
    following = None
    for segment, read in logs.items():
        header, source = read.header, log_path(folder, segment)
        if header.segment != segment or (header.dim, header.row) != row_of(index):
            raise DataError(
                f"{source} says that it is log {header.segment} of an index of {header.dim} numbers; it is not one of this index"
            )
        if (following is None and header.first > number + 1) or (following is not None and header.first != following):
            begins = number + 1 if following is None else following
            raise DataError(
                f"{folder} has a gap: {source.name} begins with change {header.first:,}, and {begins:,} is missing; "
                "bring the missing log back"
            )
        following = header.first + len(read.frames)
    if following is not None and following <= number:
        raise DataError(
            f"{folder} has a gap: its snapshot holds change {number:,}, its logs end with {following - 1:,}"
        )


def apply(index: HNSW, change: Change, num_threads: int | None = None) -> np.ndarray:
    """Make a change; which of its ids were there before, bool [N]."""
    known = index.contains(change.ids)
    if change.vectors is None:
        index.remove(change.ids[known])
        return known
    if not known.all():
        index.add(change.vectors[~known], change.ids[~known], num_threads=num_threads)
    there = np.flatnonzero(known)
    for begin in range(0, len(there), MOVED):
        rows = there[begin : begin + MOVED]
        index.remove(change.ids[rows])
        index.add(change.vectors[rows], change.ids[rows], num_threads=num_threads)
    return known


def replay(index: HNSW, frames: list[Frame], num_threads: int | None = None) -> int:
    """Make changes: of each id the last one counts. Returns how many elements came, moved or went."""
    changes = [change for frame in frames for change in frame.changes if len(change.ids)]
    if not changes:
        return 0
    if index.metric == "l2" and index.dtype != "f32" and not index.rerank:
        # Rows are kept as they lie about the mean of those that came first, or first after all had gone: it must be what it was.
        for change in changes:
            apply(index, change, num_threads)
        return len(np.unique(np.concatenate([change.ids for change in changes])))
    id_N = np.concatenate([change.ids for change in changes])
    owner_N = np.repeat(np.arange(len(changes)), [len(change.ids) for change in changes])
    row_N = np.concatenate([np.arange(len(change.ids)) for change in changes])
    _, from_end = np.unique(id_N[::-1], return_index=True)
    # In the order in which they came.
    last_N = np.sort(len(id_N) - 1 - from_end)
    is_gone = np.array([changes[owner].vectors is None for owner in owner_N[last_N].tolist()], bool)
    known = index.contains(id_N[last_N])
    index.remove(id_N[last_N][known])
    coming = last_N[~is_gone]
    if coming.size:
        rows = np.empty((len(coming), row_of(index)[0]), row_of(index)[1])
        for place, which in enumerate(coming.tolist()):
            vectors = changes[owner_N[which]].vectors
            assert vectors is not None
            rows[place] = vectors[row_N[which]]
        index.add(rows, id_N[coming], num_threads=num_threads)
    return len(last_N)


def write_snapshot(folder: Path, state: dict[str, Any], base: str, number: int) -> None:
    """Put a snapshot in the place of the one before. ``state`` is that of a pickled index. Raises as `atomic_file`."""
    meta = {**state["meta"], "live": {"base": base, "number": number}}
    write_arrays(folder / SNAPSHOT, storage.KIND, state["arrays"], meta, storage.VERSION, mode=0o600)


def open_index(path: str | Path, *, mmap: bool = False, num_threads: int | None = None) -> HNSW | DiskIndex:
    """The index at a path with the changes that a server took, in memory; files stay as they are. One on disk takes no changes.

    Raises DataError as `HNSW.load` or `DiskIndex`, and where the changes beside it are damaged or of another index.
    """
    path = Path(path)
    if is_on_disk(path):
        return DiskIndex(path, mmap=mmap, num_threads=num_threads)
    for attempt in range(TRIES):
        before = segments(live_folder(path))
        try:
            found = find(path, mmap=mmap, num_threads=num_threads)
            break
        except DataError:
            # A server may have put a snapshot in the place of its logs while they were read.
            if attempt == TRIES - 1 or segments(live_folder(path)) == before:
                raise
    replay(found.index, found.frames(), num_threads)
    return found.index


def check_unchanged(path: str | Path) -> None:
    """Before an index is written. Raises InputError if a server took changes of the one that is there: they would be lost."""
    if segments(live_folder(path)):
        raise InputError(
            f"{live_folder(path)} holds changes of {path}, which would be lost if that were written; name another file, or move the "
            "folder away"
        )


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[None]:
    """Around reading an index and writing it, or another one in its place: no process takes changes of it meanwhile, which would be lost.

    Nothing is left beside the index, nor made where its folder is not there yet.

    Raises InputError as `check_unchanged`, DataError while another process takes changes or writes it, and as `explained`.
    """
    folder = live_folder(path)
    check_unchanged(path)
    if not folder.parent.is_dir():
        # Nobody can have opened it.
        yield
        return
    lock = FolderLock(folder)
    try:
        # Now that nothing can come any more.
        check_unchanged(path)
        yield
    finally:
        lock.release(clean=True)


def _make(folder: Path) -> None:
    """A folder that is still there after a loss of power: its name is in the folder around it, which is brought to the disk too."""
    if folder.is_dir():
        return
    # As its files: of its owner alone, whoever may read the index.
    folder.mkdir(0o700, exist_ok=True)
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderLock:
    """The right to write a folder, held by one process at a time; the system takes it back when that ends, however it does."""

    def __init__(self, folder: Path) -> None:
        """Take it. Raises DataError if another has it, and as `explained`."""
        self._folder = folder
        self._handle: int | None = None
        for _ in range(TRIES):
            if self._take(folder / LOCK):
                return
        raise self._refusal()

    def _take(self, path: Path) -> bool:
        """Whether the file that was locked is still the one that others find: who held it may have removed it (`release`)."""
        with explained(path):
            try:
                _make(self._folder)
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            except (FileNotFoundError, FileExistsError):
                # Who held it removed the folder just now.
                if self._folder.parent.is_dir():
                    return False
                raise
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise self._refusal() from None
        try:
            if os.path.samestat(os.fstat(self._handle), os.stat(path)):
                return True
        except FileNotFoundError:
            pass
        self.release()
        return False

    def _refusal(self) -> DataError:
        return DataError(f"{self._folder} is written by another process; an index takes changes from one at a time")

    def release(self, *, clean: bool = False) -> None:
        """Give it back. With ``clean`` nothing is left of a folder that holds nothing else."""
        if self._handle is None:
            return
        # Windows keeps open files; then the folder stays, empty but for this.
        with contextlib.suppress(OSError):
            if clean and os.listdir(self._folder) == [LOCK]:
                (self._folder / LOCK).unlink()
                self._folder.rmdir()
        os.close(self._handle)
        self._handle = None
