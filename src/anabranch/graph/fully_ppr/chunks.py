"""Work on sources chunk by chunk: in parallel, to memory or to disk, with a manifest so that a run that was stopped goes on.

    OUT.parts/manifest.json        what is made (all that decides the result), how it is cut into chunks
    OUT.parts/chunk-000012.anb     rows of a finished chunk
    OUT                            the result, once all chunks are there; the folder is then removed

A chunk is a range of the sources. What comes out does not depend on the chunks, the number of threads, or where a run was stopped.
"""

# Shapes: S sources, Z stored entries
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import AnabranchError, DataError
from anabranch.files import atomic_write_json, explained, parse_json
from anabranch.graph.beside import MANIFEST, check_parts, check_unchanged, holding_parts, remove_parts
from anabranch.graph.fully_ppr.result import KIND, FullyPPRResult, parquet_facts, parquet_writer
from anabranch.graph.names import names_arrays
from anabranch.graph.rows import SparseRows, row_file
from anabranch.graph.store import Graph
from anabranch.graph.workers import as_done

Work = Callable[[np.ndarray], SparseRows]
Progress = Callable[[int, int], None]
_CRC_BYTES = 1 << 24
# What lies in a folder of parts.
_OURS = r"manifest\.json|chunk-\d+\.anb"


