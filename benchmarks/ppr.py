"""How fast is personalised PageRank, exact and from an index, against fast-pagerank, igraph, networkx and scikit-network?

Processor time of one thread. Every contestant gets its graph in its own form beforehand, and the loosest of its tolerances at which
the L1 distance to a power iteration of 1e-13 is within the given error at every source; one that never gets there does not take
part. Ours must prove the error and is checked against it. What ours prepares once per graph stands in ``prepare_ms``, and a row of its
own asks what a first query costs with it. A unit of work is the same four sources.

    python benchmarks/ppr.py --threads 1 --json benchmarks/results/ppr.json

Peers that are not installed are left out and named; ``pip install fast-pagerank scikit-network igraph networkx`` has them all.
"""
# Shapes: N nodes

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from _harness import arguments, compare, finish, peak_megabytes, start
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.ppr import PageRank, Transition, power_iteration, prepare

ALPHA, BEST, SOURCES = 0.15, 50, 4
GRAPHS = ("dblp", "dblp_weighted", "ppi", "blogcatalog")
TOLERANCES = [10.0**-power for power in range(2, 13)]
PEERS = {"fast-pagerank": "fast_pagerank", "igraph": "igraph", "networkx": "networkx", "scikit-network": "sknetwork"}
Scores = Callable[[int], np.ndarray]


def peers(graph: Graph) -> Iterator[tuple[str, Callable[[float], Scores]]]:
    """Name of a contestant, and a function that makes dense scores of a node at a tolerance."""
    num_nodes = graph.num_nodes
    matrix = csr_matrix(graph.to_scipy(np.float64))
    if importlib.util.find_spec("fast_pagerank"):
        from fast_pagerank import pagerank_power

        def fast(tol: float) -> Scores:
            def scores(node: int) -> np.ndarray:
                start_N = np.zeros(num_nodes)
                start_N[node] = 1
                return pagerank_power(matrix, p=1 - ALPHA, personalize=start_N, tol=tol)

            return scores

        yield "fast-pagerank", fast
    if importlib.util.find_spec("igraph"):
        import igraph

        # igraph counts a loop of an undirected graph twice; in both directions, every edge counts as stored.
        one_way = graph.is_directed or graph.num_self_loops > 0
        source, target, weight = graph.edges()
        if one_way:
            source = np.repeat(np.arange(num_nodes), graph.degree_N)
            target, weight = graph.indices, graph.weights
        made = igraph.Graph(num_nodes, np.stack([source, target], 1), directed=one_way)
        if weight is not None:
            made.es["weight"] = weight.tolist()
        name = None if weight is None else "weight"
        yield (
            "igraph",
            lambda tol: (
                lambda node: np.array(
                    made.personalized_pagerank(damping=1 - ALPHA, reset_vertices=[node], weights=name)
                )
            ),
        )
    if importlib.util.find_spec("networkx"):
        import networkx

        kind = networkx.DiGraph if graph.is_directed else networkx.Graph
        drawn = networkx.from_scipy_sparse_array(matrix, create_using=kind)

        def plain(tol: float) -> Scores:
            def scores(node: int) -> np.ndarray:
                found = networkx.pagerank(drawn, 1 - ALPHA, {node: 1.0}, max_iter=500, tol=tol / num_nodes)
                return np.fromiter(found.values(), np.float64, num_nodes)

            return scores

        yield "networkx", plain
    if importlib.util.find_spec("sknetwork"):
        from sknetwork.ranking import PageRank as Ranking

        for solver in ("piteration", "diteration", "bicgstab", "lanczos", "RH"):

            def scikit(tol: float, solver: str = solver) -> Scores:
                ranking = Ranking(1 - ALPHA, solver, n_iter=500, tol=tol)
                return lambda node: ranking.fit_predict(matrix, weights={node: 1.0})

            yield f"scikit-network, {solver}", scikit


def accurate(graph: Graph, truth: dict[int, np.ndarray], error: float) -> dict[str, Scores]:
    """Peers at the loosest tolerance that keeps within ``error`` at every source."""
    found: dict[str, Scores] = {}
    for name, make in peers(graph):
        for tol in TOLERANCES:
            scores = make(tol)
            if all(np.abs(scores(node) - truth_N).sum() <= error for node, truth_N in truth.items()):
                found[name] = scores
                break
        else:
            print(f"{name}: no tolerance gives an error of {error:g}", file=sys.stderr)
    return found


def all_of(scores: Callable[[int], Any], nodes: list[int]) -> Callable[[], None]:
    def work() -> None:
        for node in nodes:
            scores(node)

    return work


def best_of(scores: Scores) -> Callable[[int], np.ndarray]:
    return lambda node: np.argpartition(-scores(node), BEST)[:BEST]


