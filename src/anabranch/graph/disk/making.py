"""Making a disk index within a limit of memory: of vectors that may not fit into it, or of an `HNSW` that is there.

1. Codes are trained on a sample.
2. The graph: an `HNSW` of all vectors, where memory holds it; otherwise one of each shard (`shards`), one after the other, and an element
   has the links of both of its shards. What is in a shard can be reached from where walks over that begin, and all of these are roots.
3. The entry layer: level 1 of the `HNSW`; with shards, a graph of a sample.
4. Neighbours are put into one block (`packing`), and blocks, codes and tables into one file, which takes its place when it is whole.

Links wait on disk meanwhile, in a file that has no name: a build that is killed leaves nothing behind but a temporary file of the last
step.
"""
# Shapes: N vectors, D dimension, L room for links, S sample, E elements of the entry layer, R roots

import math
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch import machine
from anabranch.bounds import LARGEST_INT, MOST_SEED, shown, whole
from anabranch.errors import DataError, InputError
from anabranch.files import explained
from anabranch.graph.arguments import as_path, check_one_of
from anabranch.graph.codes import ProductCodes
from anabranch.graph.disk import shards
from anabranch.graph.disk.index import DiskIndex
from anabranch.graph.disk.packing import merge_links
from anabranch.graph.disk.plan import Plan, planned
from anabranch.graph.disk.source import Elements, Rows, Source
from anabranch.graph.disk.stored import METRICS, check_system
from anabranch.graph.disk.writing import Graph, write
from anabranch.graph.hnsw import HNSW, layout
from anabranch.graph.hnsw.checks import as_distinct, as_ids, as_positive
from anabranch.graph.hnsw.options import MAX_EF, MAX_M
from anabranch.graph.interrupts import Interrupts
from anabranch.graph.workers import asked_workers, num_workers

# With shards: one element in so many is in the entry layer, with so many links when it is inserted.
ENTRY_SHARE, ENTRY_M = 32, 8

# A limit that nobody gave: this share of the vectors as float32, and at least so much.
SHARE, LEAST = 0.2, 64 << 20

# Bytes written at once where a file cannot be made longer otherwise.
_ZEROS = 1 << 20


@dataclass(frozen=True)
class _Job:
    """What is to be made, of what, and where."""

    source: Source
    id_N: np.ndarray | None
    path: Path
    plan: Plan
    metric: str
    M: int
    ef_construction: int
    seed: int
    workers: int | None
    progress: Callable[[int], None]

    @property
    def at_once(self) -> int:
        """How many, if nobody said so."""
        return num_workers(self.workers)


def build(
    vectors: Any,
    path: str | Path,
    *,
    metric: str = "l2",
    memory: int | None = None,
    ids: Any = None,
    M: int = 16,
    ef_construction: int = 200,
    code_bytes: int | None = None,
    num_shards: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    **former: Any,
) -> DiskIndex:
    """Make an index of vectors, which may be more than memory holds, and open it.

    Args:
        vectors: [N, D] numbers, for example ``numpy.load(..., mmap_mode="r")``: they are read a piece at a time.
        path: the file, which is replaced when the new one is whole.
        metric: "l2" (squared), "ip" (1 - inner product) or "cosine" (vectors are scaled to length 1).
        memory: bytes that arrays may take, while it is made and while it is open. Default: a fifth of the vectors as float32, and at
            least 64 MiB.
        ids: int [N], not negative, each once; None for 0 ... N - 1.
        M: links of an element when it is inserted; 2 M accumulate, and 4 M with shards.
        ef_construction: candidates considered for them.
        code_bytes: of a vector, 1 to D. Default: one for 4 numbers and at least 16, or fewer where memory is short (down to one for 16).
        num_shards: in how many parts the graph is built. Default: as few as memory allows.
        seed: of levels, samples and k-means.
        workers: threads of the build and the index; None for all processors. ``num_threads`` is its former name.
        progress: called with how many vectors are linked so far.

    Returns:
        The index, open within ``memory``. The same arguments give the same bytes but for a number drawn for the file.

    Raises:
        InputError: vectors or ids that `HNSW.add` does not take, or an argument that it has no value for.
        CapacityError: the limit does not suffice, with what would; or the disk is full.
        DataError: the place cannot be written.
        BackendError: the system cannot read at a place of a file.
    """
    workers = asked_workers(workers, former, "build")
    check_system()
    check_one_of("metric", metric, METRICS)
    place = as_path(path)
    source = Rows(vectors, metric)
    id_N = None if ids is None else as_distinct(as_ids(ids, source.count))
    M, memory = as_positive(M, "M", MAX_M), _limit(memory, source)
    plan = planned(
        source.count,
        source.dim,
        memory,
        M,
        code_bytes=code_bytes,
        has_ids=id_N is not None,
        num_shards=None if num_shards is None else as_positive(num_shards, "num_shards"),
    )
    ef_construction, seed = as_positive(ef_construction, "ef_construction", MAX_EF), whole("seed", seed, 0, MOST_SEED)
    workers = None if workers is None else as_positive(workers, "workers")
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {shown(progress)}; it must be a function of one number, or None")
    told = progress if progress is not None else _silent
    with explained(place):
        # Here: links wait beside the place, which must be there.
        place.resolve().parent.mkdir(parents=True, exist_ok=True)
        _make(_Job(source, id_N, place, plan, metric, M, ef_construction, seed, workers, told))
    # So that what is held from now on finds room where all that was.
    machine.give_back_freed()
    return DiskIndex(path, memory=memory, workers=workers)


