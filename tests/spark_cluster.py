"""A program for tests: one system on a cluster of executors with little memory each, in a process and a JVM of its own.

    python tests/spark_cluster.py '{"system": "ppr", "edges": "...", "out": "...", "executors": 2, "memory": 512, "options": {...}}'

Prints JSON: seconds, shuffled bytes, executors that worked, and how much the driver's own memory grew.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import anabranch
import anabranch.graph.fastrp.from_edges  # before memory is looked at
import anabranch.graph.fully_ppr.walk_index
from anabranch.graph import FastRP, PowerWalk
from anabranch.graph.fully_ppr import EdgeFiles, FullyPPR


def cluster(executors, memory, settings):
    """A session on a standalone cluster of this machine, each executor a JVM of ``memory`` MiB with one core."""
    from pyspark.sql import SparkSession

    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    os.environ["PYSPARK_SUBMIT_ARGS"] = "--driver-memory 512m pyspark-shell"
    paths = [str(Path(anabranch.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    builder = SparkSession.builder.master(f"local-cluster[{executors},1,{memory}]").appName("cluster")
    every = {
        "spark.executor.memory": f"{memory}m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.executorEnv.PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "spark.executorEnv.OMP_NUM_THREADS": "1",
        "spark.executorEnv.ARROW_DEFAULT_MEMORY_POOL": "system",
        **settings,
    }
    for name, value in every.items():
        builder = builder.config(name, value)
    found = builder.getOrCreate()
    found.sparkContext.setLogLevel("ERROR")
    return found


def shuffled(spark):
    """Bytes that executors wrote for shuffles, and how many of them finished tasks."""
    listed = spark.sparkContext._jsc.sc().statusStore().executorList(False)
    executors = [listed.apply(place) for place in range(listed.size())]
    working = [one for one in executors if one.id() != "driver"]
    return sum(one.totalShuffleWrite() for one in working), sum(one.completedTasks() > 0 for one in working)


def run(task, spark):
    edges = EdgeFiles(task["edges"], directed=True)
    options = {"engine": "spark", "spark": spark, **task["options"]}
    if task["system"] == "ppr":
        model = FullyPPR(**options, out=task["out"]).fit(edges)
        return {"rounds": len(model.rounds_)}
    if task["system"] == "fastrp":
        FastRP(**options, out=task["out"]).fit(edges)
    else:
        PowerWalk(**options).build(edges, out=task["out"])
    return {}


def main():
    task = json.loads(sys.argv[1])
    spark = cluster(task["executors"], task["memory"], task.get("settings", {}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    try:
        found = run(task, spark)
        seconds = time.perf_counter() - begin
        size, working = shuffled(spark)
    finally:
        spark.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        json.dumps({**found, "seconds": seconds, "shuffle_bytes": size, "working": working, "driver_grew_bytes": grown})
    )


if __name__ == "__main__":
    main()
