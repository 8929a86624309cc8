"""Records of a graph whose edges lie on a cluster, made where they lie: what `devices.make_records` makes of a graph in memory.

    plain node     one record of its edges, made by the worker that gets the bucket of its number
    hub            edges ordered by target, cut into ceil(degree / theta) leaves; levels above them, which have at most 1 / theta of the
                   edges' number, are planned by the driver from the leaves' sums
    dead end       an empty record

Piece numbers follow N, hub by hub in rising order. There are no big moves: they need the neighbours' neighbours.
"""
# Shapes: N nodes, R records, E entries

from typing import Any

import numpy as np
import pyarrow as pa

from anabranch.graph.alias import build_alias
from anabranch.graph.fully_ppr.devices import INNER, NODE, Records
from anabranch.graph.fully_ppr.partitioned import RECORDS, records_table
from anabranch.graph.spark.edges import SparkGraph

# Of an entry that only says that its record is there.
_MARK = -1
_ENTRIES = "record long, kind byte, code long, weight double"


def edge_records(graph: SparkGraph, spark: Any, theta: int, partitions: int) -> Any:
    """Frame of records (`RECORDS`) by bucket = record mod ``partitions``. Raises what `build_alias` does in a worker."""
    from pyspark.sql import functions as sql

    edges = graph.edges
    hubs = edges.groupBy("source").count().where(sql.col("count") > theta).orderBy("source").collect()
    code = (2 * sql.col("target")).alias("code")
    plain = edges.select(sql.col("source").alias("record"), sql.lit(NODE).cast("byte").alias("kind"), code, "weight")
    if hubs:
        known = plan_hubs([(row[0], row[1]) for row in hubs], theta, graph.num_nodes)
        leaves, plain = _leaves(edges, plain, known, spark)
        sums = leaves.groupBy("record").agg(sql.sum("weight").alias("weight")).collect()
        upper = upper_entries(known, dict(map(tuple, sums)), theta)
        plain = plain.union(leaves).union(spark.createDataFrame(upper, _ENTRIES))
    marks = graph.nodes.select(
        sql.col("node").alias("record"),
        sql.lit(NODE).cast("byte").alias("kind"),
        sql.lit(_MARK).cast("long").alias("code"),
        sql.lit(0.0).alias("weight"),
    )
    entries = plain.union(marks).withColumn("bucket", (sql.col("record") % partitions).cast("int"))

    def made(table: pa.Table) -> pa.Table:
        return bucket_records(table, partitions)

    return entries.repartition(partitions, "bucket").groupBy("bucket").applyInArrow(made, RECORDS)


def _leaves(edges: Any, plain: Any, known: list[tuple[int, int, int, int]], spark: Any) -> tuple[Any, Any]:
    """Entries of the leaves of hubs, and the plain ones without theirs."""
    from pyspark.sql import Window
    from pyspark.sql import functions as sql

    table = sql.broadcast(spark.createDataFrame(known, "hub long, degree long, leaves long, first long"))
    # A window streams: a hub's edges are sorted on disk, and never in memory at once.
    order = Window.partitionBy("source").orderBy("target")
    ranked = edges.join(table, edges["source"] == table["hub"]).withColumn("place", sql.row_number().over(order) - 1)
    leaves = ranked.select(
        sql.expr("first + (place * leaves) div degree").alias("record"),
        sql.lit(INNER).cast("byte").alias("kind"),
        (2 * sql.col("target")).alias("code"),
        "weight",
    )
    return leaves, plain.join(table, plain["record"] == table["hub"], "left_anti")


def plan_hubs(hubs: list[tuple[int, int]], theta: int, num_nodes: int) -> list[tuple[int, int, int, int]]:
    """Of each hub (number, degree): number, degree, leaves, and the number of its first piece; ``num_nodes`` is that of all first."""
    found, first = [], num_nodes
    for hub, degree in hubs:
        leaves = -(-degree // theta)
        found.append((hub, degree, leaves, first))
        while True:
            first += leaves
            if leaves <= theta:
                break
            leaves = -(-leaves // theta)
    return found


def upper_entries(
    known: list[tuple[int, int, int, int]], weight_of: dict[int, float], theta: int
) -> list[tuple[int, int, int, float]]:
    """Entries (record, kind, code, weight) of all that stands above the leaves: inner records, and the hubs' own as roots."""
    found: list[tuple[int, int, int, float]] = []
    for hub, _, leaves, first in known:
        children = [(first + place, weight_of[first + place]) for place in range(leaves)]
        first += leaves
        while len(children) > theta:
            parents = -(-len(children) // theta)
            weights = [0.0] * parents
            for place, (child, weight) in enumerate(children):
                parent = place * parents // len(children)
                weights[parent] += weight
                found.append((first + parent, INNER, 2 * child, weight))
            children = [(first + parent, weight) for parent, weight in enumerate(weights)]
            first += parents
        found += [(hub, NODE, 2 * child, weight) for child, weight in children]
    return found


def bucket_records(entries: pa.Table, partitions: int) -> pa.Table:
    """Records of one bucket from their entries, by rising number and code."""
    record, kind, code, weight = (entries[name].to_numpy() for name in ("record", "kind", "code", "weight"))
    order = np.lexsort((code, record))
    record, kind, code, weight = record[order], kind[order], code[order], weight[order]
    first = np.flatnonzero(np.append(True, np.diff(record) != 0))
    is_entry = code != _MARK
    length = np.add.reduceat(is_entry.astype(np.int64), first)
    indptr = np.append(0, np.cumsum(length)).astype(np.int64)
    code, weight = code[is_entry], weight[is_entry]
    table = build_alias(indptr, weight)
    made = Records(indptr, kind[first], code, table.keep_M, table.other_M, None, 0)
    return records_table(record[first], made, partitions)
