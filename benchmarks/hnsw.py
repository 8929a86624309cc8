"""How many queries does a second of one core answer at recall 0.95, and how long does a build take, beside hnswlib, faiss and usearch?

All with M = 16, ef_construction 100, one thread, processor time, in turns. First recall at every ef must be within 0.01 of hnswlib's.
Then each contestant gets the smallest ef that reaches recall 0.95 of the 10 nearest, and runs at that. Rows with a short dtype measure
their best results again in float32. Two threads are timed by the clock; so are the first call with an empty cache of compiled kernels
and with a full one, whose peer is the most that is allowed (15 s, 1.5 s). Bytes per element stand beside their formula.

Bars: queries and build at least 1.0 times hnswlib (float32); two threads at least 1.7 times one. faiss-cpu and usearch take part where they
are installed; MNIST where ANABRANCH_DATA names its folder. Packed bits run against faiss' binary index and usearch's b1, where found is
what is as near as the tenth nearest; codes (pq, int4) against faiss' codes of as many bytes, both with their best measured again.
Vectors of one's own: ``--vectors FILE.npy`` (rows; the last 1,000 are queries).

    python benchmarks/hnsw.py --json benchmarks/results/hnsw.json
"""
# Shapes: N vectors, D dimension, Q queries

import gzip
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from _harness import arguments, finish, peak_megabytes, start
from anabranch.graph.hnsw import HNSW, brute_force

K, M, EF_CONSTRUCTION, TARGET, AS_GOOD = 10, 16, 100, 0.95, 0.01
EFS = (10, 20, 40, 80, 160)
Search = Callable[[np.ndarray, int], np.ndarray]


# Contestants: build(vectors) -> search(queries, ef) -> ids


def ours(dtype: str = "f32", threads: int = 1) -> Callable[[np.ndarray], Search]:
    def build(base_ND: np.ndarray) -> Search:
        index = HNSW(base_ND.shape[1], M=M, ef_construction=EF_CONSTRUCTION, dtype=dtype, num_threads=threads)
        index.add(base_ND)
        return lambda query_QD, ef: index.search(query_QD, K, ef)[0]

    return build


def ours_of_bits(base_ND: np.ndarray) -> Search:
    index = HNSW(8 * base_ND.shape[1], "hamming", M=M, ef_construction=EF_CONSTRUCTION, num_threads=1)
    index.add(base_ND)
    return lambda query_QD, ef: index.search(query_QD, K, ef)[0]


def faiss_of_bits(base_ND: np.ndarray) -> Search:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexBinaryHNSW(8 * base_ND.shape[1], M)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    index.add(base_ND)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        index.hnsw.efSearch = ef
        return index.search(query_QD, K)[1]

    return search


def usearch_of_bits(base_ND: np.ndarray) -> Search:
    from usearch.index import Index

    index = Index(
        ndim=8 * base_ND.shape[1], metric="hamming", dtype="b1", connectivity=M, expansion_add=EF_CONSTRUCTION
    )
    index.add(np.arange(len(base_ND)), base_ND, threads=1)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        index.expansion_search = ef
        return index.search(query_QD, K, threads=1).keys.astype(np.int64)

    return search


def ours_of_codes(quantization: str) -> Callable[[np.ndarray], Search]:
    def build(base_ND: np.ndarray) -> Search:
        index = HNSW(base_ND.shape[1], M=M, ef_construction=EF_CONSTRUCTION, quantization=quantization, num_threads=1)
        index.add(base_ND)
        return lambda query_QD, ef: index.search(query_QD, K, ef)[0]

    return build


def faiss_of_codes(quantization: str) -> Callable[[np.ndarray], Search]:
    """Of as many bytes, and all that a walk holds is measured again."""

    def build(base_ND: np.ndarray) -> Search:
        import faiss

        faiss.omp_set_num_threads(1)
        dim = base_ND.shape[1]
        inner = (
            faiss.IndexHNSWPQ(dim, dim // 4, M)
            if quantization == "pq"
            else faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_4bit, M)
        )
        inner.hnsw.efConstruction = EF_CONSTRUCTION
        index = faiss.IndexRefineFlat(inner)
        index.train(base_ND[:32768])
        index.add(base_ND)

        def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
            inner.hnsw.efSearch, index.k_factor = ef, ef / K
            return index.search(query_QD, K)[1]

        return search

    return build


