"""Single-path transport with minimal splitting: which piece of which flow goes over which path, and what that loads.

"Challenging the Need for Packet Spraying in Large-Scale Distributed Training" ("Ethereal"), Addanki, Goyal, Marinos, 2024,
arXiv 2407.00550. Every sender by itself, for each step of a collective:

    flows within the own rack are left alone; the others are grouped by destination leaf; of a group of n flows of f bytes and s good
    paths, with r = n mod s and g = gcd(r, s), the first n - r go whole, round-robin; each of the other r in s / g pieces of f g / s

so that each path gets r / g pieces more, which is the same, and each uplink and downlink carries demand / s: what ideal packet spraying
gives, and the least there is. `anabranch.cluster.fabric.theorem` checks it. Departures: pieces differ by one byte where f g / s is
no whole number (the authors' code gives the last piece the rest); unequal flows go by `wrap` (their code stops).
"""
# Shapes: F flows, Q pieces, L links, P paths, E (piece, link) pairs

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from anabranch.bounds import MOST_SEED, shown, whole
from anabranch.cluster.fabric.flows import Flows
from anabranch.cluster.fabric.health import PathHealth
from anabranch.cluster.fabric.schemes import SPREAD, Group, Pieces, mix, placer
from anabranch.cluster.fabric.schemes import wrap as wrapped
from anabranch.cluster.fabric.topology import Topology
from anabranch.errors import InputError

Scope = Literal["host", "leaf"]
# The authors' qp-randomize.
MOST_DELAY_NS = 50


class Piece(NamedTuple):
    """``size`` bytes from ``offset`` of a flow of host ``src`` to ``dst``, over path ``path`` (`SPREAD`: packet by packet over all)."""

    src: int
    dst: int
    path: int
    offset: int
    size: int


