"""A graph larger than any executor's memory, on a standalone cluster: two executors of 512 MiB, a driver of 256 MiB that may collect 1 MiB.

Executors and the Python that they call are processes of their own, whose memory is looked at while they work. What comes out is compared
with what this process finds, which holds the graph whole. Edges are undirected: files hold 12 million, the graph nearly twice as many.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from anabranch.graph import FastRP, Graph, PowerWalk
from anabranch.graph.fastrp.stored import StoredVectors
from anabranch.graph.fully_ppr import StoredScores, fully_ppr
from anabranch.graph.ppr import PageRank
from spark_graphs import need_spark

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EDGES, NODES, FILES = 12_000_000, 200_000, 10

# Of a stored edge where executors have it: two numbers of nodes and a weight, 64 bits each.
EDGE_BYTES = 24

# MiB of an executor's JVM, and of the driver's; 450 are the least that Spark takes, unless it is told that this is a test.
MEMORY, DRIVER = 512, 256
SETTINGS = {"spark.testing.reservedMemory": str(32 << 20), "spark.driver.maxResultSize": "1m"}

# That any of the estimates below is farther off than it may be, in all of a test.
CHANCE = 1e-6


def ends(number):
    """The edges of one file; the first nodes have more neighbours than a record takes."""
    rng, count = np.random.default_rng(number), EDGES // FILES
    source = (NODES * rng.random(count) ** 3).astype(np.int64)
    return source, rng.integers(0, NODES, count), rng.lognormal(0, 1, count).astype(np.float32)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of edges, and the graph here to compare with."""
    need_spark()
    folder = tmp_path_factory.mktemp("large") / "edges"
    folder.mkdir()
    parts = [ends(number) for number in range(FILES)]
    for number, (source, target, weight) in enumerate(parts):
        pq.write_table(pa.table({"source": source, "target": target, "weight": weight}), folder / f"{number}.parquet")
    return folder, Graph.from_edges(*(np.concatenate(column) for column in zip(*parts, strict=True)), num_nodes=NODES)


def run(system, large, out, **options):
    """On the cluster. No process of it may have held the graph."""
    folder, graph = large
    size = EDGE_BYTES * len(graph.indices)
    assert size > MEMORY << 20
    task = {
        "system": system,
        "edges": str(folder),
        "out": str(out),
        "executors": 2,
        "memory": MEMORY,
        "driver": DRIVER,
        "directed": False,
        "options": options,
        "settings": SETTINGS,
    }
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "spark_cluster.py"), json.dumps(task)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"system": system, "graph_bytes": size, **facts}))
    assert facts["working"] == 2
    peaks = facts["peaks"]
    assert set(peaks) == {"driver", "driver_java", "executor_java", "worker"}
    # All of Python with its libraries, and of it what the run took.
    assert peaks["driver"] < size
    assert facts["driver_grew_bytes"] < size / 8
    assert peaks["worker"] < size
    # JVMs hold some 300 MiB beside what they are given.
    assert DRIVER << 20 < size
    assert peaks["driver_java"] < (DRIVER + 384) << 20
    return facts


def check_share(found, exact, count, cells):
    """Shares of ``count`` independent draws against their chances, each of ``cells`` by Bernstein's inequality."""
    level = math.log(2 * cells / CHANCE)
    assert (np.abs(found - exact) <= np.sqrt(2 * exact * level / count) + 2 * level / (3 * count)).all()


def test_walks_on_a_graph_that_no_executor_holds(large, tmp_path):
    graph, sources, walks = large[1], [0, 7, 1000, NODES - 1], 200_000
    run("ppr", large, tmp_path / "out", alpha=0.8, walks=walks, gamma=walks, sources=sources, top_k=None)
    stored, exact = StoredScores(tmp_path / "out"), PageRank(0.8, "power", 1e-9)
    here = fully_ppr(graph, 0.8, walks, sources=sources, top_k=None, engine="local")
    assert stored.num_nodes == NODES
    for source in sources:
        score = exact.vector(graph, source)
        for result in (stored, here):
            found = np.zeros(NODES)
            ids, values = result.top(source)
            found[ids] = values
            assert found.sum() == pytest.approx(1, abs=1e-4)
            check_share(found, score, walks, len(sources) * NODES)


def test_an_index_of_a_graph_that_no_executor_holds(large, tmp_path):
    """Where all walks ended together, and how far fingerprints are from the truth, against an index that was built here."""
    graph, walks, alpha = large[1], 10, 0.8
    run("powerwalk", large, tmp_path / "out", alpha=alpha, walks=walks, mode="endpoint")
    table = pyarrow.dataset.dataset(tmp_path / "out", format="parquet").to_table()
    source, target, count, total = (table[name].to_numpy() for name in ("source", "target", "count", "total"))
    assert np.array_equal(np.bincount(source, count, NODES), np.full(NODES, walks))
    assert (total == walks).all()
    ended = np.bincount(target, count, NODES) / (NODES * walks)
    check_share(ended, PageRank(alpha, "power", 1e-9).scores(graph), NODES * walks, NODES)
    chosen = np.random.default_rng(0).choice(NODES, 20, replace=False)
    exact = PageRank(alpha, "power", 1e-9)
    whole = [exact.vector(graph, int(node)) for node in chosen]

    def error(index):
        """L1, of answers that go one step by the graph first."""
        rows = index.query_batch(chosen, rounds=1)
        return float(np.abs(rows.to_scipy().toarray() - whole).sum(1).mean())

    here = PowerWalk(alpha, walks, mode="endpoint").build(graph)
    assert error(PowerWalk.load(tmp_path / "out", graph)) < 1.1 * error(here)


def test_vectors_of_a_graph_that_no_executor_holds(large, tmp_path):
    graph = large[1]
    run("fastrp", large, tmp_path / "out", dim=8, weights=[0.5, 1.0])
    ids, vectors = StoredVectors(str(tmp_path / "out")).load()
    assert np.array_equal(ids, np.arange(NODES))
    assert np.abs(vectors - FastRP(8, (0.5, 1.0)).fit_transform(graph)).max() < 1e-5