@dataclass(frozen=True)
class Job:
    """What is made, of what.

    Attributes:
        graph: the graph.
        source_S: int64 [S], distinct.
        is_all: whether these are all nodes in order.
        facts: all that decides the result beside graph and sources, as JSON.
        dtype: of scores.
        chunk: sources of a chunk.
        workers: threads.
        progress: called with the number of sources done and S.
        cancel: set it to stop at the next chunk.
    """

    graph: Graph
    source_S: np.ndarray
    is_all: bool
    facts: Mapping[str, Any]
    dtype: Any
    chunk: int
    workers: int = 1
    progress: Progress | None = None
    cancel: threading.Event | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What tells two jobs apart."""
        arrays = [self.graph.indptr, self.graph.indices]
        arrays += [] if self.graph.weights is None else [self.graph.weights]
        return {"facts": dict(self.facts), "graph": [_crc(array) for array in arrays], "sources": _crc(self.source_S)}


def begun(out: str | Path) -> dict[str, Any] | None:
    """Facts of the run whose parts lie at ``out``, here or of Spark; None where there is none, or `run` will not be able to read it."""
    if "://" in str(out):
        return None
    try:
        found = parse_json((_folder(Path(out)) / MANIFEST).read_text(encoding="utf-8"))["job"]["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def run(job: Job, prepare: Callable[[], Work], out: str | Path | None) -> FullyPPRResult | Path:
    """Do all chunks that are missing; gives the result in memory, or the file that was written.

    ``prepare`` makes what takes sources and gives their rows, in ``job.workers`` threads; called when parts of another run are ruled out.
    Raises DataError where ``out`` cannot be written or its
    parts belong to another run, AnabranchError where the run was cancelled.
    """
    if out is None:
        found = dict(_finished(job, prepare, range(_count(job)), 0))
        return FullyPPRResult(_together(job, found), job.graph.names, dict(job.facts))
    out = Path(out)
    if out.is_dir():
        raise DataError(f"cannot write {out}: it is a folder; name a file")
    # In the end it would be too late to say so.
    check_unchanged(out)
    folder = _folder(out)
    _check_names(folder)
    with holding_parts(folder):
        job, done = _resumed(job, folder)
        missing = [number for number in range(_count(job)) if number not in done]
        already = sum(len(_part(job, number)) for number in done)
        for number, rows in _finished(job, prepare, missing, already):
            rows.save(_path(folder, number))
        _assemble(job, folder, out)
        # Those that were read as rows or written here.
        remove_parts(folder, [_path(folder, number).name for number in range(_count(job))])
    return out


def _finished(job: Job, prepare: Callable[[], Work], numbers: Any, already: int) -> Iterator[tuple[int, SparseRows]]:
    """Chunks as they are done, at most a few more than workers under way."""
    total, waiting = len(job.source_S), list(numbers)
    if job.progress is not None:
        job.progress(already, total)
    _check_cancelled(job, already)
    if not waiting:
        return
    parts = ((number, _part(job, number)) for number in waiting)
    # Threads end before an error goes on.
    with closing(as_done(prepare(), parts, job.workers)) as made:
        for number, rows in made:
            already += len(rows)
            yield number, rows
            if job.progress is not None:
                job.progress(already, total)
            if already < total:
                _check_cancelled(job, already)


def _check_cancelled(job: Job, already: int) -> None:
    if job.cancel is not None and job.cancel.is_set():
        raise AnabranchError(
            f"cancelled after {already:,} of {len(job.source_S):,} sources; with the same `out` the run goes on from there"
        )


def _count(job: Job) -> int:
    return -(-len(job.source_S) // job.chunk)


def _part(job: Job, number: int) -> np.ndarray:
    return job.source_S[number * job.chunk : (number + 1) * job.chunk]


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.anb"


def _resumed(job: Job, folder: Path) -> tuple[Job, set[int]]:
    """The job with the chunks of the manifest, and which of them are there; a new manifest where there is none."""
    path, identity = folder / MANIFEST, job.identity
    _check_names(folder)
    if not path.exists():
        atomic_write_json(path, {"job": identity, "chunk": job.chunk})
        return job, set()
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        recorded, chunk = manifest["job"], manifest["chunk"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not readable; remove {folder} to start anew") from error
    if recorded != identity:
        raise DataError(
            f"{folder} holds parts of another run (other graph, sources or settings); remove it to start anew"
        )
    if type(chunk) is not int or not 0 < chunk < 2**63:
        raise DataError(f"{path} says that a part has {shown(chunk)} sources; remove {folder} to start anew")
    job = Job(**{**vars(job), "chunk": chunk})
    done = set()
    for number in range(_count(job)):
        if _path(folder, number).exists():
            rows = SparseRows.load(_path(folder, number))
            if len(rows) != len(_part(job, number)):
                raise DataError(f"{_path(folder, number)} has {len(rows)} rows; remove {folder} to start anew")
            done.add(number)
    return job, done


def _check_names(folder: Path) -> None:
    """Before a lock is put there, and once nobody else puts anything there. Raises DataError as `check_parts`."""
    if folder.is_dir():
        with explained(folder):
            names = os.listdir(folder)
        check_parts(folder, names, _OURS if MANIFEST in names else "")


def _assemble(job: Job, folder: Path, out: Path) -> None:
    num_nodes, names = job.graph.num_nodes, job.graph.names
    parts = ((number, SparseRows.load(_path(folder, number), mmap=True)) for number in range(_count(job)))
    if out.suffix == ".parquet":
        meta = parquet_facts(num_nodes, dict(job.facts), is_all=job.is_all, ordered=True)
        with parquet_writer(out, num_nodes, job.dtype, names, meta) as write:
            for number, rows in parts:
                write(SparseRows(rows.indptr, rows.ids, rows.values, num_nodes, _part(job, number)), 0)
        return
    extra = names_arrays(names)
    if not job.is_all:
        extra["nodes"] = job.source_S
    with row_file(out, num_nodes, job.dtype, kind=KIND, extra=extra, meta={"facts": dict(job.facts)}) as file:
        for _, rows in parts:
            file.append(rows)


def _together(job: Job, parts: dict[int, SparseRows]) -> SparseRows:
    """All rows, in the order of their sources. Each part goes as it is copied, or all rows would be there twice."""
    num_nodes = job.graph.num_nodes
    lengths = [np.diff(parts[number].indptr) for number in sorted(parts)]
    indptr = np.append(0, np.cumsum(np.concatenate(lengths) if lengths else [])).astype(np.int64)
    first = parts[min(parts)] if parts else SparseRows.from_rows([], num_nodes, dtype=job.dtype)
    ids, values = np.empty(indptr[-1], first.ids.dtype), np.empty(indptr[-1], first.values.dtype)
    del first
    begin = 0
    for number in sorted(parts):
        rows = parts.pop(number)
        end = begin + len(rows.ids)
        ids[begin:end], values[begin:end] = rows.ids, rows.values
        begin = end
    return SparseRows(indptr, ids, values, num_nodes, None if job.is_all else job.source_S)


def _crc(array: np.ndarray) -> int:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    found = 0
    for start in range(0, len(flat), _CRC_BYTES):
        found = zlib.crc32(flat[start : start + _CRC_BYTES].data, found)
    return found
