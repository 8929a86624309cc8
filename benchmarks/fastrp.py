"""How fast is FastRP against the published code, the package fastrp and skip-gram on walks, and does it take the memory it says?

Contestants, one thread each:

    published      GTmac/FastRP's way, written anew: scikit-learn's sparse projection in 64 bits, sparse products, dense sums
    published, dense     the same, kindly made dense after the first product
    fastrp (pip)   the package of that name (Rust), where it is installed
    skip-gram      PecanPy and gensim, from the folder of a run of benchmarks/_skip_gram.py (``--skip-gram FOLDER``)

First, ours is compared with the published way on one and the same projection, entry by entry; then F1 of all (micro, 10%, C = 0.1)
must agree within 0.01. Times are of whole runs. Bars: 3 times the published, 1 time the package, 150 times skip-gram's processor time
at equal quality. Memory rows give the measured peak as ``ours`` and that of `FastRP.peak_bytes` as ``peer``, in MB: a ratio of 1 or
above is right. Growth rows give nanoseconds per edge and column, without a peer.

    python benchmarks/fastrp.py --json benchmarks/results/fastrp.json
    python benchmarks/fastrp.py --write-graph blog.npz      # then, anywhere with pecanpy and gensim:
    python benchmarks/_skip_gram.py blog.npz walks          # about 5 minutes of processor time
    python benchmarks/fastrp.py --skip-gram walks --json benchmarks/results/fastrp.json
    python benchmarks/fastrp.py --only 20,000,000 --large   # 20 million edges, 128 columns
"""
# Shapes: N nodes, D dim

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import numpy as np
from scipy.sparse import csr_array, diags_array

from _harness import arguments, compare, finish, peak_megabytes, start
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.evaluate import classify_nodes
from anabranch.graph.fastrp import FastRP
from anabranch.graph.generate import barabasi_albert
from anabranch.graph.projection import sparse_rows

WEIGHTS, BETA = (0.0, 0.0, 1.0, 6.67), -0.64
SAME_F1 = 0.01


def published(matrix: csr_array, dim: int, seed: int, dense: bool, random_ND: Any = None) -> np.ndarray:
    """Transition matrix, degrees in the projection, powers, rows normalised, weighted sum, columns scaled; on ``random_ND`` if given."""
    from sklearn.preprocessing import normalize, scale
    from sklearn.random_projection import SparseRandomProjection

    degree_N = np.asarray(matrix.sum(axis=1)).ravel()
    safe_N = np.where(degree_N > 0, degree_N, 1.0)
    walk = diags_array(1 / safe_N) @ matrix
    if random_ND is None:
        projection = SparseRandomProjection(n_components=dim, random_state=seed).fit(walk)
        random_ND = projection.components_.T
    power = walk @ (diags_array(safe_N**BETA) @ csr_array(random_ND))
    power = power.toarray() if dense else power
    total = np.zeros((matrix.shape[0], dim))
    for number, weight in enumerate(WEIGHTS):
        power = walk @ power if number else power
        if weight or not dense:  # the published code normalises and adds all of them
            unit = normalize(power, axis=1)
            total += weight * (unit if dense else unit.toarray())
    return scale(total)


def package(matrix: csr_array, dim: int, seed: int) -> Callable[[], np.ndarray] | None:
    """The package fastrp with the same weights (it knows no beta and does not standardise)."""
    found = sys.path
    sys.path = [
        path for path in found if Path(path).resolve() != Path(__file__).resolve().parent
    ]  # this file has its name
    try:
        import fastrp
    except ImportError:
        return None
    finally:
        sys.path = found
    model = fastrp.FastRP(dim, list(WEIGHTS), seed=seed, undirected=False)
    return lambda: model.fit_transform(matrix)


def ours(dim: int, seed: int = 0, **options: Any) -> FastRP:
    return FastRP(dim, WEIGHTS, BETA, seed=seed, threads=1, **options)


def check_equal(name: str, graph: Graph, dim: int) -> None:
    """The same numbers as the published way on our projection."""
    s = 64.0
    random_ND = sparse_rows(np.arange(graph.num_nodes, dtype=np.uint64), 0, dim, s, 0).to_scipy()
    theirs = published(graph.to_scipy(np.float64), dim, 0, dense=True, random_ND=random_ND)
    mine = ours(dim, s=s).fit_transform(graph)
    error = float(np.abs(mine - theirs).max())
    if not error < 2e-3:
        raise SystemExit(f"{name}: ours differs from the published way by {error:.1e}")
    print(f"{name}: ours equals the published way on one projection to {error:.1e}", file=sys.stderr)


def quality(embedding_ND: np.ndarray, labels: Any, C: float = 0.1) -> dict[str, float]:
    scores = classify_nodes(embedding_ND, labels, train_fraction=0.1, seeds=(0, 1, 2), C=C)
    return {"micro_f1": round(scores.micro, 4), "macro_f1": round(scores.macro, 4)}