def _make(job: _Job) -> None:
    """The whole build; nothing of it is in memory afterwards."""
    plan = job.plan
    sample_SD = _sample(job.source, plan, job.seed)
    codes = ProductCodes.train(sample_SD, plan.code_bytes, seed=job.seed, workers=job.at_once)
    if plan.num_shards == 1:
        del sample_SD
        index = _linked(job, np.arange(job.source.count), job.progress)
        # Nobody else has it: no second copy.
        index._storage.links += np.int32(1)
        graph = _of_whole(index, index._storage.links[: job.source.count])
        del index
    else:
        step = max(1, len(sample_SD) // (shards.ENOUGH * plan.num_shards))
        centre_CD = shards.centres_of(sample_SD[::step], plan.num_shards, job.seed)
        del sample_SD
        graph = _of_shards(job, centre_CD)
    _write(job, codes, graph)


def from_hnsw(
    index: HNSW,
    path: str | Path,
    *,
    memory: int | None = None,
    code_bytes: int | None = None,
    workers: int | None = None,
    **former: Any,
) -> DiskIndex:
    """Put an index on disk that was built in memory (or is mapped from its file), with its links and ids; and open it.

    It is one state of the index: changes wait until it is written. Searches go on meanwhile.

    Args:
        index: without deleted elements (`HNSW.compact`), and not empty. Its vectors of the highest precision are kept.
        path: as of `build`, and so are ``memory``, ``code_bytes`` and ``workers``; what ``index`` takes is not counted.

    Raises as `build`, and InputError where elements are deleted.
    """
    workers = asked_workers(workers, former, "from_hnsw")
    workers = None if workers is None else as_positive(workers, "workers")
    check_system()
    place = as_path(path)
    if not isinstance(index, HNSW):
        raise InputError(f"index is {shown(index)}; it must be an HNSW")
    if index.metric not in METRICS:
        raise InputError(f"an index on disk measures {', '.join(METRICS)}, not {index.metric!r}")
    with index._lock.still() as interrupts:
        memory = _put(index, place, memory, code_bytes, workers, interrupts)
    return DiskIndex(path, memory=memory, workers=workers)


def _put(
    index: HNSW,
    path: Path,
    memory: int | None,
    code_bytes: int | None,
    workers: int | None,
    interrupts: Interrupts,
) -> int:
    """Write what `from_hnsw` opens, whose caller holds the lock of the index; the limit of memory."""
    source = Elements(index, interrupts)
    if not source.is_whole:
        raise InputError(
            f"{index!r} is empty or has deleted elements; an index on disk has none: call compact() before"
        )
    is_plain = bool((source.id_N == np.arange(source.count)).all())
    memory = _limit(memory, source)
    plan = planned(
        source.count,
        source.dim,
        memory,
        index.M,
        code_bytes=code_bytes,
        has_ids=not is_plain,
        num_shards=1,
        is_built=True,
    )
    id_N = None if is_plain else source.id_N
    job = _Job(source, id_N, path, plan, index.metric, index.M, index.ef_construction, index.seed, workers, _silent)
    with explained(path):
        sample_SD = _sample(source, plan, job.seed)
        codes = ProductCodes.train(sample_SD, plan.code_bytes, seed=job.seed, workers=job.at_once)
        del sample_SD
        links = index._storage.links
        link_NL = _waiting(job.path, (source.count, links.shape[1]))
        for first in range(0, source.count, plan.piece):
            last = min(first + plan.piece, source.count)
            link_NL[first:last] = links[first:last] + np.int32(1)
        _write(job, codes, _of_whole(index, link_NL))
    return memory


def _silent(done: int) -> None:
    """For who does not ask."""


def _share_of(progress: Callable[[int], None], before: int, share: float) -> Callable[[int], None]:
    """Tells of all vectors, each of which counts once, what is done of those of a shard."""
    return lambda number: progress(int((before + number) * share))


def _limit(memory: int | None, source: Source) -> int:
    if memory is None:
        return max(LEAST, int(SHARE * 4 * source.count * source.dim))
    return as_positive(memory, "memory", LARGEST_INT)


def _drawn(source: Source, count: int, seed: int) -> np.ndarray:
    """So many rows, or all, rising."""
    draw = np.random.default_rng(seed)
    return np.sort(draw.choice(source.count, min(count, source.count), replace=False, shuffle=False))


def _sample(source: Source, plan: Plan, seed: int) -> np.ndarray:
    """Vectors from all over, float32 [S, D]."""
    return source.take(_drawn(source, plan.sample, seed))


def _linked(job: _Job, row_S: np.ndarray, progress: Callable[[int], None], **changes: Any) -> HNSW:
    """An `HNSW` of some rows, rising, whose every element can be reached from its entry point."""
    source, piece = job.source, job.plan.piece
    given = {"M": job.M, "ef_construction": job.ef_construction, **changes}
    made = HNSW(source.dim, job.metric, seed=job.seed, workers=job.workers, **given)
    # Arrays that grow are there twice for a while.
    made._storage._reserve(len(row_S), len(row_S) // max(made.M - 1, 1) + 64)
    is_all = len(row_S) == source.count
    for first in range(0, len(row_S), piece):
        last = min(first + piece, len(row_S))
        made.add(source.piece(first, last) if is_all else source.take(row_S[first:last]))
        progress(last)
    made.repair()
    return made


def _waiting(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array of zeros (int32) on disk beside a place, in a file without a name, which is gone with it. Raises OSError for a full disk."""
    size = 4 * math.prod(shape)
    with tempfile.TemporaryFile(dir=path.resolve().parent) as file:
        # All of it now: a mapped page that the disk has no room for ends the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for first in range(0, size, _ZEROS):
                file.write(bytes(min(_ZEROS, size - first)))
            file.flush()
        return np.asarray(np.memmap(file, np.int32, "r+", shape=shape))


def _of_whole(index: HNSW, link_NL: np.ndarray) -> Graph:
    """The graph of an index, its links on level 0 given, its entry layer from level 1."""
    held = index._storage
    graph, level_N = held.graph, held.level[: held.count]
    entry = int(graph[layout.ENTRY])
    row_E = np.flatnonzero(level_N >= 1)
    # Where walks begin comes first.
    row_E = np.concatenate([[entry], row_E[row_E != entry]]).astype(np.int32)
    number_N = np.full(held.count + 1, -1, np.int32)
    number_N[row_E] = np.arange(len(row_E))
    link_EL = np.full((len(row_E), index.M), -1, np.int32)
    if level_N[entry] >= 1:
        link_EL = number_N[held.upper[held.first[row_E]]]
    return Graph(link_NL, np.array([entry], np.int32), row_E, link_EL, 1)


def _of_shards(job: _Job, centre_CD: np.ndarray) -> Graph:
    """Graphs of shards, joined; the entry layer from a sample of all."""
    source, plan = job.source, job.plan
    shard_N2 = shards.assigned(source, centre_CD, plan.shard, plan.piece)
    total, done, room = int((shard_N2 >= 0).sum()), 0, 2 * job.M
    # Links + 1 of both shards.
    link_NSL = _waiting(job.path, (source.count, 2, room))
    roots = []
    for shard in range(plan.num_shards):
        row_S = np.flatnonzero((shard_N2 == shard).any(1))
        if not row_S.size:
            continue
        made = _linked(job, row_S, _share_of(job.progress, done, source.count / total))
        held, which_S = made._storage, (shard_N2[row_S, 1] == shard).astype(np.int64)
        for first in range(0, len(row_S), plan.piece):
            piece = slice(first, first + plan.piece)
            link_PL = held.links[piece][: len(row_S[piece])]
            link_NSL[row_S[piece], which_S[piece]] = np.where(link_PL >= 0, row_S[link_PL] + 1, 0)
        roots.append(row_S[held.graph[layout.ENTRY]])
        done += len(row_S)
        del made, held
    row_E, link_EL = _sampled_layer(job)
    link_NL = link_NSL.reshape(source.count, 2 * room)
    return Graph(link_NL, np.unique(np.array(roots, np.int32)), row_E, link_EL, plan.num_shards)


def _sampled_layer(job: _Job) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an entry layer and its links, that where walks begin first."""
    count = max(1, min(job.source.count, job.plan.shard, job.source.count // ENTRY_SHARE))
    row_E = _drawn(job.source, count, job.seed)
    made = _linked(job, row_E, _silent, M=ENTRY_M, flat=True)
    held = made._storage
    entry = int(held.graph[layout.ENTRY])
    order_E = np.concatenate([[entry], np.delete(np.arange(count), entry)])
    number_E = np.full(count + 1, -1, np.int32)
    number_E[order_E] = np.arange(count)
    return row_E[order_E].astype(np.int32), number_E[held.links[:count]][order_E]


def _write(job: _Job, codes: ProductCodes, graph: Graph) -> None:
    degree_N = np.zeros(job.source.count, np.int32)
    most = int(merge_links(graph.link_NL, degree_N))
    if most < 0:
        raise DataError("links of the index lead to what is not there: its file is damaged; bring a copy of it back")
    # A number that no other file has, so that a block of one is not taken for one of another.
    meta = {
        "dim": job.source.dim,
        "metric": job.metric,
        "M": job.M,
        "ef_construction": job.ef_construction,
        "links": most,
        "seed": secrets.randbits(62),
        "shards": graph.num_shards,
    }
    write(job.path, job.source, codes, graph, degree_N, job.id_N, meta, job.plan.piece, job.at_once)
