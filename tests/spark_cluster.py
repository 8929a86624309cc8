"""A program for tests: one system on a cluster of executors with little memory each, in a process and a JVM of its own.

    python tests/spark_cluster.py '{"system": "ppr", "edges": "...", "out": "...", "executors": 2, "memory": 512, "options": {...}}'

Prints JSON: seconds, shuffled bytes, executors that worked, how much the driver's own memory grew, and the most memory that a process of
each kind held (resident bytes): ``driver``, ``driver_java``, ``executor_java``, and ``worker``, the Python that an executor calls.
"""

import json
import os
import re
import resource
import sys
import threading
import time
from pathlib import Path

import anabranch
import anabranch.graph.fastrp.from_edges  # before memory is looked at
import anabranch.graph.fully_ppr.walk_index
from anabranch.graph import FastRP, PowerWalk
from anabranch.graph.fully_ppr import EdgeFiles, FullyPPR


def cluster(executors, memory, settings, driver=512):
    """A session on a standalone cluster of this machine: executors are JVMs of ``memory`` MiB and one core, the driver's has ``driver``."""
    from pyspark.sql import SparkSession

    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    os.environ["PYSPARK_SUBMIT_ARGS"] = f"--driver-memory {driver}m pyspark-shell"
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


class Peaks(threading.Thread):
    """Looks at this process and all below it, again and again, for the most that each kind has held."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes_of, self.over = {}, threading.Event()

    def run(self):
        while not self.over.wait(0.2):
            self.look()

    def look(self):
        """Once. The system keeps each process's peak, so only what lives shorter than the pause is missed."""
        above = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = (folder / "status").read_text()
                words = (folder / "cmdline").read_text().split("\0")
            except OSError:  # it has just ended
                continue
            peak = re.search(r"(?m)^VmHWM:\s+(\d+) kB$", status)
            parent = int(re.search(r"(?m)^PPid:\s+(\d+)$", status)[1])
            above[int(folder.name)] = parent, words, 1024 * int(peak[1]) if peak else 0
        for number, (_, words, peak) in above.items():
            kind = self.kind(number, above, words)
            if kind is not None:
                self.bytes_of[kind] = max(peak, self.bytes_of.get(kind, 0))

    def kind(self, number, above, words):
        """Of a process; None of what is not ours."""
        if number == os.getpid():
            return "driver"
        line = set()
        while number in above and number not in line:
            line.add(number)
            number = above[number][0]
        if os.getpid() not in line:
            return None
        if any("CoarseGrainedExecutorBackend" in word for word in words):
            return "executor_java"
        if any(word.startswith("pyspark.daemon") or word.startswith("pyspark.worker") for word in words):
            return "worker"
        return "driver_java" if any("SparkSubmit" in word for word in words) else None


def shuffled(spark):
    """Bytes that executors wrote for shuffles, and how many of them finished tasks."""
    listed = spark.sparkContext._jsc.sc().statusStore().executorList(False)
    executors = [listed.apply(place) for place in range(listed.size())]
    working = [one for one in executors if one.id() != "driver"]
    return sum(one.totalShuffleWrite() for one in working), sum(one.completedTasks() > 0 for one in working)


def run(task, spark):
    edges = EdgeFiles(task["edges"], directed=task.get("directed", True))
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
    peaks = Peaks()
    peaks.start()
    spark = cluster(task["executors"], task["memory"], task.get("settings", {}), task.get("driver", 512))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    try:
        found = run(task, spark)
        seconds = time.perf_counter() - begin
        size, working = shuffled(spark)
        peaks.over.set()
        peaks.join()
        peaks.look()
    finally:
        spark.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    told = {
        **found,
        "seconds": seconds,
        "shuffle_bytes": size,
        "working": working,
        "driver_grew_bytes": grown,
        "peaks": peaks.bytes_of,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
