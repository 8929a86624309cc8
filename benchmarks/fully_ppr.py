"""What does PageRank from every node cost, against a loop over the nodes with fast-pagerank, igraph or scikit-network?

Processor time of one thread for all sources of a graph, the 50 best of each, everything that is prepared included. Peers take a small
sample of the sources and their time is scaled up (``peer_share`` says which part), and so do we in the exact mode. Each peer has the
loosest of its tolerances at which its mean L1 error on the sample is at most ours, so that accuracy is equal (igraph has none to set and
is exact), and must rank its best, as ours does. Errors are of whole rows, against scores exact to 1e-8. Bars: all sources by
decomposition in 1/100 of the best peer's time on DBLP; the exact mode no slower than the best exact peer.

With pyspark and Java there are two more rows: both plans of the cluster engine on this machine, wall-clock, against the embedded engine.
They say what Spark costs here, nothing about a cluster.

    python benchmarks/fully_ppr.py --threads 1 --json benchmarks/results/fully_ppr.json

Peers that are not installed are left out and named; ``pip install fast-pagerank scikit-network igraph`` has them all.
"""
# Shapes: N nodes, S sources

import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from _harness import arguments, finish, peak_megabytes, start
from anabranch.graph import Graph
from anabranch.graph.fully_ppr import FullyPPR, fully_ppr
from anabranch.graph.rows import top_of_dense
from anabranch.studies.fully_ppr import ALPHA, exact_rows, graph_of, l1_error, overlap, sample_of

BEST = 50
TOLERANCES = [10.0**-power for power in range(1, 11)]
SPARK_WALKS = 50
PACKAGES = {"fast-pagerank": "fast_pagerank", "igraph": "igraph", "scikit-network": "sknetwork"}
Scores = Callable[[int], np.ndarray]


def fast(graph: Graph) -> Callable[[float], Scores]:
    from fast_pagerank import pagerank_power

    matrix = csr_matrix(graph.to_scipy(np.float64))

    def at(tol: float) -> Scores:
        def scores(node: int) -> np.ndarray:
            start_N = np.zeros(graph.num_nodes)
            start_N[node] = 1
            return pagerank_power(matrix, p=1 - ALPHA, personalize=start_N, tol=tol)

        return scores

    return at


def igraph(graph: Graph) -> Callable[[float], Scores]:
    import igraph

    source, target, weight = graph.edges()
    made = igraph.Graph(graph.num_nodes, np.stack([source, target], 1).tolist(), directed=graph.is_directed)
    weights = None if weight is None else weight.tolist()
    return lambda tol: (
        lambda node: np.array(made.personalized_pagerank(damping=1 - ALPHA, reset_vertices=node, weights=weights))
    )


def sknetwork(graph: Graph) -> Callable[[float], Scores]:
    from sknetwork.ranking import PageRank

    matrix = csr_matrix(graph.to_scipy(np.float64))

    def at(tol: float) -> Scores:
        model = PageRank(damping_factor=1 - ALPHA, solver="piteration", n_iter=1000, tol=tol)
        return lambda node: model.fit_predict(matrix, weights={node: 1.0})

    return at


PEERS = {"fast-pagerank": fast, "igraph": igraph, "scikit-network": sknetwork}


def usable(graph: Graph, source_S: np.ndarray, exact_SN: np.ndarray, error: float) -> dict[str, Scores]:
    """Peers at the loosest tolerance at which their mean L1 error is at most ``error``; those that never get there are named."""
    found = {}
    for name, make in PEERS.items():
        if not importlib.util.find_spec(PACKAGES[name]):
            print(f"{name} is not installed and left out", file=sys.stderr)
            continue
        at = make(graph)
        for tol in TOLERANCES:
            scores = at(tol)
            off = [np.abs(scores(int(node)) - exact_N).sum() for node, exact_N in zip(source_S, exact_SN, strict=True)]
            if np.mean(off) <= error:
                found[name] = scores
                break
        else:
            print(f"{name} does not get to an error of {error:.1e} and is left out", file=sys.stderr)
    return found


def case(name: str, options: dict[str, Any], rounds: int, peer_sources: int, sample: int) -> dict[str, Any]:
    """A row: all sources of a graph by one method, against the quickest peer of at least its accuracy."""
    graph = graph_of(name, 0)
    options = {"alpha": ALPHA, "workers": 1, **options}
    source_S = sample_of(graph, sample, 0)
    exact_SN = exact_rows(graph, source_S)
    whole = fully_ppr(graph, top_k=None, sources=source_S, **options)
    error = np.mean(
        [l1_error(*whole.top(int(node)), exact_N) for node, exact_N in zip(source_S, exact_SN, strict=True)]
    )
    peers = usable(graph, source_S[:10], exact_SN[:10], max(float(error), 1e-7))
    shared: list[float] = []

    def ours() -> Any:
        return fully_ppr(graph, top_k=BEST, **options, sources=None if options["method"] != "exact" else source_S)

    def theirs(scores: Scores) -> float:
        begin = time.process_time()
        for node in source_S[:peer_sources]:
            top_of_dense(scores(int(node)), BEST)
        return (time.process_time() - begin) * graph.num_nodes / len(source_S[:peer_sources])

    memory = peak_megabytes(ours)  # also the warm-up
    found = ours()
    shared = [overlap(found.top(int(node))[0], exact_N, BEST) for node, exact_N in zip(source_S, exact_SN, strict=True)]
    times: dict[str, list[float]] = {"ours": [], **{peer: [] for peer in peers}}
    for _ in range(rounds):
        times["ours"].append(all_seconds(graph, options))
        for peer, scores in peers.items():
            times[peer].append(theirs(scores))
    accuracy = {"l1_error": float(error), "overlap_at_50": float(np.mean(shared))}
    label = f"{name}, {options['method']}, all {graph.num_nodes:,} sources"
    return {
        **_row(label, times, "ours"),
        **accuracy,
        "peer_share": peer_sources / graph.num_nodes,
        "memory_ours_mb": round(memory, 1),
    }


