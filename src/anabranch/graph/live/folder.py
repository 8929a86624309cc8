"""The files of an index that takes changes: which there are, and what they hold together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.beside import live_folder, segments
from anabranch.graph.disk import DiskIndex, is_on_disk
from anabranch.graph.hnsw import HNSW, storage
from anabranch.graph.live.changes import BYTES, FLOATS, Change
from anabranch.graph.live.log import Frame, Read, read_log
from anabranch.graph.names import GrowingNames, Names, fingerprint, names_path, read_names
from anabranch.graph.workers import asked_workers

SNAPSHOT = "snapshot.anb"
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
        names: of elements, with those that changes brought; None where there are none.
        num_named: how many of them the file beside the index has; 0 where there is none.
        names_mark: that file's fingerprint; None where there is none.
    """

    index: HNSW
    base: str
    number: int
    logs: dict[int, Read]
    names: GrowingNames | None
    num_named: int
    names_mark: str | None

    def frames(self) -> list[Frame]:
        """Those that are not in the index yet, in their order."""
        return [frame for read in self.logs.values() for frame in read.frames if frame.number > self.number]


def row_of(index: HNSW | DiskIndex) -> tuple[int, str]:
    """Numbers in a row that a change brings, and their type."""
    return index.row_size, BYTES if index.metric == "hamming" else FLOATS


def log_path(folder: Path, segment: int) -> Path:
    """The log of a number."""
    return folder / f"log-{segment:08}"


def find(path: Path, *, mmap: bool = False, workers: int | None = None, verify: bool = False) -> Found:
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
        index = _load(path, mmap, workers, verify=verify or not mmap)
        return Found(index, base, 0, {}, *_names(path, [], None, []))
    index, number, began_with, more, named = _index(path, folder, has_snapshot, mmap, workers)
    logs = {segment: read_log(log_path(folder, segment), is_last=segment == numbers[-1]) for segment in numbers}
    _check(folder, index, number, logs)
    began_with = began_with or next(iter(logs.values())).header.base
    if began_with != base or any(read.header.base != base for read in logs.values()):
        raise DataError(
            f"{folder} holds changes of another index than {path}, which was replaced since; bring the old file back, or move the "
            "folder away to begin with the new one"
        )
    changes = [
        change for read in logs.values() for frame in read.frames if frame.number > number for change in frame.changes
    ]
    return Found(index, base, number, logs, *_names(path, more, named, changes))


def _index(
    path: Path, folder: Path, has_snapshot: bool, mmap: bool, workers: int | None
) -> tuple[HNSW, int, str | None, list[Any], int | None]:
    """The index that the logs change, the last change in it, what it began with, names that changes in it brought, and how many there
    were before these, if it says so."""
    if not has_snapshot:
        return _load(path, mmap, workers), 0, None, [], None
    source = folder / SNAPSHOT
    # Also where it is mapped: the next snapshot would give what is damaged here a checksum that is right.
    read = read_arrays(source, storage.KIND, versions=storage.VERSIONS, mmap=mmap, verify=True)
    about = read.meta.get("live")
    if (
        not isinstance(about, dict)
        or not isinstance(about.get("number"), int)
        or not isinstance(about.get("base"), str)
        or not isinstance(more := read.meta.get("names", []), list)
    ):
        raise DataError(f"{source} is an index, but no snapshot of one that takes changes")
    index = HNSW._made(read.arrays, read.meta, mapped=mmap, source=str(source), workers=workers)
    return index, about["number"], about["base"], more, about.get("named")


def names_mark(path: Path) -> str | None:
    """What tells the file of names beside an index from another one; None where there is none."""
    place = names_path(path)
    return fingerprint(place) if place.exists() else None


