"""The partitioned plan on Spark: records of the graph stay where they are, walks come to them round by round.

    records    (bucket, record, kind, code, keep, other, share), kept partitioned by bucket = record mod partitions
    walks      (bucket, source, key, count): one shuffle a round brings them to the bucket of their record
    round      both cogrouped, `anabranch.graph.fully_ppr.rounds.move` on Arrow batches; rows out are walks, ends, and what was counted
    end        ends summed and cut to the best by bucket of their source

Records are made by workers that map the graph's file, slice by slice: no process holds the graph. Every few rounds walks and ends are
written to Parquet, which cuts Spark's lineage and is where a stopped run goes on. Rows are those of `run_rounds`, whatever the partitions.
"""
# Shapes: S sources, N nodes, R records, E entries

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from anabranch.graph.array_file import read_arrays
from anabranch.graph.fully_ppr.asked import Asked
from anabranch.graph.fully_ppr.chunks import Job
from anabranch.graph.fully_ppr.devices import Records, big_moves, first_pieces, records_of
from anabranch.graph.fully_ppr.manifest import Manifest, check_cancelled, schema_of
from anabranch.graph.fully_ppr.options import Options
from anabranch.graph.fully_ppr.result import table_of
from anabranch.graph.fully_ppr.rounds import UNIT, Rows, Rules, Schedule, best_rows, merged, move
from anabranch.graph.names import names_from
from anabranch.graph.ppr.rules import CODES
from anabranch.graph.rows import SparseRows, id_type
from anabranch.graph.spark.session import executor_bytes
from anabranch.graph.store import Graph

CHECKPOINT = 5  # rounds

# Of an executor's memory for rows of walks.
SHARE = 0.3

# Nodes whose records a worker makes at once.
SLICE = 1 << 16

# Kinds of rows that a round gives.
WALKS, DONE, FACTS = 0, 1, 2
RECORDS = (
    "bucket int, record long, kind byte, code array<long>, keep array<float>, other array<int>, share array<double>"
)
ENDS = "bucket int, source long, key long, count long"
MOVED = "what byte, bucket int, source long, key long, count long"


def run_partitioned(model: Asked, options: Options, job: Job, spark: Any, manifest: Manifest) -> list[Path]:
    """All rounds; a folder of Parquet files."""
    graph = job.graph
    full = options.estimator == "fullpath"
    unit = UNIT if full and model.big_moves else 1
    rules = Rules(int(options.seed), options.alpha, CODES[options.dangling], full, graph.num_nodes, unit)
    records = _records(model, graph, spark, manifest, full)
    if "schedule" in manifest.state:
        schedule = Schedule.from_dict(manifest.state["schedule"])
    else:
        memory = options.memory_limit or SHARE * executor_bytes(spark)
        schedule = Schedule.make(len(job.source_S), options.num_walks, options.alpha, memory, model.gamma)
    sources = pa.table(
        {"source": job.source_S, "bucket": (job.source_S % manifest.state["partitions"]).astype(np.int32)}
    )
    Rounds(job, spark, manifest, records, spark.createDataFrame(sources), rules, schedule).run()
    model.rounds_ = schedule.log
    return [_best(options, job, spark, manifest)]


# Records


