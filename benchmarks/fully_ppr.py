"""What does PageRank from every node cost, against what scipy does for many sources at once at the same error?

Processor time of one thread for all sources of a graph, the 50 best of each, everything that is prepared included. A loop over sources
with some library is no measure (it loses by a hundred): peers take sources as right-hand sides of one product or solution,

    scipy block       x <- c P' x + alpha s with a dense block of 16, 64 or 256 sources, in 32 or 64 bits, whichever is quickest, for the
                      fewest rounds with a mean L1 error of at most ours on a sample (a peer cannot know them; they are given)
    scipy splu        factors of the system, and blocks of 64 right-hand sides; not of dense graphs, whose factors are dense
    dense inverse     LAPACK's Cholesky inverse of the whole system, where it has at most 12,000 nodes

and the best 50 of each are found by our own compiled routine, for which peers need not pay in Python. Blocks take a sample of the sources
and their time is scaled up (``peer_share`` says which part), and so do we in the exact mode. Errors are of whole rows, against scores exact
to 1e-8. Bars: decomposition and the exact mode in a tenth of the best peer's time on DBLP, in a third on dense graphs.

With pyspark and Java there are two more rows: both plans of the cluster engine on this machine, wall-clock, against the embedded engine.
They say what Spark costs here, nothing about a cluster.

    python benchmarks/fully_ppr.py --threads 1 --json benchmarks/results/fully_ppr.json
"""
# Shapes: N nodes, S sources, B sources at once

import importlib.util
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.linalg import lapack
from scipy.sparse import diags_array

from _harness import arguments, finish, peak_megabytes, start
from _ppr_peers import FILLS, Block, splu
from anabranch.graph import Graph
from anabranch.graph.fully_ppr import FullyPPR, fully_ppr
from anabranch.graph.rows import top_of_dense
from anabranch.studies.fully_ppr import ALPHA, exact_rows, graph_of, l1_error, overlap, sample_of

BEST = 50
SPARK_WALKS = 50
WIDTHS, WIDE = (16, 64, 256), 64

# Nodes of a system that is inverted whole, 8 bytes an entry.
WHOLE = 12_000

# Seconds of all sources, from some.
AllSeconds = Callable[[], float]


def quickest_block(graph: Graph, source_S: np.ndarray, exact_SN: np.ndarray, error: float) -> tuple[str, Any] | None:
    """Of all widths and types at the fewest rounds that are accurate, the one that takes least on the sample."""
    found = []
    many = sample_of(graph, min(256, graph.num_nodes), 2)
    for dtype in (np.float32, np.float64):
        rounds = Block(graph, ALPHA, dtype, WIDE).rounds_for(source_S, exact_SN, error)
        for width in WIDTHS if rounds else ():
            block = Block(graph, ALPHA, dtype, width)
            took = min(
                scaled(lambda block=block, rounds=rounds: block.scores(many, rounds), graph, many)() for _ in range(2)
            )
            found.append((took, f"scipy block of {width}, {np.dtype(dtype).name}, {rounds} rounds", block, rounds))
    if not found:
        print(f"no block gets to an error of {error:.1e}", file=sys.stderr)
        return None
    _, name, block, rounds = min(found, key=lambda one: one[0])
    return name, lambda nodes: block.scores(nodes, rounds)


def scaled(blocks: Callable[[], Iterator[np.ndarray]], graph: Graph, nodes: np.ndarray) -> AllSeconds:
    """Processor seconds for all nodes by those for some, of dense scores [N, B] and the best of each."""

    def seconds() -> float:
        begin = time.process_time()
        for score_NB in blocks():
            for score_N in np.ascontiguousarray(score_NB.T):
                top_of_dense(score_N, BEST)
        return (time.process_time() - begin) * graph.num_nodes / len(nodes)

    return seconds


def factored(graph: Graph, nodes: np.ndarray) -> AllSeconds:
    """Factors, then blocks of right-hand sides; what is prepared counts once."""
    peer = splu(graph, ALPHA)
    strength_N = np.where(graph.strength_N > 0, graph.strength_N, 1.0)

    def seconds() -> float:
        begin = time.process_time()
        factors = peer.prepare()
        once = time.process_time() - begin

        def blocks() -> Iterator[np.ndarray]:
            for first in range(0, len(nodes), WIDE):
                chosen = nodes[first : first + WIDE]
                right_NB = np.zeros((graph.num_nodes, len(chosen)), order="F")
                right_NB[chosen, np.arange(len(chosen))] = ALPHA
                yield strength_N[:, None] * factors.solve(right_NB)

        return once + scaled(blocks, graph, nodes)()

    return seconds


