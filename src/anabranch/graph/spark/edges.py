"""Edges in Parquet as frames: read by Spark, checked, nodes numbered 0 ... N - 1 by rising id, edges merged as every reader here does.

Numbers come from a sort by ranges: each partition counts its ids, the driver adds up the counts (a row per partition), and every id gets
its rank. So they do not depend on partitions, and are those that `anabranch.graph.formats.read_graph` gives the same file. Ids that are
0 ... N - 1 already stay what they are, and cost no join.
"""
# Shapes: N nodes, M stored edges

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from anabranch.errors import DataError, InputError
from anabranch.graph.formats.layout import Dialect
from anabranch.graph.formats.parquet import NOTE, choose_columns
from anabranch.graph.spark.files import Files, as_text, is_uri, why_unread
from anabranch.graph.spark.run import Run
from anabranch.graph.spark.session import default_partitions
from anabranch.graph.table_look import EdgeTable, look_at_edges

# Of a partition of edges, as they lie on disk.
_PARTITION_BYTES = 32 << 20

# The row number in `monotonically_increasing_id`; the rest is the partition.
_ROW_BITS = 33


def is_parquet(path: Any) -> bool:
    """Whether this is what Spark reads itself: a URI, a name that ends as Parquet's do, or a folder."""
    if not isinstance(path, str | Path):
        return False
    return is_uri(path) or str(path).endswith((".parquet", ".pq")) or Path(path).is_dir()


@dataclass(frozen=True)
class EdgeFiles:
    """Edges in Parquet, and how to read them.

    Attributes:
        path: a file, a folder, or a pattern; with or without a file system (``file:``, ``hdfs:``, ``s3a:``).
        directed: whether (u, v) differs from (v, u). None: what `write_graph` noted in a local file, else what Gephi's column Type says of
            all edges, else undirected.
        columns: of source, target and perhaps weight, by name or number from 0. None: those with well-known names, else the first two.
        drop_zero: leave out edges of weight 0 instead of refusing them.
    """

    path: str | Path
    directed: bool | None = None
    columns: Sequence[str | int] | None = None
    drop_zero: bool = False

    @classmethod
    def of(cls, given: "str | Path | EdgeFiles") -> "EdgeFiles":
        """What is given, as edges with all defaults where it is a path."""
        return given if isinstance(given, EdgeFiles) else cls(given)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        columns = None if self.columns is None else list(self.columns)
        return {"path": as_text(self.path), "directed": self.directed, "columns": columns, "drop_zero": self.drop_zero}


@dataclass(frozen=True)
class SparkGraph:
    """A graph as frames on a cluster.

    Attributes:
        nodes: columns ``node`` (its number, long) and ``id`` (long or string, as in the files).
        edges: ``source``, ``target`` (numbers) and ``weight`` (double), each stored edge once; both directions of undirected ones.
        num_nodes: N. num_stored: M.
        id_type: ``long`` or ``string``.
        is_dense: whether ids are the numbers.
        is_directed: as read.
    """

    nodes: Any
    edges: Any
    num_nodes: int
    num_stored: int
    id_type: str
    is_dense: bool
    is_directed: bool

    def named(self, frame: Any, *columns: str) -> Any:
        """The frame with ids instead of numbers in these columns."""
        if self.is_dense:
            return frame
        from pyspark.sql import functions as sql

        for column in columns:
            called = self.nodes.select(sql.col("node").alias(column), sql.col("id").alias("_id"))
            frame = frame.join(called, column).drop(column).withColumnRenamed("_id", column)
        return frame

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "num_nodes": self.num_nodes,
            "num_stored_edges": self.num_stored,
            "id_type": self.id_type,
            "is_dense": self.is_dense,
            "is_directed": self.is_directed,
        }


def open_run(
    spark: Any, out: str | Path, given: EdgeFiles, facts: dict[str, Any], kind: str, cancel: Any = None
) -> Run:
    """The run of these files and settings, for a result of a kind: one that was stopped goes on where neither has changed.

    Raises InputError where ``out`` is the edges' own folder, lies in it or around it, and as `Run`.
    """
    files, path = Files(spark), as_text(given.path)
    read, written = f"{files.qualified(path)}/", f"{files.qualified(out)}/"
    if read.startswith(written) or written.startswith(read):
        raise InputError(f"out is {out}, and the edges are read from {path}; choose a folder apart from theirs")
    # A pattern has no one place to look at.
    stamp = files.stamp(path) if not set(path) & set("*?[{") and files.exists(path) else None
    return Run(spark, out, {"facts": facts, "edges": given.facts(), "files": stamp}, kind, cancel)