class Routes(NamedTuple):
    """The links of pieces: those of piece q are ``link_E[start[q]:start[q + 1]]``, each with its share of the piece's bytes."""

    start: np.ndarray
    link_E: np.ndarray
    weight_E: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` found.

    Attributes:
        topology, flows, scheme, scope, seed: what it was made of.
        flow_Q: int64, which flow a piece is of.
        path_Q: int32, number among `Topology.paths` of the two leaves; 0 within a rack, `SPREAD` for all good ones.
        offset_Q, size_Q: int64, bytes.
        delay_ns_Q: int32, 0 to 50: senders start apart.
        window_Q: int32: a host starts its pieces of a step window by window, each when the one before is over; 0 for all at once.
        fell_back: whether ``ethereal`` met flows or paths that are not equal, and went by ``wrap`` there.
    """

    topology: Topology
    flows: Flows
    scheme: str
    scope: Scope
    seed: int
    flow_Q: np.ndarray
    path_Q: np.ndarray
    offset_Q: np.ndarray
    size_Q: np.ndarray
    delay_ns_Q: np.ndarray
    window_Q: np.ndarray
    fell_back: bool = False

    def __len__(self) -> int:
        return len(self.flow_Q)

    def __iter__(self) -> Iterator[Piece]:
        src_Q, dst_Q = self.flows.src_F[self.flow_Q], self.flows.dst_F[self.flow_Q]
        columns = (src_Q, dst_Q, self.path_Q, self.offset_Q, self.size_Q)
        return map(Piece._make, zip(*(column.tolist() for column in columns), strict=True))

    def step(self, number: int) -> np.ndarray:
        """Places of the pieces of one step."""
        return np.flatnonzero(self.flows.step_F[self.flow_Q] == number)


def plan(
    flows: Flows,
    topology: Topology,
    scheme: str = "ethereal",
    *,
    scope: Scope = "host",
    seed: int = 0,
    window: int | None = None,
    health: PathHealth | None = None,
    now_s: float = 0.0,
) -> Plan:
    """Place the flows on paths.

    Args:
        flows: of any number of steps; each step is planned by itself.
        scheme: one of `anabranch.cluster.fabric.schemes`. Where ``ethereal`` meets flows or paths that are not equal it goes by
            ``wrap``, and the plan's ``fell_back`` says so.
        scope: "host", every sender by itself as in the paper; "leaf", all hosts of a leaf together, which a library can that knows the
            whole collective: halving-doubling then needs no splits.
        seed: of the order of flows and paths, of start delays and of hashes.
        window: pieces that a host has under way at a time, at most: destination leaves wait for each other, in random order, and one
            that has more pieces goes alone. None for all at once.
        health: paths that timed out lately, at ``now_s``; they get nothing.

    Raises InputError for hosts that the network does not have, and where no good path is left, naming both leaves.
    """
    if scope not in ("host", "leaf"):
        raise InputError(f'scope is {shown(scope)}; it is "host" or "leaf"')
    place = placer(scheme)
    seed = whole("seed", seed, 0, MOST_SEED)
    window = None if window is None else whole("window", window, 1)
    check_fits(flows, topology)
    planner = _Planner(flows, topology, scope, seed, health, now_s)
    parts, fell_back = [planner.within_racks()], False
    for chosen, good, capacity in planner.groups():
        group = Group(flows.size_F[chosen], capacity, planner.identity_F[chosen])
        falls = scheme == "ethereal" and not group.is_equal
        fell_back |= falls
        made = (wrapped if falls else place)(group)
        path = made.path if scheme in ("spray", "reps") else good[made.path]
        parts.append(Pieces(chosen[made.flow], path, made.offset, made.size))
    flow_Q, path_Q, offset_Q, size_Q = (np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True))
    delay_Q = np.random.default_rng([seed, 1]).integers(0, MOST_DELAY_NS + 1, len(flow_Q)).astype(np.int32)
    window_Q = np.zeros(len(flow_Q), np.int32) if window is None else _windows(flows, topology, flow_Q, window, seed)
    made_plan = Plan(
        topology,
        flows,
        scheme,
        scope,
        seed,
        flow_Q,
        path_Q.astype(np.int32),
        offset_Q,
        size_Q,
        delay_Q,
        window_Q,
        fell_back,
    )
    if scheme == "greedy":
        _place_greedily(made_plan)
    return made_plan


class _Planner:
    """Groups of flows with what each may use."""

    def __init__(
        self, flows: Flows, topology: Topology, scope: Scope, seed: int, health: PathHealth | None, now_s: float
    ) -> None:
        self.flows, self.topology, self.health, self.now_s, self.seed = flows, topology, health, now_s, seed
        self.src_leaf_F, self.dst_leaf_F = topology.leaf_H[flows.src_F], topology.leaf_H[flows.dst_F]
        self.sender_F = flows.src_F if scope == "host" else self.src_leaf_F
        number_F = np.arange(len(flows), dtype=np.uint64)
        self.identity_F = mix(number_F + mix(np.array([seed], np.uint64) + np.uint64(1)))
        self._drawn: dict[int, np.random.Generator] = {}
        self._good: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        _check_hosts(flows, topology)

    def within_racks(self) -> Pieces:
        """Flows that leave no rack."""
        own = np.flatnonzero(self.src_leaf_F == self.dst_leaf_F)
        nothing = np.zeros(len(own), np.int64)
        return Pieces(own, nothing, nothing, self.flows.size_F[own])

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Flows of each group in the order in which they are taken, its good paths likewise, and their capacities."""
        far = np.flatnonzero(self.src_leaf_F != self.dst_leaf_F)
        keys = (self.dst_leaf_F[far], self.sender_F[far], self.flows.step_F[far])
        far = far[np.lexsort(keys)]
        if not len(far):
            return
        key = np.stack([self.flows.step_F[far], self.sender_F[far], self.dst_leaf_F[far]])
        edges = np.flatnonzero((np.diff(key) != 0).any(0)) + 1
        for chosen in np.split(far, edges):
            sender = int(self.sender_F[chosen[0]])
            if sender not in self._drawn:
                self._drawn[sender] = np.random.default_rng([self.seed, 0, sender])
            random = self._drawn[sender]
            good, capacity = self._paths(chosen)
            order = random.permutation(len(good))
            yield chosen[random.permutation(len(chosen))], good[order], capacity[order]

    def _paths(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The good paths of a group and their capacities."""
        leaf, to = int(self.src_leaf_F[chosen[0]]), int(self.dst_leaf_F[chosen[0]])
        if (leaf, to) not in self._good:
            self._good[leaf, to] = good_paths(self.topology, leaf, to)
        good, capacity = self._good[leaf, to]
        if self.health is not None:
            marked = self.health.failed(set(self.flows.src_F[chosen].tolist()), to, self.now_s)
            kept = ~np.isin(good, list(marked))
            good, capacity = good[kept], capacity[kept]
        if not len(good):
            names = self.topology.names
            why = "have failed links" if self.health is None else "have failed links or timed out lately"
            raise InputError(
                f"no good path from {names[leaf]} to {names[to]}: all {len(self.topology.paths(leaf, to))} {why}"
            )
        return good, capacity


def check_fits(flows: Flows, topology: Topology) -> None:
    """Raise InputError for a flow of a host that the network does not have."""
    if flows.num_ranks > topology.num_hosts:
        raise InputError(
            f"flows name host {flows.num_ranks - 1}, but the network has hosts 0 to {topology.num_hosts - 1}"
        )


def _check_hosts(flows: Flows, topology: Topology) -> None:
    """Raise InputError for a flow of a host whose own cable has failed."""
    for host_F, link_H in ((flows.src_F, topology.host_up_H), (flows.dst_F, topology.host_down_H)):
        down_F = ~topology.is_up_L[link_H[host_F]]
        if down_F.any():
            host = int(host_F[down_F.argmax()])
            raise InputError(
                f"the cable of {topology.names[host]} has failed, and flow {int(down_F.argmax())} needs it"
            )


def good_paths(topology: Topology, leaf: int, to: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the paths without a failed link, and their capacities in bit/s."""
    capacity = topology.path_capacity(leaf, to)
    good = np.flatnonzero(capacity > 0)
    return good, capacity[good]


def _place_greedily(made: Plan) -> None:
    """Give each piece that leaves its rack, the largest first, the path whose busiest link stays lightest; step by step."""
    topology, flows = made.topology, made.flows
    leaf_F, to_F = topology.leaf_H[flows.src_F], topology.leaf_H[flows.dst_F]
    random = np.random.default_rng([made.seed, 2])
    speed_L = topology.capacity_L.astype(float)
    for step in range(flows.num_steps):
        busy_L = np.zeros(topology.num_links)
        pieces = made.step(step)
        # Equal ones in random order, since their order in the collective is no accident.
        pieces = pieces[random.permutation(len(pieces))]
        for piece in pieces[np.argsort(-made.size_Q[pieces], kind="stable")].tolist():
            leaf, to = int(leaf_F[made.flow_Q[piece]]), int(to_F[made.flow_Q[piece]])
            if leaf == to:
                continue
            good, _ = good_paths(topology, leaf, to)
            links_PD = topology.paths(leaf, to)[good]
            adds_PD = made.size_Q[piece] / speed_L[links_PD]
            best = int((busy_L[links_PD] + adds_PD).max(1).argmin())
            busy_L[links_PD[best]] += adds_PD[best]
            made.path_Q[piece] = good[best]


def _windows(flows: Flows, topology: Topology, flow_Q: np.ndarray, window: int, seed: int) -> np.ndarray:
    """int32 [Q]: the window of each piece: of a host and step, leaves in random order fill one after the other."""
    src_Q, step_Q, to_Q = flows.src_F[flow_Q], flows.step_F[flow_Q], topology.leaf_H[flows.dst_F[flow_Q]]
    order = np.lexsort((to_Q, src_Q, step_Q))
    senders = np.flatnonzero((np.diff(src_Q[order]) != 0) | (np.diff(step_Q[order]) != 0)) + 1
    random, window_Q = np.random.default_rng([seed, 4]), np.zeros(len(flow_Q), np.int32)
    for pieces in np.split(order, senders):
        groups = np.split(pieces, np.flatnonzero(np.diff(to_Q[pieces])) + 1)
        number, filled = 0, 0
        for place in random.permutation(len(groups)).tolist():
            if filled and filled + len(groups[place]) > window:
                number, filled = number + 1, 0
            window_Q[groups[place]] = number
            filled += len(groups[place])
    return window_Q


def routes(made: Plan) -> Routes:
    """The links of every piece, hosts' own cables first and last; a spread piece has all links of its good paths."""
    topology, flows = made.topology, made.flows
    src_Q, dst_Q = flows.src_F[made.flow_Q], flows.dst_F[made.flow_Q]
    leaf_Q, to_Q = topology.leaf_H[src_Q].astype(np.int64), topology.leaf_H[dst_Q].astype(np.int64)
    key_Q = (leaf_Q * len(topology.names) + to_Q) * (2**13) + made.path_Q + 1
    kinds, kind_Q = np.unique(key_Q, return_inverse=True)
    first = np.zeros(len(kinds), np.int64)
    first[kind_Q[::-1]] = np.arange(len(key_Q))[::-1]
    fabric = [_fabric_links(topology, int(leaf_Q[q]), int(to_Q[q]), int(made.path_Q[q])) for q in first.tolist()]
    length = np.array([len(links) for links, _ in fabric], np.int64)
    start = np.concatenate([[0], np.cumsum(length[kind_Q] + 2)])
    link_E, weight_E = np.empty(start[-1], np.int32), np.ones(start[-1])
    link_E[start[:-1]], link_E[start[1:] - 1] = topology.host_up_H[src_Q], topology.host_down_H[dst_Q]
    # All pieces of one kind at once.
    order = np.argsort(kind_Q, kind="stable")
    for pieces, (links, share) in zip(
        np.split(order, np.cumsum(np.bincount(kind_Q))[:-1])[: len(kinds)], fabric, strict=True
    ):
        at = start[pieces][:, None] + 1 + np.arange(len(links))
        link_E[at], weight_E[at] = links, share
    return Routes(start, link_E, weight_E)


def _fabric_links(topology: Topology, leaf: int, to: int, path: int) -> tuple[np.ndarray, np.ndarray]:
    """Links between two leaves over one path or, `SPREAD`, over all good ones; and which share of the bytes each takes."""
    paths_PD = topology.paths(leaf, to)
    if path != SPREAD:
        return paths_PD[path], np.ones(paths_PD.shape[1])
    good, _ = good_paths(topology, leaf, to)
    links, count = np.unique(paths_PD[good], return_counts=True)
    return links, count / len(good)


def loads(made: Plan, step: int | None = None) -> np.ndarray:
    """float64 [L], bytes over each link, of one step or of all."""
    start, link_E, weight_E = routes(made)
    size_Q = made.size_Q if step is None else np.where(made.flows.step_F[made.flow_Q] == step, made.size_Q, 0)
    return np.bincount(link_E, np.repeat(size_Q, np.diff(start)) * weight_E, made.topology.num_links)


def exact_loads(made: Plan) -> list[Fraction]:
    """Bytes over each link, as they are: the arithmetic is that of whole numbers and fractions."""
    topology, flows = made.topology, made.flows
    found = [Fraction(0)] * topology.num_links
    leaf_H = topology.leaf_H
    for piece in range(len(made)):
        flow, size = int(made.flow_Q[piece]), int(made.size_Q[piece])
        src, dst, path = int(flows.src_F[flow]), int(flows.dst_F[flow]), int(made.path_Q[piece])
        leaf, to = int(leaf_H[src]), int(leaf_H[dst])
        used = [path] if path != SPREAD else good_paths(topology, leaf, to)[0].tolist()
        for link in (int(topology.host_up_H[src]), int(topology.host_down_H[dst])):
            found[link] += size
        for number in used:
            for link in topology.paths(leaf, to)[number].tolist():
                found[link] += Fraction(size, len(used))
    return found


def busiest(made: Plan) -> float:
    """Seconds for which the busiest link of a step works, added up over the steps.

    No transport ends before where there is one step, or where everybody waits for the end of a step. Ranks that go on by themselves may
    end before, since another link is busiest in another step; no transport ends before ``(8 * loads(made) / capacity_L).max()``, the time
    for which a link works in all steps.
    """
    num_links, num_steps = made.topology.num_links, made.flows.num_steps
    start, link_E, weight_E = routes(made)
    place_E = link_E + np.repeat(made.flows.step_F[made.flow_Q].astype(np.int64) * num_links, np.diff(start))
    bytes_SL = np.bincount(place_E, np.repeat(made.size_Q, np.diff(start)) * weight_E, num_steps * num_links)
    return float((bytes_SL.reshape(num_steps, num_links) * 8 / made.topology.capacity_L).max(1, initial=0.0).sum())


def lower_bound(flows: Flows, topology: Topology) -> float:
    """What `busiest` is at least, whatever the paths, in seconds: what crosses the edges of a host or a group over their capacity.

    The sum over steps, which ranks that do not wait for the end of a step may end before. Groups are those of the topology: racks, and
    pods of a fat-tree. Infinite where nothing of an edge is left. Raises InputError for a host that the network does not have.
    """
    check_fits(flows, topology)
    capacity_L = np.where(topology.is_up_L, topology.capacity_L, 0).astype(float)
    hosts = topology.num_hosts
    out_H, back_H = capacity_L[topology.host_up_H], capacity_L[topology.host_down_H]
    groups = [_edge(topology, members, capacity_L) for members in topology.groups]
    total = 0.0
    for step in range(flows.num_steps):
        of = flows.step(step)
        sent_H = np.bincount(of.src_F, of.size_F, hosts)
        taken_H = np.bincount(of.dst_F, of.size_F, hosts)
        seconds = [_over(sent_H, out_H), _over(taken_H, back_H)]
        for inside_H, out, back in groups:
            from_in, to_in = inside_H[of.src_F], inside_H[of.dst_F]
            for crosses_F, capacity in ((from_in & ~to_in, out), (~from_in & to_in, back)):
                seconds.append(_over(np.array([of.size_F[crosses_F].sum()], float), np.array([capacity])))
        total += max(seconds)
    return total


def _edge(topology: Topology, members: frozenset[int], capacity_L: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Which hosts are inside, and the bit/s out of and into a set of nodes."""
    inside_N = np.zeros(len(topology.names), bool)
    inside_N[list(members)] = True
    begins, ends = inside_N[topology.link_from], inside_N[topology.link_to]
    return inside_N[: topology.num_hosts], capacity_L[begins & ~ends].sum(), capacity_L[~begins & ends].sum()


def _over(size: np.ndarray, capacity: np.ndarray) -> float:
    """The most seconds that bytes take; infinite where there are some and nothing carries them."""
    asked = size > 0
    seconds = np.full(len(size), np.inf)
    np.divide(8 * size, capacity, out=seconds, where=capacity > 0)
    return float(seconds[asked].max(initial=0.0))


def check(made: Plan) -> None:
    """Raise InputError unless the pieces of each flow are exactly its bytes, each once, and every path is there and has not failed."""
    flows, topology = made.flows, made.topology
    columns = (made.flow_Q, made.path_Q, made.offset_Q, made.size_Q)
    if len({len(column) for column in columns}) > 1:
        raise InputError("columns of a plan must be of one length")
    if len(made) and (made.flow_Q.min() < 0 or made.flow_Q.max() >= len(flows)):
        raise InputError(f"the plan has a piece of flow {made.flow_Q.max()}; there are {len(flows)} flows")
    order = np.lexsort((made.offset_Q, made.flow_Q))
    flow_Q, begin_Q, size_Q = made.flow_Q[order], made.offset_Q[order], made.size_Q[order]
    first_Q = np.concatenate([[True], np.diff(flow_Q) != 0])[: len(order)]
    end_Q = begin_Q + size_Q
    should_Q = np.where(first_Q, 0, np.concatenate([[0], end_Q[:-1]])[: len(order)])
    last_Q = np.concatenate([np.diff(flow_Q) != 0, [True]])[-len(order) :] if len(order) else first_Q
    wrong_Q = (size_Q < 1) | (begin_Q != should_Q) | (last_Q & (end_Q != flows.size_F[flow_Q]))
    missing = np.setdiff1d(np.arange(len(flows)), flow_Q)
    if wrong_Q.any() or len(missing):
        flow = int(flow_Q[wrong_Q.argmax()]) if wrong_Q.any() else int(missing[0])
        raise InputError(f"the pieces of flow {flow} are not its {flows.size_F[flow]:,} bytes, each once")
    known: dict[tuple[int, int], np.ndarray] = {}
    for piece in made:
        pair = int(topology.leaf_H[piece.src]), int(topology.leaf_H[piece.dst])
        if pair not in known:
            known[pair] = topology.path_capacity(*pair)
        if piece.path != SPREAD and (not 0 <= piece.path < len(known[pair]) or not known[pair][piece.path]):
            leaf, to = (topology.names[node] for node in pair)
            raise InputError(
                f"a piece goes over path {piece.path} from {leaf} to {to}, which is not there or has failed"
            )
