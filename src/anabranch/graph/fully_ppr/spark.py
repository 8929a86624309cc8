"""Walks from all nodes on Spark: the choice of a plan, files that all machines read, and the broadcast plan.

    broadcast     every Python worker maps the graph with its alias tables from one file and walks for its sources as the embedded engine
                  does: no shuffle, the same scores to the bit
    partitioned   records of the graph lie on partitions, walks come to them round by round (`anabranch.graph.fully_ppr.partitioned`)

``out`` is a folder of Parquet files on a file system that the driver and all workers reach; what a run needs lies beside it in
``OUT.parts`` until it is whole, so that a run that was stopped goes on.
"""

# Shapes: S sources, N nodes, M edges
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.files import atomic_folder, atomic_write_json, check_holds_only, parse_json
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.fully_ppr.chunks import Job
from anabranch.graph.fully_ppr.local import WalkWork
from anabranch.graph.fully_ppr.options import Options, walk_bytes
from anabranch.graph.fully_ppr.result import FACTS, FullyPPRResult, names_arrays, names_from, table_of, write_facts
from anabranch.graph.ppr.rules import CODES
from anabranch.graph.rows import SparseRows
from anabranch.graph.spark.session import default_partitions, executor_bytes, session
from anabranch.graph.store import Graph
from anabranch.graph.walk import walk_arrays

if TYPE_CHECKING:
    from anabranch.graph.fully_ppr.api import FullyPPR

# What a folder of scores holds.
_OURS = rf"part-\d+\.parquet|{re.escape(FACTS)}"
KIND = "walk-graph"

# Sources whose rows a worker holds at once.
SLICE = 1024

# Of the broadcast plan: how much is lost when it is stopped.
JOBS = 8


def run_spark(
    model: "FullyPPR", options: Options, graph: Graph, source_S: np.ndarray, is_all: bool
) -> Path | FullyPPRResult:
    """Run on Spark. Gives the folder that was written, or the result where ``model.out`` is None."""
    method = options.choose_method(graph, "spark")
    if not len(source_S):
        raise InputError("there are no sources; engine 'spark' takes at least one")
    with session(model.spark, model.partitions) as spark:
        plan = choose_plan(model.plan, graph, options.memory_limit or executor_bytes(spark))
        facts = {**options.facts(method), "engine": "spark", "plan": plan}
        # What its draws depend on.
        if plan == "partitioned":
            facts |= {name: getattr(model, name) for name in ("gamma", "theta", "big_moves", "memory_limit")}
        job = Job(graph, source_S, is_all, facts, np.float32, 1, 1, model.progress, model.cancel)
        if model.out is not None:
            _run(model, options, job, spark, Path(model.out))
            return Path(model.out)
        with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
            out = Path(folder) / "scores"
            _run(model, options, job, spark, out)
            found = FullyPPRResult.load(out)
        return found if is_all else replace(found, rows=_rows_for(found.rows, source_S))


def choose_plan(asked: str, graph: Graph, room: float) -> str:
    """Broadcast where the graph and its alias tables fit into an executor."""
    if asked != "auto":
        return asked
    return "broadcast" if walk_bytes(graph) <= room else "partitioned"


def _run(model: "FullyPPR", options: Options, job: Job, spark: Any, out: Path) -> None:
    from anabranch.graph.fully_ppr.partitioned import run_partitioned

    folder = out.with_name(f"{out.name}.parts").resolve()
    if out.is_file():
        raise DataError(f"cannot write {out}: it is a file; on Spark `out` is a folder")
    check_holds_only(out, _OURS)
    partitions = model.partitions or default_partitions(spark)
    manifest = Manifest(folder, job, {"partitions": partitions})
    if job.facts["plan"] == "broadcast":
        written = run_broadcast(options, job, spark, manifest)
    else:
        written = run_partitioned(model, options, job, spark, manifest)
    with atomic_folder(out, replacing=_OURS) as temporary:
        files = sorted(file for place in written for file in place.glob("*.parquet"))
        for number, file in enumerate(files):
            file.rename(temporary / f"part-{number:06d}.parquet")
        write_facts(temporary, job.graph.num_nodes, dict(job.facts), job.is_all)
    shutil.rmtree(folder)