def speed_rows(name: str, dim: int, options: Any) -> list[dict[str, Any]]:
    """One row per peer."""
    data = load_dataset(name)
    matrix = data.graph.to_scipy(np.float64)
    check_equal(name, data.graph, 64)
    mine = ours(dim)
    own = quality(mine.fit_transform(data.graph), data.labels_NC)
    peers: dict[str, Callable[[], np.ndarray] | None] = {
        "published": lambda: published(matrix, dim, 0, dense=False),
        "published, dense": lambda: published(matrix, dim, 0, dense=True),
        "fastrp (pip)": package(matrix, dim, 0),
    }
    rows = []
    for peer, work in peers.items():
        case = f"{name}, {dim} columns, {peer}"
        if work is None or options.only not in case:
            continue
        vectors = work()
        if peer == "fastrp (pip)":  # as all others: the classifier's penalty depends on the scale
            vectors = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-30)
        theirs = quality(vectors, data.labels_NC)
        if peer != "fastrp (pip)" and abs(theirs["micro_f1"] - own["micro_f1"]) > SAME_F1:
            raise SystemExit(f"{case}: micro F1 of ours {own['micro_f1']}, of the peer {theirs['micro_f1']}")
        row = compare(case, lambda: mine.fit_transform(data.graph), {peer: work}, rounds=options.rounds)
        rows.append({**row, **own, "peer_micro_f1": theirs["micro_f1"], "peer_macro_f1": theirs["macro_f1"]})
    return rows


def skip_gram_row(folder: Path, options: Any) -> dict[str, Any]:
    """Processor seconds of a run that was made before, over those of ours; F1 of both."""
    data, state = load_dataset("blogcatalog"), json.loads((folder / "state.json").read_text())
    mine = ours(512)
    embedding_ND = mine.fit_transform(data.graph)
    times = []
    for _ in range(options.rounds):
        started = time.process_time()
        mine.fit_transform(data.graph)
        times.append(time.process_time() - started)
    theirs = quality(np.load(folder / "vectors.npy"), data.labels_NC, C=1.0)
    seconds = state["walk_cpu_s"] + state["train_cpu_s"]
    ratios = [seconds / least for least in times]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    row = {
        "case": f"blogcatalog, against {10 * state['done']} walks a node",
        "ours": round(1e3 * statistics.median(times), 2),
        "peer": round(1e3 * seconds, 1),
        "ratio": round(statistics.median(ratios), 1),
        "spread": round(high - low, 1),
        "unit": "CPU ms",
        "peer_name": "PecanPy + gensim",
        **quality(embedding_ND, data.labels_NC),
        "peer_micro_f1": theirs["micro_f1"],
        "peer_macro_f1": theirs["macro_f1"],
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def memory_row(case: str, graph: Graph, model: FastRP) -> dict[str, Any]:
    """Measured peak and formula."""
    model.fit(barabasi_albert(100, 3))  # kernels are loaded before
    started = time.perf_counter()
    cpu = time.process_time()
    measured = peak_megabytes(lambda: model.fit(graph))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    formula = model.peak_bytes(graph.num_nodes, len(graph.indices), graph.weights is not None) / 2**20
    row = {
        "case": case,
        "ours": round(measured, 1),
        "peer": round(formula, 1),
        "ratio": round(formula / measured, 3) if measured else None,
        "spread": None,
        "unit": "MB",
        "peer_name": "formula",
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def growth_rows(options: Any) -> list[dict[str, Any]]:
    """Time per edge and column, least of a few runs, and the slope of log time over log edges."""
    sizes = (10_000, 100_000) if options.quick else (10_000, 30_000, 100_000, 300_000, 1_000_000)
    rows, seconds = [], []
    for edges in sizes:
        graph, model = barabasi_albert(edges // 10 + 10, 10), ours(128)
        model.fit(graph)
        times = []
        for _ in range(3 if options.quick else 7):
            started = time.process_time()
            model.fit(graph)
            times.append(time.process_time() - started)
        seconds.append(min(times))
        rows.append(
            {"case": f"growth, {edges:,} edges, 128 columns", "ours": round(1e9 * min(times) / edges / 128, 3), "peer": None,
             "ratio": None, "spread": None, "unit": "ns per edge and column", "peer_name": None}
        )  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    rows.append({"case": "growth, slope of log time over log edges", "ours": round(slope, 3), "peer": 1.0,
                 "ratio": round(1 / slope, 3), "spread": None, "unit": "", "peer_name": "linear"})  # fmt: skip
    return rows


def main() -> None:
    parser = arguments("FastRP against the published code, the package fastrp and skip-gram on walks")
    parser.set_defaults(threads=1)
    parser.add_argument("--skip-gram", type=Path, metavar="FOLDER", help="a finished run of benchmarks/_skip_gram.py")
    parser.add_argument("--write-graph", type=Path, metavar="FILE", help="write BlogCatalog for that run, and stop")
    parser.add_argument("--large", action="store_true", help="also 20 million edges")
    options = parser.parse_args()
    start(options)
    if options.write_graph:
        graph = load_dataset("blogcatalog").graph
        source_E, target_E, _ = graph.edges()
        np.savez(options.write_graph, source=source_E, target=target_E, num_nodes=graph.num_nodes)
        return
    rows: list[dict[str, Any]] = []
    for name, dim in (("ppi", 512), *(() if options.quick else (("blogcatalog", 512), ("dblp", 128)))):
        if not options.only or any(
            options.only in f"{name}, {dim} columns, {p}" for p in ("published", "published, dense", "fastrp (pip)")
        ):
            rows += speed_rows(name, dim, options)
    if options.skip_gram:
        rows.append(skip_gram_row(options.skip_gram, options))
    sizes = [100_000] if options.quick else [1_000_000]
    for edges in [*sizes, *([20_000_000] if options.large else [])]:
        case = f"peak memory, {edges:,} edges, 128 columns"
        if options.only in case:
            rows.append(memory_row(case, barabasi_albert(edges // 10 + 10, 10), ours(128)))
    if options.only in "growth":
        rows += growth_rows(options)
    finish("fastrp", rows, options, ("numpy", "scipy", "numba", "scikit-learn", "anabranch"))


if __name__ == "__main__":
    main()
