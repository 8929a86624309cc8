"""What tests of graphs on Spark share: a session where there is one, and edges in Parquet."""

import importlib.util
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MARKS = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::ResourceWarning")]


def with_spark(test):
    """Marks of a test that starts Java."""
    for mark in MARKS:
        test = mark(test)
    return test


def need_spark():
    """Skip where the extra or Java is missing."""
    if importlib.util.find_spec("pyspark") is None or importlib.util.find_spec("pandas") is None:
        pytest.skip("pyspark or pandas is not installed (extra: spark)")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("there is no Java")


def random_edges(seed=0, nodes=40, edges=160, names=None):
    """source, target, weight: some given twice, some loops, some nodes without edges out."""
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, nodes - 4, edges), rng.integers(0, nodes, edges)
    source, target = np.append(source, 0), np.append(target, nodes - 1)
    weight = rng.lognormal(0, 1, edges + 1).astype(np.float32)
    if names is not None:
        source, target = (np.array([names(node) for node in of.tolist()], object) for of in (source, target))
    return source, target, weight


def write_edges(folder, source, target, weight=None, files=2):
    """A folder of Parquet files. Gives its path as text."""
    folder.mkdir()
    kind = pa.string() if isinstance(source[0], str) else pa.int64()
    columns = {"src": pa.array(list(source), kind), "dst": pa.array(list(target), kind)}
    if weight is not None:
        columns["weight"] = weight
    table = pa.table(columns)
    size = -(-len(table) // files)
    for number in range(files):
        pq.write_table(table.slice(number * size, size), folder / f"edges-{number}.parquet")
    return str(folder)
