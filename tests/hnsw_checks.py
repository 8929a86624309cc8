"""What tests of the index share: data, the definition of nearest, and what must hold of every graph."""

import threading
import time

import numpy as np

from anabranch.graph.hnsw import layout

WAIT_S = 20


def drawn(count, dim=16, seed=0, clusters=8):
    """Gaussian clusters, the same for every seed: float32 [count, dim]."""
    generator = np.random.default_rng(seed)
    centre = 2 * np.random.default_rng(99).standard_normal((clusters, dim))
    return (centre[generator.integers(0, clusters, count)] + generator.standard_normal((count, dim))).astype(np.float32)


def naive(vectors, queries, k, metric="l2", ids=None):
    """Every distance in float64, sorted by (distance, id)."""
    vectors, queries = np.asarray(vectors, np.float64), np.asarray(queries, np.float64)
    ids = np.arange(len(vectors)) if ids is None else np.asarray(ids)
    if metric == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    if metric == "l2":
        distance = ((queries[:, None] - vectors[None]) ** 2).sum(2)
    else:
        distance = 1 - queries @ vectors.T
    order = np.lexsort((np.broadcast_to(ids, distance.shape), distance))[:, :k]
    return ids[order], np.take_along_axis(distance, order, 1)


def recall(found, truth):
    """Share of the truth that was found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
    return sum(hits) / truth.size


def lists(index, level):
    """Links of a level, by slot."""
    held = index._storage
    found = {}
    for slot in np.flatnonzero(held.level[: held.count] >= level).tolist():
        row = held.links[slot] if level == 0 else held.upper[held.first[slot] + level - 1]
        end = int((row >= 0).sum())
        assert (row[end:] == -1).all()  # nothing behind the last link
        found[slot] = row[:end].tolist()
    return found


def check_graph(index):
    """The invariants of the spec."""
    held, graph = index._storage, index._storage.graph
    if not held.count:
        assert graph[layout.ENTRY] == graph[layout.TOP] == -1
        return
    levels = held.level[: held.count]
    assert levels[graph[layout.ENTRY]] == graph[layout.TOP] == levels.max()
    for level in range(int(graph[layout.TOP]) + 1):
        cap = 2 * index.M if level == 0 else index.M
        for slot, links in lists(index, level).items():
            assert len(links) <= cap
            assert slot not in links
            assert len(set(links)) == len(links)
            assert all(0 <= other < held.count and levels[other] >= level for other in links)


def graph_bytes(index):
    """All that a build decides."""
    return {name: array.tobytes() for name, array in index._storage.arrays().items()}


def thread(work):
    made = threading.Thread(target=work, daemon=True)
    made.start()
    return made


def waits(lock, number):
    """Until so many readers wait."""
    end = time.monotonic() + WAIT_S
    while len(lock._queue) < number:
        assert time.monotonic() < end
        time.sleep(0.001)


def wanted(lock, number):
    """Until so many writers wait."""
    end = time.monotonic() + WAIT_S
    while len(lock._writers) < number:
        assert time.monotonic() < end
        time.sleep(0.001)
