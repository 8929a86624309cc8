"""How fast is personalised PageRank, exact and from an index, against other libraries at their best, prepared or not?

Processor time of one thread. Contestants are those of `benchmarks/_ppr_peers.py`: each gets the graph in its own form beforehand, and the
loosest of its tolerances at which the L1 distance to a power iteration of 1e-13 is within the given error at every source; one that never
gets there does not take part. Ours must prove the error and is checked against it. Contestants take turns. Three questions:

    the first source          what is prepared included, of a graph that nobody has seen. Bar: 1 time the best peer
    the hundredth source      one at a time, all that a contestant prepares made before. Bar: 10 times
    a hundred sources at once all included, in one call; peers may take them as a block of right-hand sides

What preparing costs each stands in ``prepare_ms``. A unit of the second is the same four sources. Then the index against the exact
ones (approximate: the rows say how far), batches, and the peak memory of queries and of builds against their formulas.

    python benchmarks/ppr.py --threads 1 --json benchmarks/results/ppr.json

Peers that are not installed are left out and named; ``pip install fast-pagerank scikit-network igraph networkx networkit torch-geometric
scikit-sparse`` has them all.
"""
# Shapes: N nodes, B sources at once

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from _harness import arguments, compare, finish, peak_megabytes, start
from _ppr_peers import Block, Peer, Scores, accurate, installed, peers
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.generate import barabasi_albert
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.ppr import PageRank, Transition, power_iteration, prepare
from anabranch.graph.rows import top_of_dense

ALPHA, BEST, SOURCES, MANY = 0.15, 50, 4, 100
GRAPHS = ("dblp", "dblp_weighted", "ppi", "blogcatalog")
WIDTHS = (16, 64, 128)


def unseen(graph: Graph) -> Graph:
    """The same arrays as a graph of which nothing is known, not even degrees."""
    return Graph(graph.indptr, graph.indices, graph.weights, graph.is_directed)


def all_of(scores: Callable[[int], Any], nodes: list[int]) -> Callable[[], None]:
    def work() -> None:
        for node in nodes:
            scores(node)

    return work


def best_of(scores: Scores) -> Callable[[int], np.ndarray]:
    return lambda node: np.argpartition(-scores(node), BEST)[:BEST]


