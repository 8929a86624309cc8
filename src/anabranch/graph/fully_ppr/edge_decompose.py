"""Rounds of exact decomposition on Spark, over an index of few walks: PowerWalk's batch of queries as joins of frames.

With P0 the transition matrix whose rows of dead ends are empty and c = 1 - alpha, a query u starts with the flow e_u, and each round does

    done += alpha flow,    flow = c flow P0

After T rounds ``done + flow X`` estimates g_u, X being the index: rows of counts of walks that vanish at dead ends, alpha / walks each, so
that they are unbiased. A policy of dead ends makes scores of it (`anabranch.graph.ppr.rules`): ``source`` divides by the sum, which
estimates h_u; ``absorb`` counts dead ends 1 / alpha times. ``uniform`` would need g of all nodes together, and is refused.
"""

from typing import Any

from anabranch.errors import InputError
from anabranch.graph.spark.edges import SparkGraph

# Flows below it are not followed; as in `PowerWalk.query`.
EPS = 1e-6


def check_rule(dangling: str) -> None:
    """Raises InputError for a policy of dead ends that needs more than rows."""
    if dangling == "uniform":
        raise InputError(
            "method 'decompose' on Spark takes dangling='source' or 'absorb'; method='walks' takes 'uniform' too"
        )


def decomposed(
    graph: SparkGraph,
    sources: Any,
    rows: Any,
    *,
    alpha: float,
    walks: int,
    rounds: int,
    dangling: str,
    top_k: int,
    least: float,
) -> Any:
    """Frame of scores (``source``, ``target``, ``score``), numbers of nodes.

    Args:
        graph: the graph.
        sources: frame with the column ``node``: the queries.
        rows: the index (``source``, ``target``, ``count``), full paths of ``walks`` walks of each node.
        alpha, walks, rounds, dangling: as above.
        top_k: entries of a row; 0 for all. least: smallest score that is kept.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sql

    strength = graph.edges.groupBy("source").agg(sql.sum("weight").alias("strength"))
    steps = graph.edges.join(strength, "source").select(
        sql.col("source").alias("node"),
        "target",
        ((1 - alpha) * sql.col("weight") / sql.col("strength")).alias("share"),
    )
    flow = sources.select(sql.col("node").alias("query"), "node", sql.lit(1.0).alias("value"))
    done = None
    for _ in range(rounds):
        gain = flow.select("query", "node", (alpha * sql.col("value")).alias("value"))
        done = gain if done is None else done.union(gain)
        moved = flow.join(steps, "node").select(
            "query", sql.col("target").alias("node"), (sql.col("value") * sql.col("share")).alias("value")
        )
        flow = moved.groupBy("query", "node").agg(sql.sum("value").alias("value")).where(sql.col("value") > EPS)
    index = rows.select(
        sql.col("source").alias("node"), "target", (sql.col("count") * (alpha / walks)).alias("estimate")
    )
    found = flow.join(index, "node").select(
        "query", sql.col("target").alias("node"), (sql.col("value") * sql.col("estimate")).alias("value")
    )
    found = found if done is None else done.union(found)
    if dangling == "absorb":
        ends = graph.nodes.select("node").join(strength.select(sql.col("source").alias("node")), "node", "left_anti")
        ends = ends.withColumn("factor", sql.lit(1 / alpha))
        found = found.join(ends, "node", "left")
        found = found.select("query", "node", (sql.col("value") * sql.coalesce("factor", sql.lit(1.0))).alias("value"))
    sums = found.groupBy("query", "node").agg(sql.sum("value").alias("value"))
    whole = Window.partitionBy("query")
    score = (sql.col("value") / sql.sum("value").over(whole)).cast("float")
    best = sums.select(sql.col("query").alias("source"), sql.col("node").alias("target"), score.alias("score"))
    if top_k:
        order = Window.partitionBy("source").orderBy(sql.desc("score"), "target")
        best = best.withColumn("place", sql.row_number().over(order)).where(sql.col("place") <= top_k).drop("place")
    return best.where(sql.col("score") >= least) if least else best
