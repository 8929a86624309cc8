"""How fast are graphs read, built, saved and loaded, and does the memory that takes fit its formula?

The same edges go to every contestant; before anything is timed, the degrees of their graphs are compared. Text is a tab-separated edge
list without a header. scipy has no reader: `numpy.loadtxt` reads for it. Memory rows have no peer: "peer" is what `Graph.estimate_bytes`
(for text, with 8 bytes an edge read and a block of text taken apart) or ``memory_limit`` allows, in MB; a ratio of 1 or more means that
it holds.

    python benchmarks/graph_store.py --json benchmarks/results/graph_store.json
"""
# Shapes: N nodes, E edges

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _harness import Work, arguments, compare, finish, peak_megabytes, start
from anabranch.graph import Graph
from anabranch.graph.formats import read_graph, write_graph
from anabranch.graph.generate import power_law


def networkx_of_text(path: Path) -> Any:
    import networkx

    return networkx.read_edgelist(path, nodetype=int, data=False)


def igraph_of_text(path: Path) -> Any:
    import igraph

    return igraph.Graph.Read_Edgelist(str(path), directed=False)


def scipy_of_text(path: Path) -> Any:
    ends = np.loadtxt(path, np.int64, ndmin=2)
    return scipy_of_arrays(ends[:, 0], ends[:, 1], int(ends.max()) + 1)


def scipy_of_arrays(source_E: np.ndarray, target_E: np.ndarray, num_nodes: int) -> Any:
    from scipy.sparse import coo_array

    both = (np.concatenate([source_E, target_E]), np.concatenate([target_E, source_E]))
    matrix = coo_array((np.ones(2 * len(source_E), np.float32), both), shape=(num_nodes, num_nodes)).tocsr()
    matrix.data[:] = 1
    return matrix


def igraph_of_arrays(source_E: np.ndarray, target_E: np.ndarray, num_nodes: int) -> Any:
    import igraph

    return igraph.Graph(n=num_nodes, edges=np.column_stack([source_E, target_E]), directed=False)


def networkx_of_arrays(source_E: np.ndarray, target_E: np.ndarray, num_nodes: int) -> Any:
    import networkx

    made = networkx.Graph()
    made.add_nodes_from(range(num_nodes))
    made.add_edges_from(zip(source_E.tolist(), target_E.tolist(), strict=True))
    return made


def degrees(made: Any) -> list[int]:
    """Degrees of any contestant's graph, by node."""
    if isinstance(made, Graph):
        return made.degree_N.tolist()
    if hasattr(made, "indptr"):
        return np.diff(made.indptr).tolist()
    if hasattr(made, "vcount"):
        return list(made.degree())
    known = dict(made.degree())  # networkx read from text has no node without an edge
    return [known.get(node, 0) for node in range(max(known) + 1)]