def inverted(graph: Graph) -> AllSeconds:
    """alpha D (D - c W)^-1, all columns at once."""
    strength_N = np.where(graph.strength_N > 0, graph.strength_N, 1.0)

    def seconds() -> float:
        begin = time.process_time()
        system_NN = (diags_array(strength_N) - (1 - ALPHA) * graph.to_scipy(np.float64)).toarray(order="F")
        system_NN, _ = lapack.dpotrf(system_NN, lower=1, overwrite_a=1)
        system_NN, failed = lapack.dpotri(system_NN, lower=1, overwrite_c=1)
        assert not failed
        for node in range(graph.num_nodes):
            # The lower triangle holds both.
            column_N = np.concatenate([system_NN[node, :node], system_NN[node:, node]])
            top_of_dense(ALPHA * strength_N * column_N, BEST)
        return time.process_time() - begin

    return seconds


def peers_of(
    graph: Graph, source_S: np.ndarray, exact_SN: np.ndarray, error: float, many: int
) -> dict[str, AllSeconds]:
    """Contestants of at least this accuracy."""
    nodes = sample_of(graph, min(many, graph.num_nodes), 3)
    found: dict[str, AllSeconds] = {}
    block = quickest_block(graph, source_S, exact_SN, error)
    if block is not None:
        name, blocks = block
        found[name] = scaled(lambda: blocks(nodes), graph, nodes)
    if len(graph.indices) <= FILLS * graph.num_nodes:
        found["scipy splu"] = factored(graph, nodes)
    if graph.num_nodes <= WHOLE and not graph.is_directed:
        found["dense inverse"] = inverted(graph)
    return found


def case(name: str, options: dict[str, Any], rounds: int, many: int, sample: int) -> dict[str, Any]:
    """A row: all sources of a graph by one method, against the quickest peer of at least its accuracy."""
    graph = graph_of(name, 0)
    options = {"alpha": ALPHA, "workers": 1, **options}
    source_S = sample_of(graph, sample, 0)
    exact_SN = exact_rows(graph, source_S)
    whole = fully_ppr(graph, top_k=None, sources=source_S, **options)
    rows = list(zip(source_S, exact_SN, strict=True))
    error = float(np.mean([l1_error(*whole.top(int(node)), exact_N) for node, exact_N in rows]))
    peers = peers_of(graph, source_S[:32], exact_SN[:32], max(error, 1e-7), many)

    def ours() -> Any:
        return fully_ppr(graph, top_k=BEST, **options, sources=None if options["method"] != "exact" else source_S)

    memory = peak_megabytes(ours)  # also the warm-up
    found = ours()
    shared = [overlap(found.top(int(node))[0], exact_N, BEST) for node, exact_N in rows]
    works: dict[str, AllSeconds] = {"ours": lambda: all_seconds(graph, options), **peers}
    times: dict[str, list[float]] = {key: [] for key in works}
    for turn in range(rounds):
        for key in list(works) if turn % 2 else list(works)[::-1]:
            # A peer that cannot win takes one turn.
            quickest = min(
                (min(values) for other, values in times.items() if other != "ours" and values), default=math.inf
            )
            if turn == 0 or key == "ours" or min(times[key]) < 3 * quickest:
                times[key].append(works[key]())
    times = {key: values for key, values in times.items() if len(values) == rounds}
    accuracy = {"l1_error": error, "overlap_at_50": float(np.mean(shared))}
    label = f"{name}, {options['method']}, all {graph.num_nodes:,} sources at equal error"
    return {
        **_row(label, times, "ours"),
        **accuracy,
        "peer_share": min(many / graph.num_nodes, 1.0),
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
    from anabranch.graph.spark.session import session

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
    many, sample = (256, 40) if options.quick else (1024, 100)
    methods: list[dict[str, Any]] = [
        {"method": "decompose", "rounds": 2},
        {"method": "walks", "walks": 1000, "estimator": "fullpath"},
        {"method": "exact", "tol": 1e-6},
    ]
    chosen = [(name, method) for name in names for method in methods if options.only in f"{name}, {method['method']}"]
    rows = [case(name, method, rounds, many, sample) for name, method in chosen]
    if not options.no_spark and options.only in "Spark":
        rows += spark_rows("power-500" if options.quick else "power-10680", 1)
    finish("fully_ppr", rows, options, ("numpy", "numba", "anabranch"))


if __name__ == "__main__":
    main()
