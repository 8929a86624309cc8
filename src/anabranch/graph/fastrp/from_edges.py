"""FastRP from edges in Parquet to vectors in Parquet, on Spark, with no process that ever holds the graph or all vectors.

    matrix     entries diag(left) A diag(right), in tiles: those of one bucket of targets, cut again by source where they are many
    L R        rows by keys of nodes, made where the nodes are
    N_k        a tile meets the vectors of its bucket and gives a partial row for each of its sources; rows of a source are added up
    sum        rows of all N_k of a bucket of nodes, scaled and added as in memory
    columns    sums of each column, of which one row comes to the driver; then mean 0 and variance 1

A step shuffles at most one row of ``dim`` numbers for each (source, tile), fewer than stored edges. Vectors are those of
`anabranch.graph.fastrp.model` up to rounding: rows of R depend on keys alone.
"""
# Shapes: N nodes, M stored edges, D dim, P partial rows, n nodes of a bucket

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import pyarrow as pa

from anabranch.errors import InputError
from anabranch.graph.fastrp.check import num_parts
from anabranch.graph.fastrp.stored import StoredVectors
from anabranch.graph.fastrp.worker import (
    NODES,
    as_sums,
    batch_sums,
    combined_rows,
    listed_rows,
    partial_rows,
    scale_of,
    start_rows,
    to_array,
    total_rows,
)
from anabranch.graph.spark.edges import EdgeFiles, SparkGraph, open_edges, open_run
from anabranch.graph.spark.run import Run
from anabranch.graph.spark.session import default_partitions, session
from anabranch.graph.stored_folder import VECTORS
from anabranch.graph.vectors import FLAT

# Of the partial rows that a tile gives, and of those that a bucket adds up.
TILE_BYTES = 64 << 20

ROWS = "bucket int, node long, vector binary"


def run_from_edges(model: Any, given: EdgeFiles) -> StoredVectors:
    """All of it; gives where the vectors lie. Raises as `FastRP.fit`."""
    _check(model)
    facts = {name: value for name, value in model.get_params().items() if name not in _NO_FACTS}
    facts["weights"] = list(map(float, model.weights))
    with session(model.spark, model.partitions) as spark:
        run = open_run(spark, cast(str, model.out), given, facts, VECTORS)
        with run.working():
            graph = open_edges(run, given, allow_negative=model.allow_negative)
            run.step("vectors", _Work(model, run, graph).vectors)
        size = model.dim * num_parts(model)
        whole = {"kind": VECTORS, "num_nodes": graph.num_nodes, "dim": size, "facts": {**facts, **graph.facts()}}
        run.publish("vectors", whole)
        return StoredVectors(run.out, whole)


# Arguments that do not decide the vectors.
_NO_FACTS = {
    "spark",
    "partitions",
    "out",
    "engine",
    "threads",
    "workers",
    "chunk",
    "backend",
    "device",
    "features",
    "feature_ratio",
    "keep_powers",
}


def _check(model: Any) -> None:
    if model.out is None:
        raise InputError("engine 'spark' writes its vectors: give out=FOLDER")
    if model.features is not None or model.feature_ratio:
        raise InputError("engine 'spark' takes no features; leave out features and feature_ratio")
    if model.keep_powers:
        raise InputError("engine 'spark' keeps no powers in memory; leave out keep_powers")