def with_hnswlib(base_ND: np.ndarray) -> Search:
    import hnswlib

    index = hnswlib.Index("l2", base_ND.shape[1])
    index.init_index(len(base_ND), M=M, ef_construction=EF_CONSTRUCTION)
    index.add_items(base_ND, num_threads=1)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        index.set_ef(ef)
        return index.knn_query(query_QD, K, num_threads=1)[0].astype(np.int64)

    return search


def with_faiss(base_ND: np.ndarray) -> Search:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(base_ND.shape[1], M)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    index.add(base_ND)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        index.hnsw.efSearch = ef
        return index.search(query_QD, K)[1]

    return search


def with_usearch(base_ND: np.ndarray) -> Search:
    from usearch.index import Index

    index = Index(ndim=base_ND.shape[1], metric="l2sq", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCTION)
    index.add(np.arange(len(base_ND)), base_ND, threads=1)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        index.expansion_search = ef
        return index.search(query_QD, K, threads=1).keys.astype(np.int64)

    return search


PEERS = {"hnswlib": with_hnswlib, "faiss": with_faiss, "usearch": with_usearch}
OF_BITS = {"faiss": faiss_of_bits, "usearch": usearch_of_bits}


# Data


def clusters(count: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    centre_CD = generator.standard_normal((200, dim), np.float32)
    total = count + num_queries
    drawn_ND = generator.standard_normal((total, dim), np.float32) + centre_CD[generator.integers(0, 200, total)]
    return drawn_ND[num_queries:], drawn_ND[:num_queries]


def mnist() -> np.ndarray | None:
    place = Path(os.environ.get("ANABRANCH_DATA", "")) / "images" / "mnist_t10k_images.idx3.gz"
    if not place.is_file():
        return None
    return np.frombuffer(gzip.decompress(place.read_bytes())[16:], np.uint8).reshape(-1, 784).astype(np.float32)


def cases(options: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    count = 5_000 if options.quick else 50_000
    yield f"clusters {count:,} x 128", *clusters(count, 128, 200 if options.quick else 2000)
    digits_ND = mnist()
    if digits_ND is None:
        print("MNIST left out: ANABRANCH_DATA names no folder with images/mnist_t10k_images.idx3.gz", file=sys.stderr)
    elif not options.quick:
        yield "MNIST 9,000 x 784", digits_ND[1000:], digits_ND[:1000]
    if options.vectors:
        own_ND = np.load(options.vectors).astype(np.float32)
        yield f"{options.vectors.stem} {len(own_ND) - 1000:,} x {own_ND.shape[1]}", own_ND[:-1000], own_ND[-1000:]


# Measuring


def recall(found_QK: np.ndarray, truth_QK: np.ndarray) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found_QK.tolist(), truth_QK.tolist(), strict=True)]
    return sum(hits) / truth_QK.size


def least_ef(search: Search, query_QD: np.ndarray, score: Callable[[np.ndarray], float]) -> tuple[int, float]:
    """The smallest ef that reaches the target (recall rises with ef but for noise), and the recall there."""
    low, high = K - 1, K
    while score(search(query_QD, high)) < TARGET:
        low, high = high, 2 * high
        if high > len(query_QD) * 100:
            raise SystemExit("recall 0.95 is out of reach")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if score(search(query_QD, middle)) >= TARGET else (middle, high)
    return high, score(search(query_QD, high))


