"""The network between machines: which path each flow of a collective takes, and what comes of it.

Single-path transport with minimal splitting ("Challenging the Need for Packet Spraying in Large-Scale Distributed Training", arXiv
2407.00550) and what it is compared with, over leaf-spine, fat-tree and any other network:

    topology = Topology.fat_tree(8, hosts_per_leaf=16)
    made = plan(collective_flows("all-to-all", 512, 2**28), topology, "ethereal")
    simulate(made).completion_s, busiest(made), lower_bound(made.flows, topology)

Planners need numpy alone; simulators are compiled where numba is installed (extra ``cluster``), and slow where it is not.
"""

from anabranch.cluster.fabric.flows import ALGORITHMS, Flows, collective_flows, dispatch_matrix, moe_dispatch
from anabranch.cluster.fabric.fluid import FluidResult, max_min_rates, simulate
from anabranch.cluster.fabric.health import PathHealth
from anabranch.cluster.fabric.packets import LinkEvent, PacketConfig, PacketResult, simulate_packets
from anabranch.cluster.fabric.planner import (
    Piece,
    Plan,
    Routes,
    busiest,
    check,
    exact_loads,
    good_paths,
    loads,
    lower_bound,
    plan,
    routes,
)
from anabranch.cluster.fabric.schemes import SCHEMES, SPREAD
from anabranch.cluster.fabric.theorem import Equivalence, check_equivalence
from anabranch.cluster.fabric.topology import Topology
from anabranch.cluster.fabric.trace import plan_trace

__all__ = [
    "ALGORITHMS",
    "SCHEMES",
    "SPREAD",
    "Equivalence",
    "Flows",
    "FluidResult",
    "LinkEvent",
    "PacketConfig",
    "PacketResult",
    "PathHealth",
    "Piece",
    "Plan",
    "Routes",
    "Topology",
    "busiest",
    "check",
    "check_equivalence",
    "collective_flows",
    "dispatch_matrix",
    "exact_loads",
    "good_paths",
    "loads",
    "lower_bound",
    "max_min_rates",
    "moe_dispatch",
    "plan",
    "plan_trace",
    "routes",
    "simulate",
    "simulate_packets",
]
