"""On a standalone cluster: two executors that are JVMs of their own with 256 MiB each, and a driver that may collect 1 MiB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anabranch.graph import FastRP, read_graph
from anabranch.graph.fastrp.stored import StoredVectors
from spark_graphs import need_spark

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# 450 MiB are the least that Spark takes, unless it is told that this is a test.
SMALL = {"spark.testing.reservedMemory": str(32 << 20), "spark.driver.maxResultSize": "1m"}


def test_vectors_are_those_of_one_machine(tmp_path):
    need_spark()
    rng, count, nodes = np.random.default_rng(0), 40_000, 20_000
    (tmp_path / "edges").mkdir()
    columns = {
        "source": (nodes * rng.random(count) ** 3).astype(np.int64), "target": rng.integers(0, nodes, count),
        "weight": rng.lognormal(0, 1, count).astype(np.float32),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "edges" / "0.parquet")
    task = {
        "system": "fastrp", "edges": str(tmp_path / "edges"), "out": str(tmp_path / "out"), "executors": 2, "memory": 256,
        "options": {"dim": 8, "weights": [1.0], "partitions": 2}, "settings": SMALL,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "spark_cluster.py"), json.dumps(task)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["working"] == 2
    assert facts["shuffle_bytes"] > 0
    graph = read_graph(tmp_path / "edges" / "0.parquet", directed=True)
    ids, vectors = StoredVectors(str(tmp_path / "out")).load()
    assert np.array_equal(ids, graph.names)
    assert np.abs(vectors - FastRP(8, (1.0,)).fit_transform(graph)).max() < 1e-5
