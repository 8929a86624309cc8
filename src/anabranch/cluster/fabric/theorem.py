"""The paper's theorem, checked with the planner that ships: single paths with minimal splitting load every link as ideal spraying does.

Flows have 720,720 bytes, which each number of paths up to 16 divides, so that every piece is a whole number of bytes and every
comparison is one of whole numbers and fractions: nothing is rounded.
"""

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from anabranch.bounds import whole
from anabranch.cluster.fabric.flows import Flows
from anabranch.cluster.fabric.planner import check, exact_loads, plan
from anabranch.cluster.fabric.schemes import num_pieces, num_wrapped
from anabranch.cluster.fabric.topology import Topology
from anabranch.errors import InputError

SIZE = 720_720
MOST_PATHS, MOST_FLOWS, MOST_MIXES = 16, 256, 100_000


@dataclass(frozen=True)
class Equivalence:
    """What `check_equivalence` found.

    Attributes:
        cases: pairs (n, s) of flows and paths.
        mixes: random networks with failures and random groups.
        gap: the largest difference of a link's load between ``ethereal`` or ``wrap`` and spraying, as a share of the flow's bytes; the
            theorem says 0.
        pieces_off: cases whose number of pieces is not that of the formula.
        worst: what the largest gap was found in; empty without one.
    """

    cases: int
    mixes: int
    gap: Fraction
    pieces_off: int
    worst: str = ""

    @property
    def holds(self) -> bool:
        """Whether every link of every case carried exactly what spraying gives it, in as many pieces as the formula says."""
        return not self.gap and not self.pieces_off


def check_equivalence(flows: int = 24, paths: int = 16, mixes: int = 200, *, seed: int = 0) -> Equivalence:
    """Compare loads for all n up to ``flows`` and s up to ``paths``, and in ``mixes`` random networks with random failures.

    Raises InputError for more than 16 paths, whose flows would not divide, or other numbers that make no cases.
    """
    flows, paths = whole("flows", flows, 1, MOST_FLOWS), whole("paths", paths, 1, MOST_PATHS)
    mixes = whole("mixes", mixes, 0, MOST_MIXES)
    gap, worst, off = Fraction(0), "", 0
    for count, ways in itertools.product(range(1, flows + 1), range(1, paths + 1)):
        # One sender, as the algorithm runs; its flows go to hosts of the other leaf.
        topology = Topology.leaf_spine(2, ways, count)
        sent = Flows.of((0, count + number, SIZE) for number in range(count))
        found, wrong = _compare(sent, topology, seed, num_pieces(count, ways), num_wrapped(count, ways))
        off += wrong
        if found > gap:
            gap, worst = found, f"{count} flows over {ways} paths"
    random = np.random.default_rng([seed, 3])
    for number in range(mixes):
        topology, sent = _mix(random, paths)
        found, _ = _compare(sent, topology, seed)
        if found > gap:
            gap, worst = found, f"mix {number}: {topology.about}, {len(sent)} flows, failed {topology.failed_cables()}"
    return Equivalence(flows * paths, mixes, gap, off, worst)


def _compare(sent: Flows, topology: Topology, seed: int, *pieces: int) -> tuple[Fraction, bool]:
    """The largest gap to spraying, as a share of a flow, and whether a number of pieces is another than those given."""
    ideal = exact_loads(plan(sent, topology, "spray", seed=seed))
    gap, off = Fraction(0), False
    for place, scheme in enumerate(("ethereal", "wrap")):
        made = plan(sent, topology, scheme, seed=seed)
        check(made)
        off |= bool(pieces) and len(made) != pieces[place]
        gap = max(gap, *(abs(a - b) / SIZE for a, b in zip(exact_loads(made), ideal, strict=True)))
    return gap, off


def _mix(random: np.random.Generator, paths: int) -> tuple[Topology, Flows]:
    """A small network with failed cables, where every pair of leaves keeps a path, and flows of random groups."""
    while True:
        leaves, per_leaf = int(random.integers(2, 5)), int(random.integers(1, 4))
        spines = int(random.integers(1, paths + 1))
        topology = Topology.leaf_spine(leaves, spines, per_leaf)
        cables = [(f"leaf{a}", f"spine{b}") for a in range(leaves) for b in range(spines)]
        topology = topology.with_failed([cable for cable in cables if random.random() < 0.15])
        rows = []
        for src, dst in itertools.permutations(range(topology.num_hosts), 2):
            rows += [(src, dst, SIZE)] * int(random.integers(0, 4))
        if not rows:
            continue
        try:
            plan(Flows.of(rows), topology, "spray")
        except InputError:
            # Two leaves are cut off from each other.
            continue
        return topology, Flows.of(rows)
