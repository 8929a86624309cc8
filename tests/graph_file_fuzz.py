"""Flips bits in every array of every format, opens the file (mapped and not) and works on what comes of it. A process of its own.

    python graph_file_fuzz.py FORMAT[,FORMAT] FLIPS SEED

Half of the files keep the checksums they had, as after a fault of the disk; the others get right ones, as if a foreign program had written
them. A case may end with DataError or come to its end; a signal ends this process. Prints how many did what, a line for each format.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.array_file import _header, write_arrays
from anabranch.graph.disk import DiskIndex, build
from anabranch.graph.fully_ppr import FullyPPRResult, fully_ppr
from anabranch.graph.hnsw import HNSW, ShardedHNSW
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.ppr import power_iteration
from anabranch.graph.rows import SparseRows

DRAW = np.random.default_rng(0)
GRAPH = Graph.from_edges(DRAW.integers(0, 38, 120), DRAW.integers(0, 38, 120), DRAW.random(120) + 0.1, True, 40)
VECTORS = DRAW.standard_normal((1300, 6)).astype(np.float32)


def use_graph(path, mmap):
    graph = Graph.load(path, mmap=mmap)
    power_iteration(graph, [0])
    PowerWalk(walks=3, workers=1).build(graph).query(1, top_k=3)


def use_walks(path, mmap):
    model = PowerWalk.load(path, GRAPH, mmap=mmap)
    for node in (0, 7, 39):
        model.query(node, top_k=5)
        model.query(node, rounds=2, eps=0)
    model.query_batch([1, 2, 3], top_k=4)
    model.update(GRAPH)


def use_result(path, mmap):
    found = FullyPPRResult.load(path, mmap=mmap)
    for source in range(0, 40, 13):
        found.top(source, 3)
    found.to_arrow()
    found.rows.top(2).take(np.arange(3))


def use_rows(path, mmap):
    rows = SparseRows.load(path, mmap=mmap)
    rows.top(2)
    rows.to_scipy()
    list(rows)


def use_index(path, mmap):
    index = HNSW.load(path, mmap=mmap)
    rows = VECTORS if index.metric != "hamming" else VECTORS.view(np.uint8)[:, :6]
    index.search(rows[:3], 5, 20)
    index.search(rows[:2], 2, filter=[1, 2, 3])
    index.remove(index.ids[:20])
    index.add(rows[:4])
    index.compact()
    index.search(rows[:3], 5, 20)


# Of the good file.
TRUE_IDS = []


def use_disk(path, mmap):
    """What is found is true: each block has a digest, so nobody makes good ones of bad ones but who writes the whole file."""
    with DiskIndex(path, mmap=mmap) as index:
        index.search(VECTORS[:3], 5, 20)
        index.search(VECTORS[:2], 2, filter=[1, 2, 3])
        index.search(VECTORS[:2], 2, filter=np.arange(1300) % 2 == 0)
        index.vectors([0, 1299])
        ids, distances = index.exact(VECTORS[:3], 5)
        found = ((index.vectors(ids.ravel()).reshape(3, 5, 6) - VECTORS[:3, None]) ** 2).sum(2)
        assert np.allclose(found, distances, rtol=1e-5)
        if not TRUE_IDS:
            TRUE_IDS.append(ids)
        assert np.array_equal(ids, TRUE_IDS[0])


def use_shards(path, mmap):
    index = ShardedHNSW.load(path, mmap=mmap)
    index.search(VECTORS[:3], 5, 20)
    index.add(VECTORS[:4])


def made(kind, path):
    """A good file of each format."""
    if kind == "graph":
        GRAPH.save(path)
    elif kind == "walks":
        PowerWalk(walks=20, workers=1).build(GRAPH).save(path)
    elif kind == "result":
        fully_ppr(GRAPH, walks=20).save(path)
    elif kind == "rows":
        SparseRows.from_rows([([1, 2], [0.5, 0.25]), ([], []), ([3], [1.0])], 5).save(path)
    elif kind == "hnsw-b1":
        index = HNSW(48, "hamming", M=4, ef_construction=12, workers=1)
        index.add(VECTORS.view(np.uint8)[:, :6])
        index.remove(np.arange(5))
        index.save(path)
    elif kind in ("hnsw-pq", "hnsw-int4"):
        index = HNSW(6, M=4, ef_construction=12, quantization=kind[5:], workers=1)
        index.add(VECTORS)
        index.remove(np.arange(5))
        index.save(path)
    elif kind.startswith("hnsw"):
        index = HNSW(6, M=4, ef_construction=12, dtype=kind[5:], workers=1)
        index.add(VECTORS)
        index.remove(np.arange(5))
        index.save(path)
    elif kind == "disk":
        build(VECTORS, path, M=4, ef_construction=12, code_bytes=3, workers=1).close()
    else:
        index = ShardedHNSW(6, 2, workers=1)
        index.add(VECTORS[:300])
        index.save(path)


USES = {
    "graph": use_graph,
    "walks": use_walks,
    "result": use_result,
    "rows": use_rows,
    "hnsw-f32": use_index,
    "hnsw-i8": use_index,
    "hnsw-f16": use_index,
    "hnsw-b1": use_index,
    "hnsw-pq": use_index,
    "hnsw-int4": use_index,
    "shards": use_shards,
    "disk": use_disk,
}


def main(kind, flips, seed):
    draw, told = np.random.default_rng(seed), {"refused": 0, "used": 0}
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good.anb", Path(folder) / "bad.anb"
        made(kind, good)
        USES[kind](good, False)
        header, start = _header(good)
        whole = good.read_bytes()
        spans = [(entry, start + entry["offset"]) for entry in header["arrays"] if np.prod(entry["shape"])]
        for number in range(flips):
            entry, place = spans[draw.integers(len(spans))]
            size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
            data, at = bytearray(whole), place + int(draw.integers(size))
            data[at] ^= 1 << int(draw.integers(8))
            bad.write_bytes(data)
            if number % 2:
                arrays = {
                    one["name"]: np.frombuffer(
                        bytes(data), one["dtype"], int(np.prod(one["shape"])), start + one["offset"]
                    )
                    .reshape(one["shape"])
                    .copy()
                    for one in header["arrays"]
                }
                write_arrays(bad, header["kind"], arrays, header["meta"], header["version"])
            try:
                USES[kind](bad, bool(draw.integers(2)))
                told["used"] += 1
            except (DataError, InputError):
                told["refused"] += 1
    print(json.dumps({"format": kind, **told}), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        main(name, int(sys.argv[2]), int(sys.argv[3]))