class Manifest:
    """What a run in a folder is about and how far it is. ``state`` is what `save` was last given."""

    def __init__(self, folder: Path, job: Job, first: dict[str, Any]) -> None:
        """Raises DataError where the folder belongs to another run."""
        self.folder, self._path, self._identity = folder, folder / "manifest.json", job.identity
        self.state: dict[str, Any] = first
        if not self._path.exists():
            self.save(first)
            return
        try:
            found = parse_json(self._path.read_text(encoding="utf-8"))
            recorded, self.state = found["job"], found["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._path} is not readable; remove {folder} to start anew") from error
        if recorded != self._identity:
            raise DataError(
                f"{folder} holds parts of another run (other graph, sources or settings); remove it to start anew"
            )

    def place(self, name: str) -> str:
        """The path of a checkpoint."""
        return str(self.folder / name)

    def save(self, state: dict[str, Any]) -> None:
        """Note how far the run is."""
        self.state = state
        atomic_write_json(self._path, {"job": self._identity, "state": state})


def check_cancelled(job: Any, done: str) -> None:
    """Raises AnabranchError where the run is to stop."""
    if job.cancel is not None and job.cancel.is_set():
        raise AnabranchError(f"cancelled after {done}; with the same `out` the run goes on from its last checkpoint")


# The broadcast plan


def run_broadcast(options: Options, job: Job, spark: Any, manifest: Manifest) -> list[Path]:
    """Rows by the embedded engine's kernel in Spark's workers; folders of Parquet files."""
    path = manifest.folder / "graph.anb"
    if not path.exists():
        write_walk_graph(path, job.graph, job.source_S)
    partitions, total = manifest.state["partitions"], len(job.source_S)
    edges = np.linspace(0, total, min(JOBS, max(total // (SLICE * partitions), 1)) + 1).astype(int).tolist()
    rows_of = _rows_of(str(path), {
        "walks": options.num_walks, "alpha": options.alpha, "dangling": CODES[options.dangling],
        "full": options.estimator == "fullpath", "top_k": options.top_k or 0, "least": options.min_score,
        "seed": int(options.seed),
    })  # fmt: skip
    written = []
    for number, (first, end) in enumerate(pairwise(edges)):
        place = manifest.folder / f"scores-{number:04d}"
        written.append(place)
        if not (place / "_SUCCESS").exists():
            check_cancelled(job, f"{first:,} of {total:,} sources")
            numbers = spark.range(first, end, 1, partitions)
            numbers.mapInArrow(rows_of, schema_of(job.graph)).write.mode("overwrite").parquet(str(place))
        if job.progress is not None:
            job.progress(end, total)
    return written


def write_walk_graph(path: Path, graph: Graph, source_S: np.ndarray) -> None:
    """What workers map: the graph, its alias tables, the sources and the names, in one checked file."""
    indptr, indices, keep_M, other_M = walk_arrays(graph)
    arrays = {"indptr": indptr, "indices": indices, "keep": keep_M, "other": other_M, "sources": source_S}
    write_arrays(path, KIND, {**arrays, **names_arrays(graph.names)})


def _rows_of(path: str, settings: dict[str, Any]) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """For ``mapInArrow``: numbers of sources in, their scores out."""

    def rows_of(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found = read_arrays(path, KIND, mmap=True).arrays
        work = WalkWork((found["indptr"], found["indices"], found["keep"], found["other"]), **settings)
        names = names_from(found)
        for batch in batches:
            number_C = batch.column(0).to_numpy()
            for first in range(0, len(number_C), SLICE):
                source_C = np.array(found["sources"][number_C[first : first + SLICE]])
                yield from _batches(replace(work(source_C), nodes=source_C), names)

    return rows_of


def _batches(rows: SparseRows, names: np.ndarray | None) -> list[pa.RecordBatch]:
    return table_of(rows, 0, names).to_batches()


def schema_of(graph: Graph) -> str:
    """Of scores, in Spark's words."""
    columns = "source long, target long, score float"
    if graph.names is None:
        return columns
    kind = "long" if graph.names.dtype.kind in "iu" else "string"
    return f"{columns}, source_name {kind}, target_name {kind}"


def _rows_for(rows: SparseRows, source_S: np.ndarray) -> SparseRows:
    """Rows by rising source brought into the order of ``source_S``; empty where there is none."""
    nodes = np.arange(len(rows)) if rows.nodes is None else rows.nodes
    place_S = np.minimum(np.searchsorted(nodes, source_S), max(len(nodes) - 1, 0))
    is_there_S = nodes[place_S] == source_S if len(nodes) else np.zeros(len(source_S), bool)
    found = rows.take(place_S[is_there_S])
    length_S = np.zeros(len(source_S), np.int64)
    length_S[is_there_S] = np.diff(found.indptr)
    indptr = np.append(0, np.cumsum(length_S)).astype(np.int64)
    return SparseRows(indptr, found.ids, found.values, rows.num_columns, source_S)
