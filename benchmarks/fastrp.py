"""How fast is FastRP against the published code, the package fastrp and other methods at equal terms, and does it take the memory it says?

Contestants, one thread each:

    published      GTmac/FastRP's way, written anew: scikit-learn's sparse projection in 64 bits, sparse products, dense sums
    published, dense     the same, kindly made dense after the first product
    fastrp (pip)   the package of that name (Rust), where it is installed
    tuned          DeepWalk (PecanPy and gensim), ProNE, RandNE and fastrp (pip), see `benchmarks/_embeddings.py`

First, ours is compared with the published way on one and the same projection, entry by entry; then F1 of all (micro, 10%, C = 0.1)
must agree within 0.01. Times are of whole runs.

Tuned rows compare methods at equal terms: the same number of columns, the same classifier (columns standardised, C = 0.1 and C = 1, of
which each takes what its trials liked better), and settings of each chosen by the same rule. A tenth of the nodes is kept for tuning
alone: every setting is scored there (half trained on, half tested, two shuffles), and the best is run and tested on the other nodes (a
tenth trained on, three shuffles). Processor time counts all of it but the last test: trials, their classifiers and the final run.
DeepWalk's trials take 10 walks a node, its final run 80.

Bars: 3 times the published, 1 time the package, 100 times DeepWalk, all tuned, with an F1 of at least its own less 0.01. Memory rows give
the measured peak as ``ours`` and that of `FastRP.peak_bytes` as ``peer``, in MB: a ratio of 1 or above is right. Growth rows give
nanoseconds per edge and column, without a peer.

    python benchmarks/fastrp.py --json benchmarks/results/fastrp.json
    python benchmarks/fastrp.py --write-graph blog.npz      # for benchmarks/_skip_gram.py, which benchmarks/graphvite.py needs
    python benchmarks/fastrp.py --only 20,000,000 --large   # 20 million edges, 128 columns
"""
# Shapes: N nodes, D dim

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import numpy as np
from scipy.sparse import csr_array, diags_array

from _embeddings import Method, methods, package, pip_work
from _harness import arguments, compare, finish, peak_megabytes, start
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.evaluate import classify_nodes
from anabranch.graph.fastrp import FastRP
from anabranch.graph.generate import barabasi_albert
from anabranch.graph.projection import sparse_rows

WEIGHTS, BETA = (0.0, 0.0, 1.0, 6.67), -0.64
SAME_F1 = 0.01

# Of the classifier, tried by all.
CS = (0.1, 1.0)

# Of a tuned method, in its row.
KEPT = ("micro_f1", "macro_f1", "C", "setting", "trials")


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
        "fastrp (pip)": None if package() is None else pip_work(matrix, dim, WEIGHTS[-1], 0),
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


