"""Fully PPR from edges in Parquet to scores in Parquet, on Spark, with no process that ever holds the graph.

    edges      read, checked, numbered and merged by Spark (`anabranch.graph.spark.edges`)
    records    made bucket by bucket (`edge_records`)
    rounds     as in the partitioned plan: walks come to the bucket of their record (`partitioned.Rounds`)
    scores     ends summed and cut to the best by groups of sources, numbers turned back into ids, renamed to ``out`` when all are there

Every step is kept beside ``out`` until then, so a run that was stopped goes on. The driver sees counts, hubs and the log of rounds.
"""
# Shapes: N nodes, S sources

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from anabranch.errors import InputError
from anabranch.graph.counters import VANISH
from anabranch.graph.fully_ppr.asked import Asked
from anabranch.graph.fully_ppr.edge_decompose import check_rule, decomposed
from anabranch.graph.fully_ppr.edge_records import edge_records
from anabranch.graph.fully_ppr.options import Options
from anabranch.graph.fully_ppr.partitioned import ENDS, SHARE, Rounds, rows_from
from anabranch.graph.fully_ppr.result import parquet_facts
from anabranch.graph.fully_ppr.rounds import Round, Rules, Schedule, best_rows, merged
from anabranch.graph.fully_ppr.stored import StoredScores
from anabranch.graph.masks import unmasked
from anabranch.graph.ppr.rules import CODES
from anabranch.graph.spark.edges import EdgeFiles, SparkGraph, open_edges, open_run, partitions_for
from anabranch.graph.spark.run import Run
from anabranch.graph.spark.session import executor_bytes, session
from anabranch.graph.stored_folder import SCORES

# Stored edges of a bucket: about 100 MB in a Python worker.
BUCKET_EDGES = 1 << 19

# Rows of ends whose sources are finished together, likewise.
GROUP_ROWS = 1 << 20


@dataclass(frozen=True)
class Watch:
    """Whom a run tells how far it is, and who stops it."""

    progress: Callable[[int, int], None] | None
    cancel: Any


@dataclass(frozen=True)
class Walks:
    """What walks from edges are made by.

    Attributes:
        alpha, walks, seed, full: of the walks; full counts every visit.
        dangling: a code of `anabranch.graph.counters`.
        gamma: walks of a source that start in a round; None to choose.
        theta: most entries of a record.
        memory: bytes for rows of walks; None for a share of an executor's.
        partitions: buckets; None to choose.
    """

    alpha: float
    walks: int
    seed: int
    full: bool
    dangling: int
    gamma: int | None
    theta: int
    memory: float | None
    partitions: int | None


def run_from_edges(model: Asked, options: Options, given: EdgeFiles) -> StoredScores:
    """All of it; gives where the scores lie. Raises as `FullyPPR.fit`."""
    if model.out is None:
        raise InputError("engine 'spark' on files of edges writes its scores: give out=FOLDER")
    if model.plan == "broadcast":
        raise InputError(
            "plan 'broadcast' sends a whole graph to every worker; files of edges take plan 'partitioned' or 'auto'"
        )
    method = options.files_method()
    facts = {
        **options.facts(method),
        "engine": "spark",
        "plan": "edges",
        "gamma": model.gamma,
        "theta": model.theta,
        "memory_limit": options.memory_limit,
    }
    if method == "decompose":
        check_rule(options.dangling)
    named = None if model.sources is None else _listed(model.sources)
    with session(model.spark, model.partitions) as spark:
        run = open_run(spark, model.out, given, {**facts, "sources": named}, SCORES, model.cancel)
        with run.working():
            graph = open_edges(run, given)
            sources = _sources(graph, spark, named)
        walks = Walks(
            options.alpha,
            options.num_walks,
            int(options.seed),
            options.estimator == "fullpath",
            CODES[options.dangling],
            model.gamma,
            model.theta,
            options.memory_limit,
            model.partitions,
        )
        watch = Watch(model.progress, model.cancel)
        if method == "decompose":
            walks = replace(walks, walks=options.index_walks, full=True, dangling=VANISH)
            ends, model.rounds_ = walk(run, graph, None, walks, watch)
            rows = run.step("index", lambda: index_rows(ends, 0, 1.0))
            run.step("scores", lambda: _answered(graph, sources, rows, options))
        else:
            ends, model.rounds_ = walk(run, graph, sources, walks, watch)
            run.step("scores", lambda: _best(graph, ends, options))
        whole = parquet_facts(graph.num_nodes, {**facts, **graph.facts()}, is_all=named is None, ordered=False)
        whole["ids"] = "numbers" if graph.is_dense else "names"
        run.publish("scores", whole)
        return StoredScores(run.out, whole)


def walk(run: Run, graph: SparkGraph, sources: Any, walks: Walks, watch: Watch) -> tuple[Any, list[Round]]:
    """Frame of what was counted (``bucket``, ``source``, ``key``, ``count``; rows of one source and key may be several), and the log.

    ``sources`` is a frame with the column ``node``; None for all.
    """
    from pyspark.sql import functions as sql

    spark = run.spark
    if "partitions" not in run.state:
        run.save({**run.state, "partitions": partitions_for(graph, spark, BUCKET_EDGES, walks.partitions)})
    partitions = run.state["partitions"]
    made = run.step("records", lambda: edge_records(graph, spark, walks.theta, partitions))
    records = made.repartition(partitions, "bucket").persist()
    chosen = (graph.nodes if sources is None else sources).select(sql.col("node").alias("source"))
    frame = chosen.withColumn("bucket", (sql.col("source") % partitions).cast("int"))
    if "schedule" in run.state:
        schedule = Schedule.from_dict(run.state["schedule"])
    else:
        count = graph.num_nodes if sources is None else sources.count()
        memory = walks.memory or SHARE * executor_bytes(spark)
        schedule = Schedule.make(count, walks.walks, walks.alpha, memory, walks.gamma)
    rules = Rules(walks.seed, walks.alpha, walks.dangling, walks.full, graph.num_nodes)
    try:
        Rounds(watch, spark, run, records, frame, rules, schedule).run()
    finally:
        records.unpersist()
    ends = [run.place(f"ends-{number:06d}") for number in run.state["ends"]]
    return spark.read.schema(ENDS).parquet(*ends), schedule.log


