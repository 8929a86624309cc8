"""What do Fully PPR, PowerWalk's index and FastRP cost from edges in Parquet on Spark, at 1, 2 and 4 executors?

Each run is a standalone cluster of this machine in a process of its own (`local-cluster`): executors are JVMs of one core and
``--memory`` MiB. A row has nodes, stored edges, partitions, shuffled bytes, seconds at each number of executors, and what a graph of a
billion stored edges would take *on paper*. For that, one executor also has a quarter of the edges: what the two runs have in common is the
cost of having Spark at all, and the rest, as shuffled bytes, goes with stored edges (walks: with walks and rounds, which stay the same).
It says nothing about networks, stragglers or failures. More executors than cores of this machine show no gain: ``cores`` says how many
there are.

    python benchmarks/graph_spark.py --json benchmarks/results/graph_spark.json

Needs the extra ``spark`` and Java 17. Twelve runs, one to two minutes each on two cores that do nothing else.
"""
# Shapes: M stored edges

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from _harness import arguments, finish, start
from anabranch import machine

ROOT = Path(__file__).resolve().parents[1]
EXECUTORS = (1, 2, 4)
BILLION = 1_000_000_000

# Of a run: the arguments, and what its work is in proportion to beside stored edges.
SYSTEMS: dict[str, dict[str, Any]] = {
    "fastrp": {"dim": 64, "weights": [0, 0, 1, 6]},
    "ppr": {"alpha": 0.3, "walks": 20, "gamma": 20, "top_k": 50},
    "powerwalk": {"alpha": 0.3, "walks": 10},
}


def write_edges(folder: Path, nodes: int, edges: int, files: int = 8) -> None:
    """Edges of a power law, with weights."""
    folder.mkdir()
    for number in range(files):
        rng = np.random.default_rng(number)
        count = edges // files
        columns = {
            "source": (nodes * rng.random(count) ** 2).astype(np.int64),
            "target": rng.integers(0, nodes, count),
            "weight": rng.lognormal(0, 1, count).astype(np.float32),
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")


def once(system: str, edges: Path, executors: int, memory: int, partitions: int) -> dict[str, Any]:
    """One run on a cluster of its own; what `tests/spark_cluster.py` prints, and the facts of the result."""
    with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
        out = Path(folder) / "out"
        task = {
            "system": system,
            "edges": str(edges),
            "out": str(out),
            "executors": executors,
            "memory": memory,
            "options": {**SYSTEMS[system], "partitions": partitions},
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "spark_cluster.py"), json.dumps(task)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{system} on {executors} executors: {done.stderr.strip().splitlines()[-1]}")
        facts = json.loads((out / "_anabranch.json").read_text())
        of = facts.get("graph", facts.get("facts", {}))
        return {
            **json.loads(done.stdout.splitlines()[-1]),
            "num_nodes": of["num_nodes"],
            "stored": of["num_stored_edges"],
        }


def on_paper(many: int, many_s: float, few: int, few_s: float, shuffled: float) -> dict[str, float]:
    """What a billion stored edges would take, from runs of one executor on many and on few.

    Args:
        many, few: stored edges. many_s, few_s: seconds.
        shuffled: bytes, of the many.
    """
    slope_s = max(many_s - few_s, 0.0) / (many - few)
    start_s = max(many_s - slope_s * many, 0.0)
    return {
        "shuffle_tb": round(shuffled / many * BILLION / 1e12, 2),
        "core_hours": round((start_s + slope_s * BILLION) / 3600, 1),
        "start_s": round(start_s, 1),
    }


def row(system: str, edges: Path, few: Path, memory: int, partitions: int, rounds: int) -> dict[str, Any]:
    """All numbers of executors, and one of them on few edges, in turns; medians."""
    found: dict[int, list[dict[str, Any]]] = {executors: [] for executors in (0, *EXECUTORS)}
    for _ in range(rounds):
        for executors in found:
            run = once(system, edges if executors else few, executors or 1, memory, partitions)
            found[executors].append(run)
            print(
                f"{system:<10} {executors or 1} executors {run['stored']:>12,} edges {run['seconds']:8.1f} s"
                f"  {run['shuffle_bytes'] / 1e6:9.1f} MB",
                file=sys.stderr,
            )
    seconds = {executors: float(np.median([run["seconds"] for run in runs])) for executors, runs in found.items()}
    last, small = found[1][-1], found[0][-1]
    size, stored = float(np.median([run["shuffle_bytes"] for run in found[1]])), last["stored"]
    return {
        "case": f"{system}, {last['num_nodes']:,} nodes, {stored:,} stored edges",
        "ours": round(seconds[2], 1),
        "peer": round(seconds[1], 1),
        "ratio": round(seconds[1] / seconds[2], 2),
        "unit": "s",
        "peer_name": "two executors beside one",
        "num_nodes": last["num_nodes"],
        "stored_edges": stored,
        "partitions": partitions,
        "executor_mb": memory,
        "cores": machine.usable_cores(),
        "settings": SYSTEMS[system],
        "seconds": {str(executors): round(seconds[executors], 1) for executors in EXECUTORS},
        "speedup": {str(executors): round(seconds[1] / seconds[executors], 2) for executors in EXECUTORS},
        "few_edges": {"stored": small["stored"], "seconds": round(seconds[0], 1)},
        "shuffle_mb": round(size / 1e6, 1),
        "shuffle_bytes_per_edge": round(size / stored, 1),
        "driver_grew_mb": round(last["driver_grew_bytes"] / 1e6, 1),
        "rounds": last.get("rounds"),
        "billion_on_paper": on_paper(stored, seconds[1], small["stored"], seconds[0], size),
    }


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    # Many would take an hour.
    parser.set_defaults(rounds=1)
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="of an executor (default 1024)")
    parser.add_argument("--edges", type=int, default=2_000_000, help="edges (default 2,000,000; with --quick 50,000)")
    options = parser.parse_args()
    start(options)
    if importlib.util.find_spec("pyspark") is None or not shutil.which("java"):
        print("pyspark or Java is missing: nothing to measure", file=sys.stderr)
        return
    edges = 50_000 if options.quick else options.edges
    rounds = 1 if options.quick else min(options.rounds, 3)
    with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
        place, few = Path(folder) / "edges", Path(folder) / "few"
        for where, count in ((place, edges), (few, edges // 4)):
            write_edges(where, max(count // 20, 100), count)
        rows = [row(system, place, few, options.memory, 8, rounds) for system in SYSTEMS if options.only in system]
    finish("graph_spark", rows, options, ("numpy", "pyspark", "pyarrow", "anabranch"))


if __name__ == "__main__":
    main()