def exact_rows(name: str, graph: Graph, options: Any) -> Iterator[dict[str, Any]]:
    nodes = np.random.default_rng(0).permutation(np.flatnonzero(graph.degree_N))[:SOURCES].tolist()
    truth = {node: power_iteration(graph, node, tol=1e-13) for node in nodes}
    transition = Transition(graph, ALPHA)
    prepare(transition)
    begin = time.process_time()
    factor = prepare(transition)
    prepare_ms = 1e3 * (time.process_time() - begin)
    facts = {"nodes": graph.num_nodes, "edges": graph.num_edges, "prepare_ms": round(prepare_ms, 1)}
    facts |= {
        "core_nodes": len(factor.core.diagonal_C),
        "factor_mb": round(factor.nbytes / 2**20, 2),
        "sources": SOURCES,
    }
    for error in (1e-4, 1e-6):
        ours = PageRank(ALPHA, tol=error)
        worst = max(np.abs(ours.vector(graph, node) - truth_N).sum() for node, truth_N in truth.items())
        if worst > error:
            raise SystemExit(f"{name}: ours is {worst:.1e} off, and {error:g} was promised")
        contestants = accurate(graph, truth, error)
        works = {peer: all_of(scores, nodes) for peer, scores in contestants.items()}

        def solved(ours: PageRank = ours) -> None:
            for node in nodes:
                ours.vector(graph, node)

        row = compare(
            f"{name}: one source, L1 error {error:g}", solved, works, rounds=options.rounds, clock=time.process_time
        )
        yield {**row, **facts, "l1_ours": worst}
        if error == 1e-4:
            once = {peer: (lambda scores=scores: scores(nodes[0])) for peer, scores in contestants.items()}
            row = compare(
                f"{name}: the first source, preparing included",
                lambda: PageRank(ALPHA, tol=1e-4).vector(graph, nodes[0]),
                once,
                rounds=options.rounds,
                clock=time.process_time,
            )
            yield {**row, **facts}


def index_rows(name: str, graph: Graph, options: Any) -> Iterator[dict[str, Any]]:
    nodes = np.random.default_rng(0).permutation(np.flatnonzero(graph.degree_N))[:SOURCES].tolist()
    truth = {node: power_iteration(graph, node, tol=1e-13) for node in nodes}
    contestants = accurate(graph, truth, 1e-4)
    index = PowerWalk(ALPHA).build(graph)
    sample = np.random.default_rng(1).permutation(np.flatnonzero(graph.degree_N))[: 20 if options.quick else 100]
    exact = PageRank(ALPHA, tol=1e-8)
    for rounds in (2, 4):
        errors, overlaps = [], []
        for node in sample:
            score_N = exact.vector(graph, int(node))
            best, _ = index.query(int(node), BEST, rounds)
            count = min(BEST, int((score_N > 1e-12).sum()))
            least = np.partition(score_N, len(score_N) - count)[len(score_N) - count]
            overlaps.append(float((score_N[best[:count]] >= least - 1e-9).mean()))
            ids, scores = index.query(int(node), rounds=rounds)
            score_N[ids] -= scores
            errors.append(float(np.abs(score_N).sum()))

        row = compare(
            f"{name}: top {BEST} from an index, T = {rounds} (approximate; peers exact)",
            all_of(lambda node, rounds=rounds: index.query(node, BEST, rounds), nodes),
            {peer: all_of(best_of(scores), nodes) for peer, scores in contestants.items()},
            rounds=options.rounds,
            clock=time.process_time,
        )
        facts = {"l1": round(float(np.mean(errors)), 3), "overlap": round(float(np.mean(overlaps)), 3)}
        yield {**row, **facts, "sources": SOURCES, "index_mb": round(index.nbytes / 2**20, 1)}
    queries = np.random.default_rng(2).integers(0, graph.num_nodes, 500 if options.quick else 10_000).tolist()
    if name == "blogcatalog":
        return
    one_by_one = {"one by one": all_of(lambda node: index.query(node, BEST), queries)}
    row = compare(
        f"{name}: {len(queries):,} queries in a batch, T = 2",
        lambda: index.query_batch(queries, BEST),
        one_by_one,
        rounds=min(options.rounds, 5),
        clock=time.process_time,
    )
    yield row


def memory_rows(name: str, graph: Graph) -> Iterator[dict[str, Any]]:
    """Peak bytes of a build, in memory and to a file, against their formulas."""
    PowerWalk(ALPHA, 1).build(graph, [0])
    index = PowerWalk(ALPHA).build(graph)
    entries, size = len(index.rows.ids), graph.num_nodes
    scratch, facts = 8 * size, 25 * size  # counter and list of one thread; starts, totals, cuts and flags
    chunks = 4 * 1024 * 12 * entries // size  # rows of the chunks that wait, float32 and growing
    with tempfile.TemporaryDirectory() as folder:
        for what, work, formula in (
            ("in memory", lambda: PowerWalk(ALPHA).build(graph), 2 * 6 * entries + scratch + 2 * facts),
            (
                "to a file",
                lambda: PowerWalk(ALPHA).build(graph, out=Path(folder) / "index"),
                6 * entries + scratch + 2 * facts + chunks,  # mapped pages that were just written count as resident
            ),
        ):
            peak, reckoned = peak_megabytes(work), formula / 2**20
            print(f"{name}: build {what}: {peak:.1f} MB, by the formula {reckoned:.1f} MB", file=sys.stderr)
            yield {
                "case": f"{name}: peak MB of a build {what}, and by its formula",
                "ours": round(peak, 1),
                "peer": round(reckoned, 1),
                "ratio": round(reckoned / max(peak, 1e-9), 3),
                "spread": None,
                "unit": "MB",
                "peer_name": "formula",
            }


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    options = parser.parse_args()
    start(options)
    there = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    if missing := [name for name in PEERS if name not in there]:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for name in GRAPHS[::2] if options.quick else GRAPHS:
        graph = load_dataset(name).graph
        if options.only in f"{name}: exact":
            rows += exact_rows(name, graph, options)
        if options.only in f"{name}: index":
            rows += index_rows(name, graph, options)
        if options.only in f"{name}: memory":
            rows += memory_rows(name, graph)
    finish("ppr", rows, options, ("numpy", "scipy", "numba", "anabranch", *there))


if __name__ == "__main__":
    main()