def open_edges(run: Run, given: EdgeFiles, *, allow_negative: bool = False) -> SparkGraph:
    """Nodes and merged edges of the files, as steps of the run.

    Raises DataError for files that cannot be read or hold no edges, missing ends, or weights that may not be, and as `look_at_edges`.
    """
    spark = run.spark
    read = _read(run, given)
    set_partitions(spark, read)
    note = _note(read)
    is_directed = _direction(read, given, note)
    frame, id_type = _columns(read, given)
    if "raw" not in run.state:
        _check(frame, given, allow_negative, note)
        run.save({**run.state, "raw": True})
    nodes, num_nodes, is_dense = _numbered(run, frame, id_type, None if note is None else note[0])
    edges = run.step("edges", lambda: _merged(frame, nodes, is_dense, is_directed, given.drop_zero))
    return SparkGraph(nodes, edges, num_nodes, edges.count(), id_type, is_dense, is_directed)


def set_partitions(spark: Any, read: Any) -> int:
    """Let shuffles have as many partitions as the edges need, and give that number."""
    needed = -(-_size(spark, read) // _PARTITION_BYTES)
    partitions = max(int(spark.conf.get("spark.sql.shuffle.partitions")), min(needed, 1 << 16))
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    return partitions


def _size(spark: Any, read: Any) -> int:
    """Bytes of files, as Spark's plan knows them."""
    return int(str(read._jdf.queryExecution().optimizedPlan().stats().sizeInBytes()))


# Reading


def _read(run: Run, given: EdgeFiles) -> Any:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    path = as_text(given.path)
    try:
        return run.spark.read.parquet(path)
    except (Py4JError, PySparkException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {why_unread(error)}") from error


def _direction(read: Any, given: EdgeFiles, note: tuple[int | None, bool] | None) -> bool:
    """Whether edges have a direction. Raises DataError as `look_at_edges`."""
    if note is not None:
        return note[1] if given.directed is None else given.directed
    ends_are_said = given.columns is not None
    return bool(look_at_edges(_edge_table(read, given), ends_are_said=ends_are_said, directed=given.directed))


def _edge_table(read: Any, given: EdgeFiles) -> EdgeTable:
    """The files as a table that is looked at: a few first rows come here, and of what is behind them each cell once."""
    import pyarrow as pa

    schema = pa.schema(_fields(read), _metadata(read))
    rows = read.limit(len(schema.names) + 1).collect()

    def first(name: str) -> Any:
        kind, place = schema.field(name).type, schema.names.index(name)
        cells = [row[place] for row in rows]
        if pa.types.is_decimal(kind):
            return pa.array([None if cell is None else float(cell) for cell in cells], pa.float64())
        # What is none of these is no end, weight or direction.
        return pa.array([str(type(cell)) for cell in cells]) if pa.types.is_null(kind) else pa.array(cells, kind)

    def rest(name: str) -> Iterator[Any]:
        # Of two kinds it is a mixture.
        kinds = read.selectExpr(f"lower(trim(`{name}`))").distinct().limit(2).collect()
        yield pa.array([row[0] for row in kinds], pa.string())

    return EdgeTable(as_text(given.path), schema, len(rows), first, rest, is_ordered=False)


def _fields(read: Any) -> list[Any]:
    """Columns as Arrow has them; null for those of other types than ids, weights and words."""
    import pyarrow as pa

    kinds = {
        "bigint": pa.int64(),
        "int": pa.int32(),
        "smallint": pa.int16(),
        "tinyint": pa.int8(),
        "string": pa.string(),
        "double": pa.float64(),
        "float": pa.float32(),
        "boolean": pa.bool_(),
    }
    fields = []
    for field in read.schema.fields:
        name = field.dataType.simpleString()
        kind = pa.decimal128(38) if name.startswith("decimal") else kinds.get(name, pa.null())
        fields.append(pa.field(field.name, kind))
    return fields


def _columns(read: Any, given: EdgeFiles) -> tuple[Any, str]:
    """Columns source, target and weight (float; not there without weights), and the type of ids."""
    import pyarrow as pa
    from pyspark.sql import functions as sql

    fields = _fields(read)
    wanted = (None, None) if given.columns is None else tuple(given.columns)
    weight = "auto" if given.columns is None else (wanted[2] if len(wanted) > 2 else None)
    if len(wanted) not in (2, 3):
        raise InputError(f"columns are {wanted!r}; give those of source, target and perhaps weight")
    dialect = Dialect(source=wanted[0], target=wanted[1], weight=weight)
    places = choose_columns(as_text(given.path), pa.schema(fields, _metadata(read)), dialect)
    chosen = [fields[place] for place in places]
    id_type = "string" if any(field.type == pa.string() for field in chosen[:2]) else "long"
    columns = [
        sql.col(f"`{field.name}`").cast(kind).alias(name)
        for field, kind, name in zip(chosen, (id_type, id_type, "float"), ("source", "target", "weight"), strict=False)
    ]
    return read.select(*columns), id_type


def _metadata(read: Any) -> dict[bytes, bytes]:
    """What the first of local files notes, whose footer alone is read; nothing of others."""
    import pyarrow.parquet as pq

    files = read.inputFiles()
    if not files or not files[0].startswith("file:"):
        return {}
    return pq.read_schema(unquote(urlparse(files[0]).path)).metadata or {}


def _note(read: Any) -> tuple[int | None, bool] | None:
    """Nodes (None where ends are names) and direction as `write_graph` noted them: of a single local file."""
    parts = _metadata(read).get(NOTE, b"").split() if len(read.inputFiles()) == 1 else []
    if len(parts) not in (2, 3) or not parts[0].isdigit():
        return None
    return None if parts[2:] == [b"named"] else int(parts[0]), parts[1] == b"directed"


def _check(frame: Any, given: EdgeFiles, allow_negative: bool, note: tuple[int | None, bool] | None) -> None:
    """One pass over the edges; a row of counts comes back."""
    from pyspark.sql import functions as sql

    def counted(condition: Any, name: str) -> Any:
        return sql.coalesce(sql.sum(condition.cast("long")), sql.lit(0)).alias(name)

    faults = [
        counted(sql.col("source").isNull(), "the source is missing (null)"),
        counted(sql.col("target").isNull(), "the target is missing (null)"),
    ]
    if "weight" in frame.columns:
        weight = sql.col("weight")
        faults.append(counted(weight.isNull(), "the weight is missing (null)"))
        infinite = sql.isnan(weight) | (sql.abs(weight) == float("inf"))
        faults.append(counted(infinite, "the weight must be finite (as 32-bit numbers)"))
        if not allow_negative:
            faults.append(counted(weight < 0, "the weight must be not negative"))
        if not given.drop_zero:
            faults.append(counted(weight == 0, "the weight must be not 0 (drop_zero=True leaves such edges out)"))
    found = frame.agg(sql.count(sql.lit(1)).alias("edges"), *faults).first().asDict()
    path = as_text(given.path)
    edges = found.pop("edges")
    if not edges and note is None:
        raise DataError(f"{path} holds no edges")
    for what, count in found.items():
        if count:
            raise DataError(f"{path}: {what} in {count:,} of {edges:,} rows")


# Numbers


def _numbered(run: Run, frame: Any, id_type: str, noted: int | None) -> tuple[Any, int, bool]:
    """Frame of nodes, N, and whether ids are the numbers."""
    from pyspark.sql import functions as sql

    spark = run.spark
    if noted is not None and id_type == "long":
        return _dense(spark, noted), noted, True

    def ranked() -> Any:
        ends = frame.select(sql.col("source").alias("id")).union(frame.select(sql.col("target").alias("id"))).distinct()
        partitions = int(spark.conf.get("spark.sql.shuffle.partitions"))
        by_range = ends.repartitionByRange(partitions, "id").sortWithinPartitions("id")
        return by_range.withColumn("row", sql.monotonically_increasing_id())

    ids = run.step("ids", ranked)
    if id_type == "long":
        low, high, count = ids.agg(sql.min("id"), sql.max("id"), sql.count("id")).first()
        if low == 0 and high == count - 1:
            return _dense(spark, count), count, True
    part = sql.shiftright("row", _ROW_BITS)
    counts = sorted(ids.groupBy(part.alias("part")).count().collect())
    first, starts = 0, []
    for place, count in counts:
        starts.append((place, first))
        first += count
    offsets = spark.createDataFrame(starts, "part long, first long")
    in_part = sql.col("row").bitwiseAND((1 << _ROW_BITS) - 1)
    nodes = ids.withColumn("part", part).join(sql.broadcast(offsets), "part")
    return nodes.select((sql.col("first") + in_part).alias("node"), "id"), first, False


def _dense(spark: Any, count: int) -> Any:
    from pyspark.sql import functions as sql

    partitions = max(1, min(count, int(spark.conf.get("spark.sql.shuffle.partitions"))))
    return spark.range(0, count, 1, partitions).select(sql.col("id").alias("node"), "id")


def _merged(frame: Any, nodes: Any, is_dense: bool, is_directed: bool, drop_zero: bool) -> Any:
    """Stored edges: both directions of undirected ones, those given several times added up, as 32-bit weights."""
    from pyspark.sql import functions as sql

    is_weighted = "weight" in frame.columns
    weight = sql.col("weight").cast("double") if is_weighted else sql.lit(1.0)
    edges = frame.select("source", "target", weight.alias("weight"))
    if drop_zero and is_weighted:
        edges = edges.where(sql.col("weight") != 0)
    if not is_dense:
        for column in ("source", "target"):
            called = nodes.select(sql.col("id").alias(column), sql.col("node").alias("_node"))
            edges = edges.join(called, column).drop(column).withColumnRenamed("_node", column)
    if not is_directed:
        turned = edges.where(sql.col("source") != sql.col("target")).select(
            sql.col("target").alias("source"), sql.col("source").alias("target"), "weight"
        )
        edges = edges.select("source", "target", "weight").union(turned)
    total = sql.sum("weight").cast("float").cast("double") if is_weighted else sql.lit(1.0)
    return edges.groupBy("source", "target").agg(total.alias("weight"))


def partitions_for(graph: SparkGraph, spark: Any, per_partition: int, asked: int | None) -> int:
    """Partitions of which each holds about so many stored edges; those that were asked for where they were."""
    return asked or max(default_partitions(spark), -(-graph.num_stored // per_partition))
