"""One contestant of `benchmarks/hnsw_disk.py` in a process of its own, told by a line of JSON: builds an index, or opens one and is asked.

Needs numpy and the contestant's package alone, so that each may have a Python of its own.
"""
# Shapes: N vectors, D dimension, Q queries

import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K, M, EF_CONSTRUCTION = 10, 16, 100
Search = Callable[[np.ndarray, int], np.ndarray]


# Contestants: how each builds an index of a file of vectors in a folder, and opens it


def build_ours(vectors: Path, folder: Path, memory: int) -> None:
    from anabranch.graph.disk import build

    held = np.load(vectors, mmap_mode="r")
    build(held, folder / "index.anb", memory=memory, M=M, ef_construction=EF_CONSTRUCTION, workers=1).close()


def open_ours(folder: Path, memory: int) -> Search:
    from anabranch.graph.disk import DiskIndex

    # No blocks in memory beside the codes: what is compared is reading them.
    index = DiskIndex(folder / "index.anb", workers=1)
    return lambda query_QD, ef: index.search(query_QD, K, ef)[0]


def build_usearch(vectors: Path, folder: Path, memory: int) -> None:
    from usearch.index import Index

    base_ND = np.load(vectors)
    index = Index(ndim=base_ND.shape[1], metric="l2sq", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCTION)
    index.add(np.arange(len(base_ND)), base_ND, threads=1)
    index.save(str(folder / "index.usearch"))


def open_usearch(folder: Path, memory: int) -> Search:
    from usearch.index import Index

    index = Index.restore(str(folder / "index.usearch"), view=True)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        index.expansion_search = ef
        return np.atleast_2d(index.search(query_QD, K, threads=1).keys.astype(np.int64))

    return search


def _build_faiss(vectors: Path, folder: Path, make: Callable[[Any, Any, int, int], Any]) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    base_ND = np.load(vectors, mmap_mode="r")
    count, dim = base_ND.shape
    lists = max(16, int(4 * count**0.5))
    index = make(faiss, faiss.IndexFlatL2(dim), dim, lists)
    draw = np.random.default_rng(0)
    index.train(np.asarray(base_ND[np.sort(draw.choice(count, min(count, 40 * lists), replace=False))]))
    on_disk = faiss.OnDiskInvertedLists(lists, index.code_size, str(folder / "lists.ivfdata"))
    index.replace_invlists(on_disk)
    for first in range(0, count, 20_000):
        index.add(np.asarray(base_ND[first : first + 20_000]))
    faiss.write_index(index, str(folder / "index.faiss"))


def build_ivf_flat(vectors: Path, folder: Path, memory: int) -> None:
    _build_faiss(vectors, folder, lambda faiss, rough, dim, lists: faiss.IndexIVFFlat(rough, dim, lists))


def build_ivf_pq(vectors: Path, folder: Path, memory: int) -> None:
    _build_faiss(vectors, folder, lambda faiss, rough, dim, lists: faiss.IndexIVFPQ(rough, dim, lists, _parts(dim), 8))