def available(makers: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Those whose package is installed."""
    found = {}
    for name, make in makers.items():
        try:
            __import__(name)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        found[name] = make
    return found


def memory_row(case: str, work: Work, allowed_bytes: float) -> dict[str, Any]:
    """Peak resident memory of a work beside what it may be. The first run compiles and is not counted."""
    work()
    measured, allowed = peak_megabytes(work), allowed_bytes / 2**20
    row = {
        "case": case,
        "ours": round(measured, 1),
        "peer": round(allowed, 1),
        "ratio": round(allowed / max(measured, 1e-9), 3),
        "spread": None,
        "unit": "MB",
        "peer_name": "formula",
        "memory_ours_mb": round(measured, 1),
        "memory_peer_mb": 0.0,
    }
    print(f"{case:<52} peak {measured:9.1f} MB   formula {allowed:9.1f} MB", file=sys.stderr)
    return row


def speed_rows(folder: Path, num_edges: int, rounds: int, only: str) -> list[dict[str, Any]]:
    graph = power_law(num_edges // 10, num_edges)
    source_E, target_E, _ = graph.edges()
    text = folder / "small.txt"
    write_graph(graph, text)
    text.write_bytes(text.read_bytes().split(b"\n", 1)[1])  # without our comment, which igraph does not take
    num_nodes = int(max(source_E.max(), target_E.max())) + 1
    from_text = available({"scipy": scipy_of_text, "igraph": igraph_of_text, "networkx": networkx_of_text})
    from_arrays = available({"scipy": scipy_of_arrays, "igraph": igraph_of_arrays, "networkx": networkx_of_arrays})
    expected = degrees(Graph.from_edges(source_E, target_E, num_nodes=num_nodes))
    if degrees(read_graph(text, ids="numbers")) != expected:
        raise SystemExit("the graph read differs from the graph built")
    rows = []
    for name, make in from_text.items():
        case = f"read {len(source_E):,} edges of text"
        if only in case:
            if degrees(make(text)) != expected:
                raise SystemExit(f"{name} reads another graph")
            ours = lambda: read_graph(text, ids="numbers")  # noqa: E731
            rows.append(compare(f"{case}, {name}", ours, {name: lambda make=make: make(text)}, rounds=rounds))
    for name, make in from_arrays.items():
        case = f"build {len(source_E):,} edges of arrays"
        if only in case:
            if degrees(make(source_E, target_E, num_nodes)) != expected:
                raise SystemExit(f"{name} builds another graph")
            ours = lambda: Graph.from_edges(source_E, target_E, num_nodes=num_nodes)  # noqa: E731
            peer = lambda make=make: make(source_E, target_E, num_nodes)  # noqa: E731
            rows.append(compare(f"{case}, {name}", ours, {name: peer}, rounds=rounds))
    return rows + disk_rows(folder, graph, rounds, only)


def disk_rows(folder: Path, graph: Graph, rounds: int, only: str) -> list[dict[str, Any]]:
    from scipy.sparse import load_npz, save_npz

    matrix = graph.to_scipy()
    ours, theirs = folder / "g.anb", folder / "g.npz"
    graph.save(ours)
    save_npz(theirs, matrix, compressed=False)
    if not Graph.load(ours).equals(graph) or (load_npz(theirs) != matrix).nnz:
        raise SystemExit("a graph loaded differs from the graph saved")
    cases: list[tuple[str, Work, Work]] = [
        ("save (fsync, checksums)", lambda: graph.save(ours), lambda: save_npz(theirs, matrix, compressed=False)),
        ("load (checksums, rows checked)", lambda: Graph.load(ours), lambda: load_npz(theirs)),
        ("load, mapped", lambda: Graph.load(ours, mmap=True), lambda: load_npz(theirs)),
    ]
    named = [(f"{what}, {graph.num_edges:,} edges", mine, peer) for what, mine, peer in cases]
    return [compare(case, mine, {"scipy npz": peer}, rounds=rounds) for case, mine, peer in named if only in case]


def memory_rows(folder: Path, num_edges: int, only: str) -> list[dict[str, Any]]:
    graph = power_law(num_edges // 10, num_edges)
    source_E, target_E, _ = graph.edges()
    count, weight_E = len(source_E), np.ones(len(source_E), np.float32)
    num_nodes, size = graph.num_nodes, f"{count:,} edges"
    path = folder / "large.txt"
    write_graph(graph, path)
    expected = graph.degree_N.copy()
    parsed = 16 * (1 << 20) + 20 * (1 << 22)  # a block of text, taken apart
    stored = Graph.estimate_bytes(num_nodes, count).stored
    rows = []
    for weighted in (False, True):
        for directed in (False, True):
            kind = f"{'weighted' if weighted else 'unweighted'}, {'directed' if directed else 'undirected'}"
            case = f"build {size}, {kind}"
            if only in case:
                weight = weight_E if weighted else None
                work = lambda w=weight, d=directed: Graph.from_edges(source_E, target_E, w, d, num_nodes)  # noqa: E731
                rows.append(memory_row(case, work, Graph.estimate_bytes(num_nodes, count, weighted, directed).build))
    del graph
    build = Graph.estimate_bytes(num_nodes, count).build
    if only in (case := f"read {size} of text"):
        rows.append(memory_row(case, lambda: read_graph(path), build + 8 * count + parsed))
    for limit in (stored // 4, stored // 2):
        if only in (case := f"read {size} of text in {limit / 2**20:.0f} MB"):
            found = read_graph(path, memory_limit=limit, spill_folder=folder)
            if not np.array_equal(found.degree_N, expected):
                raise SystemExit("the graph read in bounded memory differs")
            del found
            work = lambda limit=limit: read_graph(path, memory_limit=limit, spill_folder=folder)  # noqa: E731
            rows.append(memory_row(case, work, limit))
    return rows


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    options = parser.parse_args()
    start(options)
    rounds = min(options.rounds, 5)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        rows = speed_rows(folder, 100_000 if options.quick else 1_000_000, rounds, options.only)
        rows += memory_rows(folder, 1_000_000 if options.quick else 20_000_000, options.only)
    finish("graph_store", rows, options, ("numpy", "scipy", "numba", "pyarrow", "anabranch"))


if __name__ == "__main__":
    main()