def by_groups(ends: Any, work: Callable[[pa.Table], pa.Table], schema: str) -> Any:
    """``work`` on the ends of a few sources at a time, all of each: so many that a worker holds about `GROUP_ROWS` rows."""
    from pyspark.sql import functions as sql

    partitions = int(ends.sparkSession.conf.get("spark.sql.shuffle.partitions"))
    groups = max(partitions, -(-ends.count() // GROUP_ROWS))
    grouped = ends.withColumn("bucket", (sql.col("source") % groups).cast("int"))
    return grouped.repartition(partitions, "bucket").groupBy("bucket").applyInArrow(work, schema)


def index_rows(ends: Any, keep: int, mass: float) -> Any:
    """Rows of an index of walks (``source``, ``target``, ``count``, ``total``), numbers of nodes; cut as `cut_rows` says."""

    def cut(table: pa.Table) -> pa.Table:
        return cut_rows(table, keep, mass)

    return by_groups(ends, cut, "source long, target long, count long, total long")


def cut_rows(ends: pa.Table, keep: int, mass: float) -> pa.Table:
    """Rows of some sources by falling count, ties by rising node: ``keep`` entries of each (0: all), and no more than hold ``mass``."""
    rows = merged(rows_from(ends))
    order = np.lexsort((rows.key, -rows.count, rows.source))
    source, key, count = rows.source[order], rows.key[order], rows.count[order]
    if not len(source):
        return pa.table({"source": source, "target": key, "count": count, "total": count})
    first = np.flatnonzero(np.append(True, np.diff(source) != 0))
    length = np.diff(np.append(first, len(source)))
    total = np.repeat(np.add.reduceat(count, first), length)
    kept = np.ones(len(source), bool)
    if keep:
        kept &= np.arange(len(source)) - np.repeat(first, length) < keep
    if mass < 1:
        before = np.cumsum(count) - count
        kept &= before - np.repeat(before[first], length) < mass * total
    return pa.table({"source": source[kept], "target": key[kept], "count": count[kept], "total": total[kept]})


def _answered(graph: SparkGraph, sources: Any, rows: Any, options: Options) -> Any:
    """Scores by rounds of decomposition on an index."""
    scores = decomposed(
        graph,
        graph.nodes if sources is None else sources,
        rows,
        alpha=options.alpha,
        walks=options.index_walks,
        rounds=options.rounds,
        dangling=options.dangling,
        top_k=options.top_k or 0,
        least=options.min_score,
    )
    return _ordered(graph, scores)


def _best(graph: SparkGraph, ends: Any, options: Options) -> Any:
    """Scores of all sources, from where walks ended or passed."""
    top_k, least = options.top_k or 0, options.min_score

    def best(table: pa.Table) -> pa.Table:
        return scores_table(table, top_k, least)

    return _ordered(graph, by_groups(ends, best, "source long, target long, score float"))


def _ordered(graph: SparkGraph, scores: Any) -> Any:
    """With ids, each source in one file, by rising source and falling score."""
    from pyspark.sql import functions as sql

    named = graph.named(scores, "source", "target")
    if not graph.is_dense:
        # Names were joined target by target.
        named = named.repartition("source")
    return named.sortWithinPartitions("source", sql.desc("score"), "target").select("source", "target", "score")


def scores_table(ends: pa.Table, top_k: int, least: float) -> pa.Table:
    """The best of some sources."""
    rows, score = best_rows(rows_from(ends), top_k, least)
    return pa.table({"source": rows.source, "target": rows.key, "score": score})


# Sources


def _listed(sources: Any) -> list[Any]:
    """Ids as they were given, as JSON. Raises InputError for none, or one that is given twice."""
    sources = unmasked(sources, "sources")
    found = np.asarray(sources).tolist() if not isinstance(sources, list | tuple) else list(sources)
    found = [int(source) if isinstance(source, np.integer) else source for source in found]
    if not found:
        raise InputError("there are no sources; engine 'spark' takes at least one")
    if len(set(found)) < len(found):
        twice = next(source for source in found if found.count(source) > 1)
        raise InputError(f"source {twice!r} is given {found.count(twice)} times; sources are distinct")
    return found


def _sources(graph: SparkGraph, spark: Any, named: list[Any] | None) -> Any:
    """Frame of the sources' numbers; None for all. Raises InputError naming one that is no node."""
    if named is None:
        return None
    kind: Any = int if graph.id_type == "long" else str
    try:
        asked = [(kind(source),) for source in named]
    except (TypeError, ValueError) as error:
        raise InputError(f"sources are {graph.id_type} ids, as in the edges: {error}") from None
    frame = spark.createDataFrame(asked, f"id {graph.id_type}")
    found = graph.nodes.join(frame, "id").select("node", "id").persist()
    if found.count() < len(asked):
        there = {row["id"] for row in found.collect()}
        missing = next(source for (source,) in asked if source not in there)
        raise InputError(f"the graph has no node {missing!r}")
    return found.select("node")