def tuned_rows(name: str, dim: int, options: Any) -> list[dict[str, Any]]:
    """One row per method that `methods` knows, against FastRP by its own `FastRP.tune`."""
    data = load_dataset(name)
    labels_NC = csr_array(data.labels_NC).astype(bool)
    labelled = np.flatnonzero(np.diff(labels_NC.indptr))
    aside = np.random.default_rng(99).permutation(labelled)[: len(labelled) // 10]
    tuning_NC, test_NC = _only(labels_NC, aside), _only(labels_NC, np.setdiff1d(labelled, aside))
    best = {"FastRP": _tuned_fastrp(data.graph, tuning_NC, test_NC, dim, options)}
    for method in methods():
        if options.only in f"tuned, {name}, {dim} columns, {method.name}":
            best[method.name] = _tuned(method, data.graph, tuning_NC, test_NC, dim, options)
    mine, rows = best.pop("FastRP"), []
    for peer, theirs in best.items():
        row = {
            "case": f"tuned, {name}, {dim} columns, {peer}",
            "ours": round(1e3 * mine["cpu_s"], 1),
            "peer": round(1e3 * theirs["cpu_s"], 1),
            "ratio": round(theirs["cpu_s"] / mine["cpu_s"], 3),
            "spread": None,
            "unit": "CPU ms",
            "peer_name": peer,
            **{key: mine[key] for key in KEPT},
            **{f"peer_{key}": theirs[key] for key in KEPT},
        }
        if mine["micro_f1"] < theirs["micro_f1"] - SAME_F1:
            row["missed"] = f"its F1 is {theirs['micro_f1']}, ours {mine['micro_f1']}"
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def _only(labels_NC: Any, nodes: np.ndarray) -> Any:
    """Labels of these nodes; the others have none."""
    kept_N = np.zeros(labels_NC.shape[0], bool)
    kept_N[nodes] = True
    return csr_array(diags_array(kept_N.astype(np.float64)) @ labels_NC).astype(bool)


def _tuned_fastrp(graph: Graph, tuning_NC: Any, test_NC: Any, dim: int, options: Any) -> dict[str, Any]:
    """`FastRP.tune` for each C, as many trials as it has by default, at full width; then the better one's run."""
    begin = time.process_time()
    trials = 4 if options.quick else 20
    found = {}
    for C in CS:
        found[C] = ours(dim).tune(
            graph,
            tuning_NC,
            trials=trials,
            dim=dim,
            orders=(4, 5, 6),
            train_fraction=0.5,
            shuffles=(0, 1),
            C=C,
            objective="micro_f1",
        )
    C = max(found, key=lambda one: max(trial.score for trial in found[one].trials))
    model = found[C].best
    embedding_ND = model.fit_transform(graph)
    seconds = time.process_time() - begin
    setting = f"beta {model.beta:.2f}, weights {tuple(round(weight, 2) for weight in model.weights)}"
    return _told(embedding_ND, test_NC, C, seconds, setting, trials)


def _tuned(method: Method, graph: Graph, tuning_NC: Any, test_NC: Any, dim: int, options: Any) -> dict[str, Any]:
    """The best of a method's settings and of both C on the nodes kept for that, run once more in full."""
    settings = dict(list(method.settings.items())[: 2 if options.quick else None])
    # What it compiles or loads is not its work.
    method.make(barabasi_albert(200, 3), 8, next(iter(settings.values())), 0)
    begin, trial, scores = time.process_time(), method.trial or method.make, {}
    for label, setting in settings.items():
        vectors_ND = _standard(trial(graph, dim, setting, 0))
        for C in CS:
            found = classify_nodes(vectors_ND, tuning_NC, train_fraction=0.5, seeds=(0, 1), C=C)
            scores[label, C] = found.micro
    label, C = max(scores, key=lambda one: scores[one])
    is_quick = options.quick and method.trial is not None
    make = trial if is_quick else method.make
    embedding_ND = _standard(make(graph, dim, settings[label], 0))
    seconds = time.process_time() - begin
    return _told(embedding_ND, test_NC, C, seconds, label, len(settings))


def _standard(vectors_ND: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1: the classifier's penalty depends on the scale."""
    return (vectors_ND - vectors_ND.mean(0)) / np.maximum(vectors_ND.std(0), 1e-30)


def _told(
    embedding_ND: np.ndarray, test_NC: Any, C: float, seconds: float, setting: str, trials: int
) -> dict[str, Any]:
    return {**quality(embedding_ND, test_NC, C), "cpu_s": seconds, "C": C, "setting": setting, "trials": trials}


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
            {
                "case": f"growth, {edges:,} edges, 128 columns",
                "ours": round(1e9 * min(times) / edges / 128, 3),
                "peer": None,
                "ratio": None,
                "spread": None,
                "unit": "ns per edge and column",
                "peer_name": None,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    rows.append(
        {
            "case": "growth, slope of log time over log edges",
            "ours": round(slope, 3),
            "peer": 1.0,
            "ratio": round(1 / slope, 3),
            "spread": None,
            "unit": "",
            "peer_name": "linear",
        }
    )
    return rows


def main() -> None:
    parser = arguments("FastRP against the published code, the package fastrp and skip-gram on walks")
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--write-graph", type=Path, metavar="FILE", help="write BlogCatalog for _skip_gram.py, and stop"
    )
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
    for name in ("ppi", *(() if options.quick else ("blogcatalog",))):
        if f"tuned, {name}" in options.only or options.only in f"tuned, {name}":
            rows += tuned_rows(name, 128, options)
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
