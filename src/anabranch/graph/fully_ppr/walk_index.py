"""PowerWalk's index from edges in Parquet, on Spark: fingerprints of all nodes with no process that holds the graph.

Walks are those of Fully PPR (`anabranch.graph.fully_ppr.from_edges`), but vanish at dead ends; what is counted is kept as it is, cut by
``keep`` and ``mass`` as in memory. Columns are ``source``, ``target``, ``count``, and ``total``, the counts of the row before it was cut.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import InputError
from anabranch.graph.counters import VANISH
from anabranch.graph.fully_ppr.devices import THETA
from anabranch.graph.fully_ppr.from_edges import Walks, Watch, index_rows, walk
from anabranch.graph.spark.edges import EdgeFiles, SparkGraph, open_edges, open_run
from anabranch.graph.spark.session import session
from anabranch.graph.stored_folder import WALKS

if TYPE_CHECKING:
    from anabranch.graph.powerwalk.model import PowerWalk

# Arguments that rounds of rows with counts do not know.
_LOCAL: dict[str, Any] = {"moves": "walkers", "long_path": False, "max_steps": None, "min_in_degree": 0, "track": False}


def build_index(model: "PowerWalk", given: EdgeFiles, out: str | Path | None, progress: Any = None) -> str:
    """Walk from every node; gives where the index lies. ``progress`` is called with the number of walks that have ended.

    Raises as `PowerWalk.build`.
    """
    if out is None:
        raise InputError("engine 'spark' writes its index: build(edges, out=FOLDER)")
    for name, value in _LOCAL.items():
        if getattr(model, name) != value:
            raise InputError(f"{name} is {getattr(model, name)!r}; engine 'spark' has {name}={value!r} alone")
    params = model.stored_params()
    walks = Walks(
        model.alpha, model.walks, model.seed, model.mode == "fullpath", VANISH, None, THETA, None, model.partitions
    )
    with session(model.spark, model.partitions) as spark:
        run = open_run(spark, out, given, {"index": params}, WALKS)
        with run.working():
            graph = open_edges(run, given)
        watch = Watch(None if progress is None else lambda done, total: progress(done), None)
        ends, _ = walk(run, graph, None, walks, watch)
        run.step("rows", lambda: _rows(graph, ends, model.keep or 0, 1.0 if model.mass is None else float(model.mass)))
        facts = {"kind": WALKS, "params": params, "graph": graph.facts()}
        run.publish("rows", facts)
        return run.out


def _rows(graph: SparkGraph, ends: Any, keep: int, mass: float) -> Any:
    from pyspark.sql import functions as sql

    named = graph.named(index_rows(ends, keep, mass), "source", "target")
    if not graph.is_dense:
        # Names were joined target by target.
        named = named.repartition("source")
    ordered = named.sortWithinPartitions("source", sql.desc("count"), "target")
    return ordered.select("source", "target", "count", "total")