class _Work:
    """The frames of a run."""

    def __init__(self, model: Any, run: Run, graph: SparkGraph) -> None:
        self.model, self.run, self.graph, self.spark = model, run, graph, run.spark
        row = model.dim * np.dtype(model.dtype).itemsize
        self.tile_edges = max(1, TILE_BYTES // row)
        needed = max(-(-graph.num_stored // self.tile_edges), -(-graph.num_nodes * row // TILE_BYTES))
        self.buckets = run.state.get("buckets") or model.partitions or max(default_partitions(self.spark), needed)
        if "buckets" not in run.state:
            run.save({**run.state, "buckets": self.buckets})

    # The matrix

    @cached_property
    def edges(self) -> Any:
        """Edges whose sources' rows sum over them: turned as ``direction`` says."""
        from pyspark.sql import functions as sql

        edges, direction = self.graph.edges, self.model.direction
        if not self.graph.is_directed or direction == "out":
            return edges
        turned = edges.select(sql.col("target").alias("source"), sql.col("source").alias("target"), "weight")
        if direction == "in":
            return turned
        both = edges.select("source", "target", "weight").union(turned)
        return both.groupBy("source", "target").agg(sql.sum("weight").alias("weight"))

    @cached_property
    def degrees(self) -> Any:
        """Nodes that have edges and their strengths (columns ``node``, ``degree``)."""
        return self.run.step("degrees", lambda: self._strengths("source"))

    def _strengths(self, of: str) -> Any:
        from pyspark.sql import functions as sql

        found = self.edges.groupBy(sql.col(of).alias("node")).agg(sql.sum(sql.abs("weight")).alias("degree"))
        return found.where("degree > 0")

    @cached_property
    def tiles(self) -> Any:
        """Of each bucket its first tile and their number, as a small frame."""
        from pyspark.sql import functions as sql

        bucket = (sql.col("target") % self.buckets).cast("int").alias("bucket")
        counts = dict(map(tuple, self.edges.groupBy(bucket).count().collect()))
        rows, first = [], 0
        for number in range(self.buckets):
            tiles = max(1, -(-counts.get(number, 0) // self.tile_edges))
            rows.append((number, first, tiles))
            first += tiles
        return sql.broadcast(self.spark.createDataFrame(rows, "bucket int, first int, tiles int"))

    def matrix(self) -> Any:
        """Entries (``tile``, ``source``, ``target``, ``value``)."""
        from pyspark.sql import functions as sql

        edges, kind = self.edges.withColumnRenamed("weight", "value"), self.model.matrix
        power = {"transition": 1.0, "symmetric": 0.5, "adjacency": 0.0}[kind]
        if power:
            left = self.degrees.select(
                sql.col("node").alias("source"), sql.pow("degree", sql.lit(-power)).alias("left")
            )
            edges = edges.join(left, "source").withColumn("value", sql.col("value") * sql.col("left")).drop("left")
        if kind == "symmetric":
            right = self._strengths("target")
            right = right.select(sql.col("node").alias("target"), sql.pow("degree", sql.lit(-power)).alias("right"))
            edges = edges.join(right, "target").withColumn("value", sql.col("value") * sql.col("right")).drop("right")
        placed = edges.withColumn("bucket", (sql.col("target") % self.buckets).cast("int")).join(self.tiles, "bucket")
        tile = (sql.col("first") + sql.col("source") % sql.col("tiles")).cast("int").alias("tile")
        return placed.select(tile, "source", "target", "value")

    # Vectors

    def start(self) -> Any:
        """L R of all nodes."""
        from pyspark.sql import functions as sql

        low, high = self.degrees.agg(sql.min("degree"), sql.max("degree")).first()
        low, high = (1.0, 1.0) if low is None else (low, high)
        for degree in (low, high):
            self._scale(np.array([degree]))
        frame = self.graph.nodes.join(self.degrees, "node", "left")
        frame = frame.select("node", "id", sql.coalesce("degree", sql.lit(low)).alias("degree"))
        model, buckets, count = self._plain(), self.buckets, self.graph.num_nodes

        def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                if batch.num_rows:
                    yield from start_rows(model, batch, count, buckets).to_batches()

        return frame.mapInArrow(rows, ROWS)

    def _scale(self, degree_N: np.ndarray) -> np.ndarray:
        return scale_of(degree_N, self.model.beta, self.model.dim, self.model.dtype)

    def _plain(self) -> Any:
        """The model without what cannot be sent to workers."""
        return type(self.model)(**{**self.model.get_params(), "spark": None, "engine": "local", "out": None})

    def multiplied(self, matrix: Any, before: Any) -> Any:
        """The matrix times these vectors; nodes without an entry have no row."""
        from pyspark.sql import functions as sql

        partitions, buckets = self._partitions, self.buckets
        dim, dtype = self.model.dim, self.model.dtype
        tile = sql.explode(sql.sequence(sql.col("first"), sql.col("first") + sql.col("tiles") - 1)).alias("tile")
        sent = before.join(self.tiles, "bucket").select(tile, "node", "vector")

        def partials_of(entries: pa.Table, vectors: pa.Table) -> pa.Table:
            return partial_rows(entries, vectors, dim, dtype, buckets)

        def total(rows: pa.Table) -> pa.Table:
            return total_rows(rows, dim, dtype)

        sent = sent.repartition(partitions, "tile").groupBy("tile")
        partials = matrix.groupBy("tile").cogroup(sent).applyInArrow(partials_of, ROWS)
        return partials.repartition(partitions, "bucket").groupBy("bucket").applyInArrow(total, ROWS)

    @property
    def _partitions(self) -> int:
        return max(self.buckets, int(self.spark.conf.get("spark.sql.shuffle.partitions")))

    def combined(self) -> Any:
        """Sums over orders, columns not yet standardised."""
        from pyspark.sql import functions as sql

        run, model = self.run, self.model
        entries = run.step("matrix", self.matrix).repartition(self._partitions, "tile").persist()
        start = run.step("power-0", self.start)
        frames = [start.withColumn("order", sql.lit(0))] if model.self_weight else []
        before = start
        for order in range(1, len(model.weights) + 1):
            before = run.step(f"power-{order}", partial(self.multiplied, entries, before))
            if model.weights[order - 1]:
                frames.append(before.withColumn("order", sql.lit(order)))
        entries.unpersist()
        bucket = (sql.col("node") % self.buckets).cast("int").alias("bucket")
        every = self.graph.nodes.select(
            bucket, "node", sql.lit(b"").cast("binary").alias("vector"), sql.lit(NODES).alias("order")
        )
        for frame in frames:
            every = every.union(frame)
        plain = self._plain()

        def combine(table: pa.Table) -> pa.Table:
            return combined_rows(plain, table)

        return every.repartition(self._partitions, "bucket").groupBy("bucket").applyInArrow(combine, ROWS)

    def vectors(self) -> Any:
        """Columns ``node`` (ids) and ``vector`` (lists), in the order of nodes."""
        from pyspark.sql import functions as sql

        found, dtype = self.run.step("sums", self.combined), self.model.dtype
        mean_D, factor_D = self._moments(found) if self.model.standardize else (None, None)

        def listed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                if batch.num_rows:
                    yield listed_rows(batch, dtype, mean_D, factor_D)

        kind = "float" if dtype == "float32" else "double"
        lists = found.mapInArrow(listed, f"node long, vector array<{kind}>")
        ordered = lists.select(sql.col("node").alias("number"), "node", "vector")
        named = self.graph.named(ordered, "node")
        sorted_ = named.repartitionByRange(self._partitions, "number").sortWithinPartitions("number")
        return sorted_.select("node", "vector")

    def _moments(self, found: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `anabranch.graph.vectors.column_moments`, from one row that executors add up."""
        dtype, schema = self.model.dtype, "sums binary"

        def summed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            yield from as_sums(batch_sums(to_array(batch["vector"], dtype)) for batch in batches if batch.num_rows)

        def added(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            yield from as_sums(
                np.frombuffer(text, np.float64) for batch in batches for text in batch["sums"].to_pylist()
            )

        row = found.mapInArrow(summed, schema).repartition(1).mapInArrow(added, schema).first()
        count_sum_square = np.frombuffer(bytes(row["sums"]), np.float64)
        count, sums = count_sum_square[0], count_sum_square[1:].reshape(2, -1)
        mean_D, square_D = sums[0] / count, sums[1] / count
        if not np.isfinite(mean_D).all():
            raise InputError(
                f"vectors leave the range of {dtype}; use matrix='transition', dtype='float64', or smaller edge weights"
            )
        variance_D = square_D - mean_D**2
        varies = variance_D > FLAT**2 * square_D
        return mean_D, np.where(varies, 1 / np.sqrt(np.where(varies, variance_D, 1.0)), 0.0)