def _names(
    path: Path, more: list[Any], named: int | None, changes: list[Change]
) -> tuple[GrowingNames | None, int, str | None]:
    """Names of elements: those beside the index, ``more`` of a snapshot behind ``named`` others, and those that changes bring."""
    mark, held = names_mark(path), read_names(path)
    brought = [(change.first_named, list(change.names)) for change in changes if change.names]
    first_new = more or (brought[0][1] if brought else [])
    if held is None and not first_new:
        return None, 0, None
    # Of an index that was empty when they came, and had none.
    is_first = named == 0 if more else bool(brought) and brought[0][0] == 0
    if held is None and not is_first:
        raise DataError(
            f"{live_folder(path)} brings names of elements, and those that were there before are missing: bring {names_path(path)} back"
        )
    names, count = None if held is None else GrowingNames(held), 0 if held is None else len(held)
    if names is None or (names.is_open and first_new):
        names = GrowingNames.beginning(first_new)
    for first, new in [(count, more), *brought]:
        try:
            # Of a release that knew no bound, maybe.
            names.check(new, longest=None)
        except InputError as error:
            raise DataError(f"{live_folder(path)} brings names that are none: {error}") from None
        if first != len(names) or any(names.find(name) is not None for name in new):
            raise DataError(
                f"{live_folder(path)} brings names of elements behind others than those in {names_path(path)}: bring the file back that "
                "was there"
            )
        names.add(new)
    return names, count, mark


def check_named(path: Path, index: HNSW, names: GrowingNames | None) -> None:
    """Raise DataError for an index with elements that have no name, where others have one."""
    ids = index.ids
    if names is not None and len(ids) and ids.max() >= len(names):
        raise DataError(
            f"{names_path(path)} has {len(names):,} names, and an id of the index is {ids.max()}; build the index again"
        )


def _load(path: Path, mmap: bool, workers: int | None, *, verify: bool = True) -> HNSW:
    """An index file."""
    read = read_arrays(path, storage.KIND, versions=storage.VERSIONS, mmap=mmap, verify=verify)
    return HNSW._made(read.arrays, read.meta, mapped=mmap, source=str(path), workers=workers)


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


def apply(index: HNSW, change: Change, workers: int | None = None) -> np.ndarray:
    """Make a change; which of its ids were there before, bool [N]."""
    known = index.contains(change.ids)
    if change.vectors is None:
        index.remove(change.ids[known])
        return known
    if not known.all():
        index.add(change.vectors[~known], change.ids[~known], workers=workers)
    there = np.flatnonzero(known)
    for begin in range(0, len(there), MOVED):
        rows = there[begin : begin + MOVED]
        index.remove(change.ids[rows])
        index.add(change.vectors[rows], change.ids[rows], workers=workers)
    return known


def replay(index: HNSW, frames: list[Frame], workers: int | None = None) -> int:
    """Make changes: of each id the last one counts. Returns how many elements came, moved or went."""
    changes = [change for frame in frames for change in frame.changes if len(change.ids)]
    if not changes:
        return 0
    if index.metric == "l2" and index.dtype != "f32" and not index.rerank:
        # Rows are kept as they lie about a centre of those that came before: it must be what it was.
        for change in changes:
            apply(index, change, workers)
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
        index.add(rows, id_N[coming], workers=workers)
    return len(last_N)


def write_snapshot(folder: Path, state: dict[str, Any], base: str, number: int, named: int) -> None:
    """Put a snapshot in the place of the one before. ``state`` is that of a pickled index. Raises as `atomic_file`.

    ``named`` is how many names there were before changes brought some.
    """
    meta = {**state["meta"], "live": {"base": base, "number": number, "named": named}}
    write_arrays(folder / SNAPSHOT, storage.KIND, state["arrays"], meta, storage.VERSION, mode=0o600, is_held=True)


def open_named(
    path: str | Path, *, mmap: bool = False, workers: int | None = None, **former: Any
) -> tuple[HNSW | DiskIndex, Names | None]:
    """The index at a path with the changes that a server took, in memory, and the names of its elements; files stay as they are.

    One on disk takes no changes. Raises DataError as `HNSW.load` or `DiskIndex`, and where the changes beside it, or its names, are damaged
    or of another index.
    """
    path, workers = Path(path), asked_workers(workers, former, "open_named")
    if is_on_disk(path):
        index = DiskIndex(path, mmap=mmap, workers=workers)
        return index, read_names(path, index.ids)
    for attempt in range(TRIES):
        before = segments(live_folder(path))
        try:
            found = find(path, mmap=mmap, workers=workers)
            break
        except DataError:
            # A server may have put a snapshot in the place of its logs while they were read.
            if attempt == TRIES - 1 or segments(live_folder(path)) == before:
                raise
    replay(found.index, found.frames(), workers)
    check_named(path, found.index, found.names)
    return found.index, found.names


def open_index(path: str | Path, *, mmap: bool = False, workers: int | None = None, **former: Any) -> HNSW | DiskIndex:
    """`open_named` without the names."""
    return open_named(path, mmap=mmap, workers=asked_workers(workers, former, "open_index"))[0]