def all_seconds(graph: Graph, options: dict[str, Any]) -> float:
    """Processor seconds of ours for all sources. Exact solutions cost about the same each: two samples give that, and what is prepared."""

    def seconds(count: int | None) -> float:
        sources = None if count is None else sample_of(graph, count, 1)
        begin = time.process_time()
        fully_ppr(graph, top_k=BEST, sources=sources, **options)
        return time.process_time() - begin

    if options["method"] != "exact" or graph.num_nodes < 5000:
        return seconds(None)
    few, more = seconds(50), seconds(550)
    return few + (more - few) / 500 * (graph.num_nodes - 50)


def _row(label: str, times: dict[str, list[float]], mine: str) -> dict[str, Any]:
    """Medians and the ratio against the quickest other contestant, round by round."""
    others = {name: statistics.median(values) for name, values in times.items() if name != mine}
    best = min(others, key=lambda name: others[name])
    ratios = [theirs / ours for theirs, ours in zip(times[best], times[mine], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    row = {
        "case": label,
        "ours": round(1e3 * statistics.median(times[mine]), 2),
        "peer": round(1e3 * others[best], 2),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": best,
        "peers_ms": {name: round(1e3 * value, 1) for name, value in others.items()},
        "memory_peer_mb": 0.0,
    }
    print(
        f"{label:<44} ours {row['ours']:11.1f} ms   {best} {row['peer']:13.1f} ms   ratio {row['ratio']:8.2f}",
        file=sys.stderr,
    )
    return row


def spark_rows(name: str, rounds: int) -> list[dict[str, Any]]:
    """Both plans on all cores of this machine against the embedded engine, same walks, wall-clock; and what they do a second."""
    if (
        importlib.util.find_spec("pyspark") is None
        or importlib.util.find_spec("pandas") is None
        or not shutil.which("java")
    ):
        print("pyspark, pandas or Java is missing: no rows of Spark", file=sys.stderr)
        return []
    from anabranch.graph.fully_ppr.session import session

    graph = graph_of(name, 0)
    options: dict[str, Any] = {"alpha": ALPHA, "walks": SPARK_WALKS, "method": "walks", "top_k": BEST}
    rows = []
    with session() as spark:
        for plan in ("broadcast", "partitioned"):
            times: dict[str, list[float]] = {"spark": [], "embedded": []}
            for turn in range(rounds + 1):
                begin = time.perf_counter()
                model = FullyPPR(engine="spark", plan=plan, spark=spark, big_moves=3, **options).fit(graph)
                middle = time.perf_counter()
                local = fully_ppr(graph, engine="local", **options)
                if turn:  # the first starts Spark's workers
                    times["spark"].append(middle - begin)
                    times["embedded"].append(time.perf_counter() - middle)
            if plan == "broadcast" and not np.array_equal(model.result_.rows.values, local.rows.values):
                raise SystemExit("the broadcast plan differs from the embedded engine")
            if plan == "partitioned" and not np.allclose(
                model.result_.rows.sums().mean(), local.rows.sums().mean(), rtol=0.02
            ):
                raise SystemExit("the partitioned plan differs from the embedded engine")
            seconds = statistics.median(times["spark"])
            row = _row(f"Spark, {plan}, {name}, {SPARK_WALKS} walks (clock)", times, "spark")
            rate = {"sources_per_s": graph.num_nodes / seconds, "walks_per_s": graph.num_nodes * SPARK_WALKS / seconds}
            rows.append({**row, **rate, "rounds": len(model.rounds_), "memory_ours_mb": 0.0})
    return rows


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--no-spark", action="store_true", help="leave out the rows of Spark")
    options = parser.parse_args()
    start(options)
    names = ["power-2000"] if options.quick else ["dblp", "ppi", "blogcatalog"]
    rounds = min(options.rounds, 2 if options.quick else 5)
    peer_sources, sample = (10, 20) if options.quick else (20, 100)
    methods: list[dict[str, Any]] = [
        {"method": "decompose", "rounds": 2},
        {"method": "walks", "walks": 1000, "estimator": "fullpath"},
        {"method": "exact", "tol": 1e-6},
    ]
    chosen = [(name, method) for name in names for method in methods if options.only in f"{name}, {method['method']}"]
    rows = [case(name, method, rounds, peer_sources, sample) for name, method in chosen]
    if not options.no_spark and options.only in "Spark":
        rows += spark_rows("power-500" if options.quick else "power-10680", 1)
    finish("fully_ppr", rows, options, ("numpy", "numba", "anabranch"))


if __name__ == "__main__":
    main()