def _records(model: Asked, graph: Graph, spark: Any, manifest: Manifest, full: bool) -> Any:
    """Records as a frame, made once and kept in Parquet, then in memory and on disk."""
    place, path, partitions = manifest.folder / "records", manifest.folder / "graph.anb", manifest.state["partitions"]
    if not (place / "_SUCCESS").exists():
        graph.save(path)
        slices = -(-graph.num_nodes // SLICE)
        maker = _maker(
            str(path),
            {
                "theta": model.theta,
                "alpha": model.alpha,
                "steps": model.big_moves,
                "partitions": partitions,
                "visits": full,
            },
        )
        made = spark.range(0, slices, 1, min(slices, partitions)).mapInArrow(maker, RECORDS)
        made.write.mode("overwrite").parquet(str(place))
    found = spark.read.schema(RECORDS).parquet(str(place))
    return found.repartition(partitions, "bucket").persist()


def _maker(path: str, settings: dict[str, Any]) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """For ``mapInArrow``: numbers of slices in, records out."""

    def make(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        graph = Graph.load(path, mmap=True)
        first_N = first_pieces(graph.indptr, settings["theta"])
        for batch in batches:
            for number in batch.column(0).to_pylist():
                nodes = (number * SLICE, min((number + 1) * SLICE, graph.num_nodes))
                moves = None
                if settings["steps"]:
                    moves = big_moves(graph, settings["alpha"], settings["steps"], nodes=nodes)
                ids, made = records_of(
                    graph, *nodes, first_N, theta=settings["theta"], moves=moves, visits=settings["visits"]
                )
                yield from records_table(ids, made, settings["partitions"]).to_batches(max_chunksize=4096)

    return make


def records_table(ids: np.ndarray, records: Records, partitions: int) -> pa.Table:
    """Records as rows of lists."""
    share = np.zeros(0) if records.share is None else records.share
    ends = records.indptr.astype(np.int32)
    return pa.table(
        {
            "bucket": (ids % partitions).astype(np.int32),
            "record": ids.astype(np.int64),
            "kind": records.kind,
            "code": pa.ListArray.from_arrays(ends, records.code),
            "keep": pa.ListArray.from_arrays(ends, records.keep),
            "other": pa.ListArray.from_arrays(ends, records.other),
            "share": pa.ListArray.from_arrays(ends if len(share) else np.zeros_like(ends), share),
        }
    )


def records_from(table: pa.Table, num_nodes: int) -> tuple[np.ndarray, Records]:
    """What `records_table` made, by rising number."""
    table = table.sort_by("record").combine_chunks()
    code, keep, other, share = (_flat(table, name) for name in ("code", "keep", "other", "share"))
    length = table["code"].combine_chunks()
    indptr = np.append(0, np.cumsum(np.diff(_offsets(length)))).astype(np.int64)
    kind = table["kind"].to_numpy()
    records = Records(indptr, kind, code, keep, other, share if len(share) else None, num_nodes)
    return table["record"].to_numpy(), records


def _flat(table: pa.Table, name: str) -> np.ndarray:
    return _one(table[name]).flatten().to_numpy()


def _offsets(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return _one(column).offsets.to_numpy()


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    if isinstance(column, pa.ChunkedArray):
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column


# Rounds


def move_table(walks: pa.Table, records: pa.Table, rules: Rules, number: int, partitions: int) -> pa.Table:
    """One round of one bucket, of tables."""
    given = rows_from(walks)
    if not len(given):
        return moved_table([])
    ids, held = records_from(records, rules.num_nodes)
    live, done = move(given, held, ids, rules, number)
    facts = Rows(*(np.array([value], np.int64) for value in (0, 0, len(merged(given)))))
    return moved_table(
        [(WALKS, live, live.key % partitions), (DONE, done, done.source % partitions), (FACTS, facts, facts.key)]
    )


def rows_from(table: pa.Table) -> Rows:
    """Rows of a table of walks or ends."""
    return Rows(*(table[name].to_numpy() for name in ("source", "key", "count")))


def moved_table(parts: list[tuple[int, Rows, np.ndarray]]) -> pa.Table:
    """What a round gives as one table: kind, rows, buckets of each part."""
    parts = parts or [(WALKS, Rows(*(np.empty(0, np.int64) for _ in range(3))), np.empty(0, np.int64))]
    return pa.table(
        {
            "what": np.concatenate([np.full(len(rows), what, np.int8) for what, rows, _ in parts]),
            "bucket": np.concatenate([bucket for _, _, bucket in parts]).astype(np.int32),
            "source": np.concatenate([rows.source for _, rows, _ in parts]),
            "key": np.concatenate([rows.key for _, rows, _ in parts]),
            "count": np.concatenate([rows.count for _, rows, _ in parts]),
        }
    )


class Watched(Protocol):
    """Whom the rounds tell how far they are, and who stops them."""

    @property
    def progress(self) -> Callable[[int, int], None] | None:
        """Called with the numbers of walks that have ended and of all."""

    @property
    def cancel(self) -> Any:
        """An event that stops the run at the next round; None for none."""


class Kept(Protocol):
    """Where rounds keep their checkpoints: a `Manifest`, or a run from edges (`anabranch.graph.spark.run`)."""

    state: dict[str, Any]

    def place(self, name: str) -> str:
        """The path of a checkpoint."""

    def save(self, state: dict[str, Any]) -> None:
        """Note how far the run is."""


class Rounds:
    """The loop over rounds, with its checkpoints.

    Args:
        job: told of progress, asked whether to stop.
        spark: the session.
        manifest: with the number of ``partitions`` in its state, and the last checkpoint.
        records: frame of records, by bucket.
        sources: frame of sources (``source``, ``bucket``), distinct.
        rules, schedule: of the walks.
    """

    def __init__(
        self, job: Watched, spark: Any, manifest: Kept, records: Any, sources: Any, rules: Rules, schedule: Schedule
    ) -> None:
        self.job, self.spark, self.manifest, self.rules, self.schedule = job, spark, manifest, rules, schedule
        self.partitions = manifest.state["partitions"]
        self.records = records.groupBy("bucket")
        # Frames since the last checkpoint.
        self.held: list[Any] = []
        self.sources = sources.persist()
        self.walks: Any = self._read(schedule.number) if schedule.number else None

    def run(self) -> None:
        """Rounds until all walks have ended."""
        schedule, total = self.schedule, self.schedule.walks * self.schedule.num_sources
        while not schedule.is_over:
            check_cancelled(self.job, f"{schedule.number} rounds")
            self._round()
            if schedule.number % CHECKPOINT == 0 or schedule.is_over:
                self._checkpoint()
            if self.job.progress is not None:
                self.job.progress(schedule.started * schedule.num_sources - schedule.alive, total)

    def _round(self) -> None:
        from pyspark.sql import functions as sql

        schedule, rules, partitions = self.schedule, self.rules, self.partitions
        started, number = schedule.start(), schedule.number
        walks = self.walks
        if started:
            new = self.sources.select(
                "bucket", "source", sql.col("source").alias("key"), sql.lit(started).cast("long").alias("count")
            )
            walks = new if walks is None else walks.unionByName(new)

        def moved(walks: pa.Table, records: pa.Table) -> pa.Table:
            return move_table(walks, records, rules, number, partitions)

        gathered = walks.repartition(partitions, "bucket").groupBy("bucket")
        found = gathered.cogroup(self.records).applyInArrow(moved, MOVED).persist()
        self.held.append(found)
        told = {
            row["what"]: int(row["total"])
            for row in found.groupBy("what").agg(sql.sum("count").alias("total")).collect()
        }
        alive = told.get(WALKS, 0)
        before = schedule.alive + started * schedule.num_sources
        self.walks = found.where(sql.col("what") == WALKS).drop("what")
        schedule.finish(started, before, told.get(FACTS, 0), alive)

    def _checkpoint(self) -> None:
        """Write walks and ends, note it, forget how they came about."""
        from pyspark.sql import functions as sql

        number = self.schedule.number
        done = self.held[0]
        for other in self.held[1:]:
            done = done.unionByName(other)
        done = (
            done.where(sql.col("what") == DONE).groupBy("bucket", "source", "key").agg(sql.sum("count").alias("count"))
        )
        done.write.mode("overwrite").parquet(self.manifest.place(f"ends-{number:06d}"))
        self.walks.write.mode("overwrite").parquet(self._place(number))
        state = self.manifest.state
        self.manifest.save({**state, "schedule": self.schedule.to_dict(), "ends": self._ends(number)})
        for frame in self.held:
            frame.unpersist()
        self.held, self.walks = [], self._read(number)

    def _ends(self, number: int) -> list[int]:
        return [*self.manifest.state.get("ends", []), number]

    def _place(self, number: int) -> str:
        return self.manifest.place(f"walks-{number:06d}")

    def _read(self, number: int) -> Any:
        return self.spark.read.schema(ENDS).parquet(self._place(number))


# The end


def _best(options: Options, job: Job, spark: Any, manifest: Manifest) -> Path:
    """The best of each source, from all ends."""
    ends = [str(manifest.folder / f"ends-{number:06d}") for number in manifest.state["ends"]]
    found = spark.read.schema(ENDS).parquet(*ends)
    place = manifest.folder / "scores"
    best = _best_of(str(manifest.folder / "graph.anb"), options.top_k or 0, options.min_score)
    scores = (
        found.repartition(manifest.state["partitions"], "bucket")
        .groupBy("bucket")
        .applyInArrow(best, schema_of(job.graph))
    )
    scores.write.mode("overwrite").parquet(str(place))
    return place


def _best_of(path: str, top_k: int, least: float) -> Callable[[pa.Table], pa.Table]:
    def best(ends: pa.Table) -> pa.Table:
        graph = read_arrays(path, "graph", mmap=True).arrays
        return best_table(ends, top_k, least, len(graph["indptr"]) - 1, names_from(graph))

    return best


def best_table(ends: pa.Table, top_k: int, least: float, num_nodes: int, names: np.ndarray | None) -> pa.Table:
    """Scores of the sources of one bucket."""
    rows, score = best_rows(rows_from(ends), top_k, least)
    nodes, length = np.unique(rows.source, return_counts=True)
    indptr = np.append(0, np.cumsum(length)).astype(np.int64)
    found = SparseRows(indptr, rows.key.astype(id_type(num_nodes)), score, num_nodes, nodes)
    return table_of(found, 0, names)