def race(
    case: str,
    mine: Callable[[], Any],
    peers: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float],
    **facts: Any,
) -> list[dict[str, Any]]:
    """Everyone takes a turn in each round; one row per peer."""
    contestants = {"ours": mine, **peers}
    memory = {name: peak_megabytes(work) for name, work in contestants.items()}  # and the warm-up
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: 1 if turn % 2 else -1]:
            begin = clock()
            contestants[name]()
            times[name].append(clock() - begin)
    rows = []
    for name in peers:
        ratios = [theirs / own for theirs, own in zip(times[name], times["ours"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            row(
                f"{case}, {name}",
                1e3 * statistics.median(times["ours"]),
                1e3 * statistics.median(times[name]),
                "ms",
                name,
                statistics.median(ratios),
                high - low,
                memory_ours_mb=round(memory["ours"], 1),
                memory_peer_mb=round(memory[name], 1),
                **facts,
            )
        )
    return rows


def row(
    case: str,
    mine: float,
    peer: float,
    unit: str,
    name: str,
    ratio: float | None = None,
    spread: float = 0.0,
    **facts: Any,
) -> dict[str, Any]:
    ratio = peer / mine if ratio is None else ratio
    print(f"{case:<58} ours {mine:11.2f} {unit}   {name:<10} {peer:11.2f} {unit}   ratio {ratio:5.2f}", file=sys.stderr)
    return {
        "case": case,
        "ours": round(mine, 4),
        "peer": round(peer, 4),
        "ratio": round(ratio, 3),
        "spread": round(spread, 3),
        "unit": unit,
        "peer_name": name,
        **facts,
    }


def measure(case: str, base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """Recall first, then queries, then the build."""
    truth_QK = brute_force(base_ND, query_QD, K)[0]
    peers = {name: build for name, build in PEERS.items() if importlib.util.find_spec(name)}
    searches = {name: build(base_ND) for name, build in peers.items()}
    mine = {dtype: ours(dtype)(base_ND) for dtype in ("f32", "f16", "i8")}
    for ef in EFS:
        found = {name: recall(search(query_QD, ef), truth_QK) for name, search in {**mine, **searches}.items()}
        print(
            f"  recall at ef {ef:3}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()),
            file=sys.stderr,
        )
        behind = [name for name in mine if found[name] < found.get("hnswlib", 0.0) - AS_GOOD]
        if behind and not options.quick:
            raise SystemExit(f"{case}: recall of {behind[0]} at ef {ef} is more than {AS_GOOD} below hnswlib's")
    rows = at_target(case, mine, searches, query_QD, lambda found_QK: recall(found_QK, truth_QK), options)
    for dtype in ("f32", "i8"):
        works = {name: lambda build=build: build(base_ND) for name, build in peers.items()}  # type: ignore[misc]
        rounds = min(options.rounds, 3)
        rows += race(
            f"{case}, build, {dtype}", lambda dtype=dtype: ours(dtype)(base_ND), works, rounds, time.process_time
        )  # type: ignore[misc]
    return rows


def at_target(
    case: str,
    mine: dict[str, Search],
    searches: dict[str, Search],
    query_QD: np.ndarray,
    score: Callable[[np.ndarray], float],
    options: Any,
) -> list[dict[str, Any]]:
    """Queries of each of ours against the peers, each at the smallest ef that reaches the target."""
    rows = []
    at = {name: least_ef(search, query_QD, score) for name, search in {**mine, **searches}.items()}
    for name in mine:
        rows += race(
            f"{case}, queries, {name}",
            lambda name=name: mine[name](query_QD, at[name][0]),  # type: ignore[misc]
            {peer: lambda peer=peer: searches[peer](query_QD, at[peer][0]) for peer in searches},  # type: ignore[misc]
            options.rounds,
            time.process_time,
            ef=at[name][0],
            recall=round(at[name][1], 4),
            queries_per_second=None,
        )
    for one in rows:
        one["queries_per_second"] = round(len(query_QD) / (one["ours"] / 1e3))
        one["peer_queries_per_second"] = round(len(query_QD) / (one["peer"] / 1e3))
        one["peer_ef"], one["peer_recall"] = at[one["peer_name"]][0], round(at[one["peer_name"]][1], 4)
    return rows


def bits(base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """Two bits of each number, whether it is above 0 and above 1, packed; many are equally far, so distances say who was found."""
    base_NB, query_QB = (np.packbits(np.concatenate([rows > 0, rows > 1], 1), axis=1) for rows in (base_ND, query_QD))
    far_QK = brute_force(base_NB, query_QB, K, "hamming")[1]

    def score(found_QK: np.ndarray) -> float:
        differ_QK = np.unpackbits(base_NB[found_QK] ^ query_QB[:, None], axis=2).sum(2)
        return float((differ_QK <= far_QK[:, -1:]).mean())

    builds = {name: build for name, build in OF_BITS.items() if importlib.util.find_spec(name)}
    searches = {name: build(base_NB) for name, build in builds.items()}
    case = f"bits {len(base_NB):,} x {8 * base_NB.shape[1]}"
    rows = at_target(case, {"hamming": ours_of_bits(base_NB)}, searches, query_QB, score, options)
    works = {name: lambda build=build: build(base_NB) for name, build in builds.items()}  # type: ignore[misc]
    rounds = min(options.rounds, 3)
    return rows + race(f"{case}, build", lambda: ours_of_bits(base_NB), works, rounds, time.process_time)


def codes(case: str, base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """A walk over codes whose best are measured again."""
    truth_QK = brute_force(base_ND, query_QD, K)[0]
    rows = []
    for quantization in ("pq", "int4"):
        mine = {quantization: ours_of_codes(quantization)(base_ND)}
        peers = {"faiss": faiss_of_codes(quantization)(base_ND)} if importlib.util.find_spec("faiss") else {}
        rows += at_target(case, mine, peers, query_QD, lambda found_QK: recall(found_QK, truth_QK), options)
    return rows


def two_threads(base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """By the clock, so on a quiet machine."""
    one, two = (ours(threads=threads)(base_ND) for threads in (1, 2))
    rounds = min(options.rounds, 5)
    clock = time.perf_counter
    builds = ours(threads=2), ours()
    rows = race("two threads, build", lambda: builds[0](base_ND), {"one thread": lambda: builds[1](base_ND)}, 3, clock)
    return rows + race(
        "two threads, queries", lambda: two(query_QD, 40), {"one thread": lambda: one(query_QD, 40)}, rounds, clock
    )


FIRST = """
import time
import numpy as np
from anabranch.graph.hnsw import HNSW
begin = time.perf_counter()
index = HNSW(16, num_threads=1)
index.add(np.eye(16))
index.search(np.eye(16), 3)
print(time.perf_counter() - begin, time.process_time())
"""


def first_call() -> list[dict[str, Any]]:
    """Compiling, and reading what was compiled, in processes of their own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        seconds = [
            float(
                subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, check=True).stdout
            )
            for _ in range(2)
        ]
    return [
        row("first add and search, empty cache", seconds[0], 15.0, "s", "bar"),
        row("first add and search, from the cache", seconds[1], 1.5, "s", "bar"),
    ]


def memory(base_ND: np.ndarray) -> list[dict[str, Any]]:
    """Bytes per element against row + 8 M + 4 M / (M - 1) + 17 (links above level 0; id, level, place, mark), + 8 of int8 (scale, norm)."""
    rows = []
    for dtype, size in (("f32", 4), ("f16", 2), ("i8", 1)):
        index = HNSW(base_ND.shape[1], M=M, ef_construction=20, dtype=dtype, rerank=False)
        index.add(base_ND)
        row_bytes = -(-base_ND.shape[1] * size // 64) * 64
        formula = row_bytes + 8 * M + 4 * M / (M - 1) + 17 + 8 * (dtype == "i8")
        rows.append(
            row(f"bytes per element, {dtype}", index.stats()["size_bytes"] / len(base_ND), formula, "bytes", "formula")
        )
    for quantization, size in (("pq", base_ND.shape[1] // 4), ("int4", base_ND.shape[1] / 2 + 8)):
        index = HNSW(base_ND.shape[1], M=M, ef_construction=20, quantization=quantization)
        index.add(base_ND)
        rows.append(row(f"bytes of a code, {quantization}", index.stats()["code_bytes"], size, "bytes", "formula"))
    return rows


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument(
        "--vectors", type=Path, metavar="FILE", help="vectors of one's own, .npy, the last 1,000 of them queries"
    )
    options = parser.parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    if options.only in "first add and search":
        rows += first_call()
    for case, base_ND, query_QD in cases(options):
        if options.only in case or options.only in "queries, build":
            rows += measure(case, base_ND, query_QD, options)
        if options.only in f"{case}, queries, pq, int4":
            rows += codes(case, base_ND, query_QD, options)
        if not any(one["case"].startswith("bits") for one in rows) and options.only in "bits, queries, build":
            rows += bits(base_ND, query_QD, options)
        if not rows or not any(one["case"].startswith("two threads") for one in rows):
            rows += two_threads(base_ND, query_QD, options) if options.only in "two threads" else []
            rows += memory(base_ND[:20_000]) if options.only in "bytes per element" else []
    peers = [
        package for package in ("hnswlib", "faiss-cpu", "usearch") if importlib.util.find_spec(package.split("-")[0])
    ]
    finish("hnsw", rows, options, ("numpy", "numba", "anabranch", *peers))


if __name__ == "__main__":
    main()
