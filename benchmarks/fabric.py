"""How fast are max-min fair rates and packets of a simulated network, against plain loops?

Rates are those of an all-to-all of 256 hosts (16 leaves, 16 spines, 65,280 flows, of which 61,440 leave their rack) under hashing, where no
two links are alike. Peers: ``plain loop``, progressive filling over dictionaries as one writes it down, links of flows as sets;
``networkx``, the same over the edges of a graph of networkx; ``numpy loop``, all flows at once in each round. Results are compared first.
Packets have no package to be held against that is a loop in Python; the peer is ``interpreted``, the same lines without numba. Bars: 20
times the plain loop and networkx; 300,000 packet-hops a second, which stand in the row.

    python benchmarks/fabric.py --json benchmarks/results/fabric.json
"""
# Shapes: Q pieces, L links

from typing import Any

import networkx as nx
import numpy as np

from _harness import arguments, compare, finish, start
from anabranch.cluster.fabric import (
    Plan,
    Topology,
    collective_flows,
    kernels,
    max_min_rates,
    plan,
    routes,
    simulate_packets,
)


def plain_rates(paths: list[list[int]], capacity: list[float]) -> list[float]:
    """Progressive filling: the link with the least fair share is full first; freeze its flows, take them off their links, again."""
    left = dict(enumerate(capacity))
    flows: dict[int, set[int]] = {}
    for flow, path in enumerate(paths):
        for link in path:
            flows.setdefault(link, set()).add(flow)
    rates = [0.0] * len(paths)
    while flows:
        link = min(flows, key=lambda one: left[one] / len(flows[one]))
        share = left[link] / len(flows[link])
        for flow in list(flows[link]):
            rates[flow] = share
            for other in paths[flow]:
                left[other] -= share
                flows[other].discard(flow)
                if not flows[other]:
                    del flows[other]
    return rates


def networkx_rates(graph: nx.DiGraph, paths: list[list[tuple[int, int]]]) -> list[float]:
    """The same with capacities and flows as attributes of a graph's edges."""
    for _, _, edge in graph.edges(data=True):
        edge["left"], edge["flows"] = edge["capacity"], set()
    for flow, path in enumerate(paths):
        for a, b in path:
            graph[a][b]["flows"].add(flow)
    rates = [0.0] * len(paths)
    while True:
        used = [edge for _, _, edge in graph.edges(data=True) if edge["flows"]]
        if not used:
            return rates
        full = min(used, key=lambda edge: edge["left"] / len(edge["flows"]))
        share = full["left"] / len(full["flows"])
        for flow in list(full["flows"]):
            rates[flow] = share
            for a, b in paths[flow]:
                graph[a][b]["left"] -= share
                graph[a][b]["flows"].discard(flow)


def numpy_rates(link_QD: np.ndarray, capacity_L: np.ndarray) -> np.ndarray:
    """All flows at once in each round; ``link_QD`` is padded with the last link, which has room for all."""
    left_L, rates, is_free = capacity_L.copy(), np.zeros(len(link_QD)), np.ones(len(link_QD), bool)
    while is_free.any():
        count_L = np.bincount(link_QD[is_free].ravel(), minlength=len(left_L))
        share_L = np.divide(left_L, count_L, out=np.full(len(left_L), np.inf), where=count_L > 0)
        full = share_L[:-1].argmin()
        frozen = is_free & (link_QD == full).any(1)
        rates[frozen] = share_L[full]
        left_L -= share_L[full] * np.bincount(link_QD[frozen].ravel(), minlength=len(left_L))
        is_free &= ~frozen
    return rates


def hashed(width: int) -> Plan:
    topology = Topology.leaf_spine(width, width, width)
    return plan(collective_flows("all-to-all", width**3 // width, width**2 * 65_536), topology, "ecmp")


def check(ours: np.ndarray, theirs: Any, what: str) -> None:
    if not np.allclose(ours, theirs, rtol=1e-9):
        raise SystemExit(f"{what}: rates differ")


def rates(rounds: int, width: int) -> list[dict[str, Any]]:
    """One sharing among all flows of an all-to-all."""
    made = hashed(width)
    found, capacity_L = routes(made), made.topology.capacity_L.astype(float)
    paths = [found.link_E[a:b].tolist() for a, b in zip(found.start[:-1], found.start[1:], strict=True)]
    longest = max(map(len, paths))
    num_links = len(capacity_L)
    link_QD = np.array([path + [num_links] * (longest - len(path)) for path in paths])
    padded_L = np.append(capacity_L, np.inf)
    graph = nx.DiGraph()
    ends = list(zip(made.topology.link_from.tolist(), made.topology.link_to.tolist(), strict=True))
    for (a, b), capacity in zip(ends, capacity_L.tolist(), strict=True):
        graph.add_edge(a, b, capacity=capacity)
    edges = [[ends[link] for link in path] for path in paths]
    peers = {
        "plain loop": lambda: plain_rates(paths, capacity_L.tolist()),
        "networkx": lambda: networkx_rates(graph, edges),
        "numpy loop": lambda: numpy_rates(link_QD, padded_L),
    }
    ours = max_min_rates(found, capacity_L)
    for name, peer in peers.items():
        check(ours, peer(), name)
    case = f"max-min fair rates of {len(paths):,} flows over {num_links:,} links"
    # Each in a row of its own, since the slower ones would not be shown beside the fastest.
    return [
        compare(case, lambda: max_min_rates(found, capacity_L), {name: peer}, rounds=min(rounds, 5))
        | {"flows": len(paths), "links": num_links}
        for name, peer in peers.items()
    ]


def packets(rounds: int, width: int, packets_each: int) -> dict[str, Any]:
    """An all-to-all, packet by packet."""
    topology = Topology.leaf_spine(width, width, width, cap_up=10, cap_host=10)
    hosts = width * width
    made = plan(collective_flows("all-to-all", hosts, hosts * packets_each * 9000), topology, "spray")
    usual = kernels.FEW

    def run(few: float) -> Any:
        kernels.FEW = few
        try:
            return simulate_packets(made)
        finally:
            kernels.FEW = usual

    if (run(-1).finish_F != run(np.inf).finish_F).any():
        raise SystemExit("packets: compiled and interpreted loops differ")
    hops = run(-1).hops
    row = compare(
        f"packets: all-to-all of {hosts} hosts, sprayed, {hops:,} packet-hops",
        lambda: run(-1),
        {"interpreted": lambda: run(np.inf)},
        rounds=min(rounds, 5),
    )
    return row | {"hops": hops, "hops_per_second": round(hops / (row["ours"] / 1e3))}


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    options = parser.parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    if options.only in "max-min fair rates":
        rows += rates(options.rounds, 6 if options.quick else 16)
    if options.only in "packets":
        rows.append(packets(options.rounds, *((4, 5) if options.quick else (8, 20))))
    finish("fabric", rows, options, ("numpy", "numba", "networkx"))


if __name__ == "__main__":
    main()