def _parts(dim: int) -> int:
    """As ours: a byte for 4 numbers, which must divide them."""
    return next(parts for parts in range(max(16, dim // 4), dim + 1) if dim % parts == 0)


def open_ivf_flat(folder: Path, memory: int) -> Search:
    index = _open_faiss(folder)

    def search(query_QD: np.ndarray, lists: int) -> np.ndarray:
        index.nprobe = lists
        return index.search(query_QD, K)[1]

    return search


def open_ivf_pq(folder: Path, memory: int) -> Search:
    """Its best 10 k are measured again by the vectors in their file, as ours are by blocks: codes alone stay below the recall asked for."""
    index, base_ND = _open_faiss(folder), np.load(folder.parent / "vectors.npy", mmap_mode="r")

    def search(query_QD: np.ndarray, lists: int) -> np.ndarray:
        index.nprobe = lists
        near = index.search(query_QD, 10 * K)[1]
        found = np.empty((len(query_QD), K), np.int64)
        for row, query in enumerate(query_QD):
            ids = np.sort(near[row][near[row] >= 0])
            far = ((base_ND[ids] - query) ** 2).sum(1)
            found[row] = np.pad(ids[np.argsort(far)[:K]], (0, max(0, K - len(ids))), constant_values=-1)
        return found

    return search


def _open_faiss(folder: Path) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)
    return faiss.read_index(str(folder / "index.faiss"))


def build_diskann(vectors: Path, folder: Path, memory: int) -> None:
    import diskannpy

    diskannpy.build_disk_index(
        np.load(vectors),
        "l2",
        str(folder),
        complexity=EF_CONSTRUCTION,
        graph_degree=2 * M,
        search_memory_maximum=memory / 2**30,
        build_memory_maximum=memory / 2**30,
        num_threads=1,
    )


def open_diskann(folder: Path, memory: int) -> Search:
    import diskannpy

    index = diskannpy.StaticDiskIndex(str(folder), num_threads=1, num_nodes_to_cache=0)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        return np.stack([index.search(query, K, max(ef, K), beam_width=4).identifiers for query in query_QD]).astype(
            np.int64
        )

    return search


CONTESTANTS: dict[str, tuple[str, Callable[..., None], Callable[..., Search], tuple[int, ...]]] = {
    # Package, build, open, and what the knob may be: of the walk, or how many lists are looked at.
    "ours": ("anabranch", build_ours, open_ours, (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)),
    "diskannpy": ("diskannpy", build_diskann, open_diskann, (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)),
    "usearch view": ("usearch", build_usearch, open_usearch, (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)),
    "faiss IVF-PQ on disk": ("faiss", build_ivf_pq, open_ivf_pq, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    "faiss IVF-Flat on disk": ("faiss", build_ivf_flat, open_ivf_flat, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
}


# What is measured


def drop(folder: Path) -> None:
    """Let the system forget what it has of the files of a folder and of the vectors beside it; pages that are mapped stay."""
    for path in [*folder.iterdir(), folder.parent / "vectors.npy"]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(folder: Path) -> int:
    """What the system's cache has of the same files."""
    return sum(_resident(path) for path in [*folder.iterdir(), folder.parent / "vectors.npy"])


def _resident(path: Path) -> int:
    size = path.stat().st_size
    if not size:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as held:
        marks = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(held, np.uint8)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(marks.ctypes.data)
        )
        del view
    return 0 if failed else int((marks & 1).sum()) * mmap.PAGESIZE


def resident() -> dict[str, float]:
    """MB of this process: arrays of its own, and pages of files that it has mapped."""
    with open("/proc/self/status") as file:
        fields = {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith("Rss")}
    return {"anon_mb": fields["RssAnon"] / 1024, "file_mb": fields["RssFile"] / 1024}


def recall(found_QK: np.ndarray, true_QK: np.ndarray) -> float:
    hits = sum(len(set(a) & set(b)) for a, b in zip(found_QK.tolist(), true_QK.tolist(), strict=True))
    return hits / true_QK.size


def sweep(search: Search, told: dict[str, Any]) -> list[tuple[int, float]]:
    """Knobs with their recall, up to the first that reaches the highest asked for."""
    query_QD, true_QK = np.load(told["queries"]), np.load(told["truth"])
    found: list[tuple[int, float]] = []
    for knob in told["knobs"]:
        found.append((knob, recall(search(query_QD, knob), true_QK)))
        if found[-1][1] >= told["target"]:
            break
    return found


def turn(opened: Callable[..., Search], folder: Path, told: dict[str, Any]) -> dict[str, float]:
    """One query after another, the system's cache empty; then the same again."""
    query_QD, seconds, before = np.load(told["queries"]), [], resident()
    drop(folder)
    search = opened(folder, told["memory"])
    # Once more: what opening read and did not keep.
    drop(folder)
    for _ in range(2):
        started = time.perf_counter()
        for number in range(len(query_QD)):
            search(query_QD[number : number + 1], told["knob"])
        seconds.append((time.perf_counter() - started) / len(query_QD))
    after = resident()
    return {
        "cold_ms": 1e3 * seconds[0],
        "warm_ms": 1e3 * seconds[1],
        "anon_mb": after["anon_mb"] - before["anon_mb"],
        "file_mb": after["file_mb"] - before["file_mb"],
        "cached_mb": cached_bytes(folder) / 2**20,
    }


def main() -> None:
    told = json.loads(sys.argv[1])
    folder, (package, build, opened, _) = Path(told["folder"]), CONTESTANTS[told["name"]]
    said: Any = __import__(package).__name__
    if package == "anabranch":
        # Kernels are read, as a library of another is: no part of an index, nor of a build.
        with tempfile.TemporaryDirectory() as other:
            few_ND = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)
            np.save(Path(other) / "vectors.npy", few_ND)
            build(Path(other) / "vectors.npy", Path(other), 16 << 20)
            opened(Path(other), 0)(few_ND[:3], 20)
    if told["do"] == "build":
        started = time.perf_counter()
        build(folder.parent / "vectors.npy", folder, told["memory"])
        said = {
            "seconds": time.perf_counter() - started,
            "disk_mb": sum(path.stat().st_size for path in folder.iterdir()) / 2**20,
        }
    elif told["do"] == "sweep":
        said = sweep(opened(folder, told["memory"]), told)
    elif told["do"] == "turn":
        said = turn(opened, folder, told)
    print("\n" + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