def sources_of(graph: Graph, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(np.flatnonzero(graph.degree_N))[:count].tolist()


def contestants(
    graph: Graph, truth: dict[int, np.ndarray], error: float
) -> tuple[dict[str, Scores], dict[str, tuple[Peer, float]], dict[str, float]]:
    """Accurate peers, prepared: their scores; who they are with their tolerance; milliseconds that preparing took."""
    ready, who, prepare_ms = {}, {}, {}
    for peer in peers(graph, ALPHA):
        peer.prepare()
        begin = time.process_time()
        prepared = peer.prepare()
        took = 1e3 * (time.process_time() - begin)
        found = accurate(peer, prepared, truth, error)
        if found is not None:
            ready[peer.name], who[peer.name], prepare_ms[peer.name] = found[0], (peer, found[1]), round(took, 1)
    return ready, who, prepare_ms


def exact_rows(name: str, graph: Graph, options: Any) -> Iterator[dict[str, Any]]:
    nodes = sources_of(graph, SOURCES)
    truth = {node: power_iteration(graph, node, tol=1e-13) for node in nodes}
    transition = Transition(graph, ALPHA)
    prepare(transition)
    begin = time.process_time()
    factor = prepare(transition)
    own_ms = 1e3 * (time.process_time() - begin)
    facts = {
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "core_nodes": len(factor.core.diagonal_C),
        "factor_mb": round(factor.nbytes / 2**20, 2),
        "sources": SOURCES,
    }
    clock: dict[str, Any] = {"rounds": options.rounds, "clock": time.process_time}
    for error in (1e-4, 1e-6):
        ready, who, prepare_ms = contestants(graph, truth, error)
        facts["prepare_ms"] = {"ours": round(own_ms, 1), **prepare_ms}
        fresh, warm = PageRank(ALPHA, tol=error), PageRank(ALPHA, tol=error)
        worst = 0.0
        for node, truth_N in truth.items():
            # As the first query of a graph, and as one after many.
            first_N = PageRank(ALPHA, tol=error).vector(unseen(graph), node)
            worst = max(worst, *(float(np.abs(found - truth_N).sum()) for found in (first_N, warm.vector(graph, node))))
        if worst > error:
            raise SystemExit(f"{name}: ours is {worst:.1e} off, and {error:g} was promised")
        row = compare(
            f"{name}: the first source, preparing included, L1 error {error:g}",
            lambda fresh=fresh: fresh.vector(unseen(graph), nodes[0]),
            {
                key: (lambda peer=peer, tol=tol: peer.query(peer.prepare(), tol)(nodes[0]))
                for key, (peer, tol) in who.items()
            },
            **clock,
        )
        yield {**row, **facts, "l1_ours": worst}
        for node in sources_of(graph, MANY - 1, 1):
            warm.vector(graph, node)
        row = compare(
            f"{name}: the hundredth source, L1 error {error:g}",
            all_of(lambda node, warm=warm: warm.vector(graph, node), nodes),
            {key: all_of(scores, nodes) for key, scores in ready.items()},
            **clock,
        )
        yield {**row, **facts, "l1_ours": worst}
        yield {**block_row(name, graph, error, who, options), "edges": graph.num_edges}


def block_row(
    name: str, graph: Graph, error: float, who: dict[str, tuple[Peer, float]], options: Any
) -> dict[str, Any]:
    """A hundred sources in one call, the ``BEST`` of each, of an unseen graph; a block has as few rounds as the mean error allows."""
    many = sources_of(graph, MANY, 2)
    sample = np.array(many[:10])
    exact_SN = np.stack([power_iteration(graph, int(node), tol=1e-13) for node in sample])
    works: dict[str, Callable[[], Any]] = {}
    for dtype in (np.float32, np.float64):
        for width in WIDTHS:
            rounds = Block(graph, ALPHA, dtype, width).rounds_for(sample, exact_SN, error)
            if rounds is None:
                continue

            def blocked(dtype: Any = dtype, width: int = width, rounds: int = rounds) -> None:
                for score_NB in Block(graph, ALPHA, dtype, width).scores(np.array(many), rounds):
                    for score_N in np.ascontiguousarray(score_NB.T):
                        top_of_dense(score_N, BEST)

            works[f"scipy block of {width}, {np.dtype(dtype).name}"] = blocked
    for key, (peer, tol) in who.items():
        if key in ("scipy splu", "CHOLMOD"):

            def factored(peer: Peer = peer, tol: float = tol) -> None:
                scores = peer.query(peer.prepare(), tol)
                for node in many:
                    top_of_dense(scores(node), BEST)

            works[key] = factored
    return compare(
        f"{name}: {MANY} sources at once, preparing included, L1 error {error:g}",
        lambda: PageRank(ALPHA, tol=error).batch(unseen(graph), many, BEST),
        works,
        rounds=min(options.rounds, 5),
        clock=time.process_time,
    )


def index_rows(name: str, graph: Graph, options: Any) -> Iterator[dict[str, Any]]:
    nodes = sources_of(graph, SOURCES)
    truth = {node: power_iteration(graph, node, tol=1e-13) for node in nodes}
    ready, _, _ = contestants(graph, truth, 1e-4)
    index = PowerWalk(ALPHA).build(graph)
    sample = np.random.default_rng(1).permutation(np.flatnonzero(graph.degree_N))[: 20 if options.quick else 100]
    exact = PageRank(ALPHA, tol=1e-8).prepare(graph)
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
            {peer: all_of(best_of(scores), nodes) for peer, scores in ready.items()},
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


def query_memory_rows(edges: int) -> Iterator[dict[str, Any]]:
    """Peak bytes of global scores, of a first query and of preparing, on a graph of so many stored edges, against `PageRank.peak_bytes`."""
    drawn = barabasi_albert(edges // 20 + 10, 10)
    source, target, _ = drawn.edges()
    turned = Graph.from_edges(
        source, target, np.random.default_rng(0).lognormal(0, 1, len(source)), True, drawn.num_nodes
    )
    for kind, graph in (("undirected", drawn), ("directed, weighted", turned)):
        small = barabasi_albert(2000, 3) if kind == "undirected" else turned.subgraph(np.arange(2000))
        size = (graph.num_nodes, len(graph.indices), graph.weights is not None, graph.is_directed)
        for what, work, formula in (
            ("global scores", lambda graph: PageRank().scores(graph), 40 * graph.num_nodes),
            ("a first query", lambda graph: PageRank().vector(graph, 7), PageRank.peak_bytes(*size)),
            (
                "a prepared query",
                lambda graph: PageRank().prepare(graph).vector(graph, 7),
                PageRank.peak_bytes(*size, prepared=True),
            ),
        ):
            # Kernels are loaded before, also those for many nodes.
            work(unseen(small))
            work(unseen(graph))
            peak, reckoned = peak_megabytes(lambda work=work, graph=graph: work(unseen(graph))), formula / 2**20
            own = graph.nbytes / 2**20
            case = f"peak MB of {what}, {kind} graph of {own:.0f} MB, and by its formula"
            print(f"{case}: {peak:.1f}, {reckoned:.1f}", file=sys.stderr)
            yield {
                "case": case,
                "ours": round(peak, 1),
                "peer": round(reckoned, 1),
                "ratio": round(reckoned / max(peak, 1e-9), 3),
                "spread": None,
                "unit": "MB",
                "peer_name": "formula",
                "graph_mb": round(own, 1),
            }


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    options = parser.parse_args()
    start(options)
    there = installed()
    rows: list[dict[str, Any]] = []
    for name in GRAPHS[::2] if options.quick else GRAPHS:
        graph = load_dataset(name).graph
        if options.only in f"{name}: exact":
            rows += exact_rows(name, graph, options)
        if options.only in f"{name}: index":
            rows += index_rows(name, graph, options)
        if options.only in f"{name}: memory":
            rows += memory_rows(name, graph)
    if options.only in "queries: memory":
        rows += query_memory_rows(400_000 if options.quick else 6_000_000)
    finish("ppr", rows, options, ("numpy", "scipy", "numba", "anabranch", *there))


if __name__ == "__main__":
    main()
