"""Walks from all nodes on Spark: the choice of a plan, files that all machines read, and the broadcast plan.

    broadcast     every Python worker maps the graph with its alias tables from one file and walks for its sources as the embedded engine
                  does: no shuffle, the same scores to the bit
    partitioned   records of the graph lie on partitions, walks come to them round by round (`anabranch.graph.fully_ppr.partitioned`)

``out`` is a folder of Parquet files on a file system that the driver and all workers reach; what a run needs lies beside it in
``OUT.parts`` until it is whole, so that a run that was stopped goes on.
"""

# Shapes: S sources, N nodes, M edges
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from anabranch.errors import DataError, InputError
from anabranch.files import atomic_folder
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.beside import foreign_parts, holding_parts, remove_parts
from anabranch.graph.fully_ppr.asked import Asked
from anabranch.graph.fully_ppr.chunks import Job
from anabranch.graph.fully_ppr.local import WalkWork
from anabranch.graph.fully_ppr.manifest import OURS as PARTS
from anabranch.graph.fully_ppr.manifest import Manifest, check_cancelled, check_names, schema_of
from anabranch.graph.fully_ppr.options import Options, walk_bytes
from anabranch.graph.fully_ppr.partitioned import run_partitioned
from anabranch.graph.fully_ppr.result import FullyPPRResult, table_of, write_facts
from anabranch.graph.names import names_arrays, names_from
from anabranch.graph.ppr.rules import CODES
from anabranch.graph.rows import SparseRows
from anabranch.graph.spark.session import default_partitions, executor_bytes, session
from anabranch.graph.store import Graph
from anabranch.graph.stored_folder import OURS, SCORES, check_place
from anabranch.graph.walk import Walk, walk_arrays

KIND = "walk-graph"

# Sources whose rows a worker holds at once.
SLICE = 1024

# Of the broadcast plan: how much is lost when it is stopped.
JOBS = 8


def run_spark(
    model: Asked, options: Options, graph: Graph, source_S: np.ndarray, is_all: bool
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


def _run(model: Asked, options: Options, job: Job, spark: Any, out: Path) -> None:
    # Absolute, for Spark's workers; a link there is refused.
    folder = Path(os.path.abspath(out)).with_name(f"{out.name}.parts")
    if out.is_file():
        raise DataError(f"cannot write {out}: it is a file; on Spark `out` is a folder")
    _check_place(out)
    partitions = model.partitions or default_partitions(spark)
    check_names(folder)
    with holding_parts(folder):
        manifest = Manifest(folder, job, {"partitions": partitions})
        if job.facts["plan"] == "broadcast":
            written = run_broadcast(options, job, spark, manifest)
        else:
            written = run_partitioned(model, options, job, spark, manifest)
        _publish(job, written, out)
        names = os.listdir(folder)
        remove_parts(folder, set(names) - set(foreign_parts(names, PARTS)))


def _publish(job: Job, written: list[Path], out: Path) -> None:
    with atomic_folder(out, replacing=OURS.pattern, check_old=_check_place) as temporary:
        files = sorted(file for place in written for file in place.glob("*.parquet"))
        for number, file in enumerate(files):
            file.rename(temporary / f"part-{number:06d}.parquet")
        write_facts(temporary, job.graph.num_nodes, dict(job.facts), job.is_all)


def _check_place(out: Path) -> None:
    """Raise DataError unless a folder holds nothing, or scores."""
    names = os.listdir(out) if out.is_dir() else []
    check_place(out, names, lambda name: (out / name).read_text(encoding="utf-8"), SCORES)


# The broadcast plan


def run_broadcast(options: Options, job: Job, spark: Any, manifest: Manifest) -> list[Path]:
    """Rows by the embedded engine's kernel in Spark's workers; folders of Parquet files."""
    path = manifest.folder / "graph.anb"
    if not path.exists():
        write_walk_graph(path, job.graph, job.source_S)
    partitions, total = manifest.state["partitions"], len(job.source_S)
    edges = np.linspace(0, total, min(JOBS, max(total // (SLICE * partitions), 1)) + 1).astype(int).tolist()
    rows_of = _rows_of(
        str(path),
        {
            "walks": options.num_walks,
            "alpha": options.alpha,
            "dangling": CODES[options.dangling],
            "full": options.estimator == "fullpath",
            "top_k": options.top_k or 0,
            "least": options.min_score,
            "seed": int(options.seed),
        },
    )
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
        walk = Walk(found["indptr"], found["indices"], found["keep"], found["other"])
        work = WalkWork(walk, **settings)
        names = names_from(found)
        for batch in batches:
            number_C = batch.column(0).to_numpy()
            for first in range(0, len(number_C), SLICE):
                source_C = np.array(found["sources"][number_C[first : first + SLICE]])
                yield from _batches(replace(work(source_C), nodes=source_C), names)

    return rows_of


def _batches(rows: SparseRows, names: np.ndarray | None) -> list[pa.RecordBatch]:
    return table_of(rows, 0, names).to_batches()


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
