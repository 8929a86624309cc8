"""Networks of hosts and switches: leaf-spine, fat-tree, or any list of cables, with failed and slow cables.

A cable is two directed links. A host has one cable, to its *leaf*. Between two leaves packets take one of the shortest routes; these are
numbered in the order of the switches they pass, so path p of a leaf-spine network goes over spine p, and path (t1, t2) of a fat-tree over
the t1-th switch of the pod and its t2-th core is number t1 * k/2 + t2. Numbers stay what they are when a cable fails.
"""
# Shapes: H hosts, L directed links, P paths between two leaves, D links of a path

import difflib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from anabranch.bounds import finite, shown, whole
from anabranch.errors import CapacityError, InputError

MOST_HOSTS, MOST_SWITCHES, MOST_PATHS, MOST_CABLES = 65_536, 16_384, 4_096, 2_000_000
# Gbit/s.
SLOWEST, FASTEST = 1e-6, 1e6
GIGA = 1_000_000_000
Cable = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Topology:
    """A network; `leaf_spine`, `fat_tree` and `from_links` make one.

    Attributes:
        about: what it is, in a few words.
        names: of the nodes, hosts first.
        num_hosts: H.
        link_from, link_to: int32 [L], nodes. Link 2c is cable c as it was given, 2c + 1 the way back.
        capacity_L: int64 [L], bit/s.
        is_up_L: bool [L], False where the link has failed.
        groups: sets of nodes (racks, pods) whose edges bound what fits through them, see `anabranch.cluster.fabric.lower_bound`.
        latency_ns: of each link.
    """

    about: str
    names: tuple[str, ...]
    num_hosts: int
    link_from: np.ndarray
    link_to: np.ndarray
    capacity_L: np.ndarray
    is_up_L: np.ndarray
    groups: tuple[frozenset[int], ...] = ()
    latency_ns: int = 500

    # making

    @classmethod
    def leaf_spine(
        cls, leaves: int, spines: int, hosts_per_leaf: int, cap_up: float = 400.0, cap_host: float = 400.0
    ) -> Self:
        """Every leaf has a cable to every spine. ``cap_up`` (leaf to spine) and ``cap_host`` are Gbit/s.

        Raises InputError for numbers that make no network, CapacityError beyond two million cables.
        """
        leaves = whole("leaves", leaves, 1, MOST_SWITCHES // 2)
        spines = whole("spines", spines, 1, MOST_PATHS)
        hosts_per_leaf = whole("hosts_per_leaf", hosts_per_leaf, 1, MOST_HOSTS)
        hosts = whole("leaves x hosts_per_leaf", leaves * hosts_per_leaf, 2, MOST_HOSTS)
        if leaves * spines > MOST_CABLES:
            raise CapacityError(
                f"{leaves:,} leaves and {spines:,} spines have {leaves * spines:,} cables; at most {MOST_CABLES:,}"
            )
        cables = [(f"host{h}", f"leaf{h // hosts_per_leaf}", cap_host) for h in range(hosts)]
        cables += [(f"leaf{a}", f"spine{b}", cap_up) for a in range(leaves) for b in range(spines)]
        about = f"leaf-spine of {leaves} leaves, {spines} spines, {hosts_per_leaf} hosts a leaf"
        order = [f"host{h}" for h in range(hosts)] + [f"leaf{a}" for a in range(leaves)]
        return cls._made(about, cables, order + [f"spine{b}" for b in range(spines)], hosts)

    @classmethod
    def fat_tree(
        cls,
        k: int,
        oversub: float = 1.0,
        *,
        hosts_per_leaf: int | None = None,
        cap_host: float = 400.0,
        cap_up: float | None = None,
    ) -> Self:
        """A tree of three tiers: k pods of k/2 leaves and k/2 aggregation switches, and (k/2)^2 cores.

        Args:
            k: ports of a switch; even.
            oversub: how many times what goes up from a leaf is less than what its hosts send; 1 for none.
            hosts_per_leaf: k/2 by default. The paper's 512 hosts are ``fat_tree(8, hosts_per_leaf=16)``.
            cap_host: Gbit/s of a host's cable.
            cap_up: Gbit/s of every other cable; by default what ``oversub`` asks for.

        Raises InputError for numbers that make no network.
        """
        k = whole("k", k, 2, 64)
        if k % 2:
            raise InputError(f"k is {k}; a fat-tree has switches with an even number of ports")
        half = k // 2
        per_leaf = half if hosts_per_leaf is None else whole("hosts_per_leaf", hosts_per_leaf, 1, MOST_HOSTS)
        hosts = whole("hosts", k * half * per_leaf, 2, MOST_HOSTS)
        oversub = finite("oversub", oversub, 0.01, 100.0)
        up = per_leaf * cap_host / half / oversub if cap_up is None else cap_up
        cables: list[tuple[str, str, float]] = [(f"host{h}", f"leaf{h // per_leaf}", cap_host) for h in range(hosts)]
        for pod in range(k):
            switches = [f"agg{pod * half + t}" for t in range(half)]
            cables += [(f"leaf{pod * half + a}", name, up) for a in range(half) for name in switches]
            cables += [(name, f"core{t * half + c}", up) for t, name in enumerate(switches) for c in range(half)]
        order = [f"host{h}" for h in range(hosts)]
        for kind, count in (("leaf", k * half), ("agg", k * half), ("core", half * half)):
            order += [f"{kind}{number}" for number in range(count)]
        made = cls._made(f"fat-tree of k = {k}, {per_leaf} hosts a leaf", cables, order, hosts)
        pods = [_pod(pod, half, per_leaf, hosts, k) for pod in range(k)]
        return replace(made, groups=(*made.groups, *pods))

    @classmethod
    def from_links(cls, links: Iterable[tuple[str, str, float]], hosts: Sequence[str] | None = None) -> Self:
        """Any network: cables as (node, node, Gbit/s).

        Args:
            links: each cable once.
            hosts: names, in the order of ranks. Default: the nodes with one cable, in the order in which they come.

        Raises InputError for a cable twice, a host with several cables, or hosts that no route connects.
        """
        rows: list[Any] = [tuple(row) for row in links]
        if wrong := [row for row in rows if len(row) != 3]:
            raise InputError(f"a cable is (node, node, Gbit/s), not {shown(wrong[0])}")
        cables = [(str(a), str(b), speed) for a, b, speed in rows]
        degree: dict[str, int] = {}
        for a, b, _ in cables:
            if a == b:
                raise InputError(f"a cable goes from {a!r} to itself")
            degree[a], degree[b] = degree.get(a, 0) + 1, degree.get(b, 0) + 1
        chosen = [name for name, count in degree.items() if count == 1] if hosts is None else [str(h) for h in hosts]
        for name in chosen:
            if degree.get(name, 0) != 1:
                raise InputError(f"host {name!r} has {degree.get(name, 0)} cables; a host has one, to its leaf")
        whole("hosts", len(dict.fromkeys(chosen)), 2, MOST_HOSTS)
        rest = [name for name in degree if name not in set(chosen)]
        about = f"network of {len(chosen)} hosts, {len(rest)} switches, {len(cables)} cables"
        made = cls._made(about, cables, [*dict.fromkeys(chosen), *rest], len(chosen))
        made._check_connected()
        return made

    @classmethod
    def _made(cls, about: str, cables: Sequence[tuple[str, str, float]], order: Sequence[str], hosts: int) -> Self:
        whole("switches", len(order) - hosts, 1, MOST_SWITCHES)
        number = {name: place for place, name in enumerate(order)}
        ends = np.array([(number[a], number[b]) for a, b, _ in cables], np.int32)
        seen: set[tuple[int, int]] = set()
        for a, b in ends.tolist():
            if (min(a, b), max(a, b)) in seen:
                raise InputError(f"the cable {order[a]} - {order[b]} is there twice; give one with the sum of both")
            seen.add((min(a, b), max(a, b)))
            if a < hosts and b < hosts:
                raise InputError(f"host {order[a]!r} has its cable to host {order[b]!r}; it must end at a switch")
        speed = np.repeat([_bits(f"capacity of {a} - {b}", gbps) for a, b, gbps in cables], 2).astype(np.int64)
        both = np.stack([ends, ends[:, ::-1]], 1).reshape(-1, 2)
        made = cls(about, tuple(order), hosts, both[:, 0].copy(), both[:, 1].copy(), speed, np.ones(len(both), bool))
        racks: dict[int, set[int]] = {}
        for host, leaf in enumerate(made.leaf_H.tolist()):
            racks.setdefault(leaf, {leaf}).add(host)
        return replace(made, groups=tuple(frozenset(rack) for rack in racks.values()))

    def _check_connected(self) -> None:
        first = int(self.leaf_H[0])
        for host, leaf in enumerate(self.leaf_H.tolist()):
            if leaf not in self._distances(first):
                raise InputError(f"no route from host {self.names[0]!r} to host {self.names[host]!r}")

    # changing

    def with_failed(self, cables: Iterable[Cable | str]) -> Self:
        """A copy where both directions of these cables have failed: ``("leaf0", "spine3")`` or ``"leaf0-spine3"``.

        Raises InputError for a cable that is not there.
        """
        up_L = self.is_up_L.copy()
        for cable in [cables] if isinstance(cables, str) else cables:
            up_L[self.cable(cable)] = False
        return replace(self, is_up_L=up_L)

    def with_capacity(self, capacity: Mapping[Cable | str, float]) -> Self:
        """A copy where these cables have other speeds, in Gbit/s. Raises InputError for a cable that is not there."""
        capacity_L = self.capacity_L.copy()
        for cable, gbps in capacity.items():
            capacity_L[self.cable(cable)] = _bits(f"capacity of {cable}", gbps)
        return replace(self, capacity_L=capacity_L)

    def cable(self, cable: Cable | str) -> list[int]:
        """The two links of a cable, as it was made first."""
        ends = self._ends(cable) if isinstance(cable, str) else tuple(map(str, cable))
        for end in ends:
            if end not in self._number:
                near = difflib.get_close_matches(end, self.names, n=1)
                raise InputError(f"the network has no node {end!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        place = self._links.get((self._number[ends[0]], self._number[ends[1]])) if len(ends) == 2 else None
        if place is None:
            raise InputError(f"the network has no cable {' - '.join(ends)}")
        return [place - place % 2, place - place % 2 + 1]

    def _ends(self, text: str) -> tuple[str, ...]:
        # A name may have a dash in it.
        parts = text.split("-")
        for place in range(1, len(parts)):
            ends = "-".join(parts[:place]), "-".join(parts[place:])
            if all(end in self._number for end in ends):
                return ends
        return tuple(parts) if len(parts) == 2 else (text,)

    # asking

    @property
    def num_links(self) -> int:
        """L."""
        return len(self.link_from)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def _links(self) -> dict[tuple[int, int], int]:
        return {
            pair: place for place, pair in enumerate(zip(self.link_from.tolist(), self.link_to.tolist(), strict=True))
        }

    @cached_property
    def host_up_H(self) -> np.ndarray:
        """int32 [H], the link from each host to its leaf."""
        found_H = np.full(self.num_hosts, -1, np.int32)
        links = np.flatnonzero(self.link_from < self.num_hosts).astype(np.int32)
        found_H[self.link_from[links]] = links
        return found_H

    @cached_property
    def host_down_H(self) -> np.ndarray:
        """int32 [H], the link from the leaf to each host."""
        return self.host_up_H ^ 1

    @cached_property
    def leaf_H(self) -> np.ndarray:
        """int32 [H], the leaf of each host, a node."""
        return self.link_to[self.host_up_H]

    @cached_property
    def _next(self) -> dict[int, list[tuple[int, int]]]:
        """Of each switch, (switch, link) that it has cables to, in order."""
        found: dict[int, list[tuple[int, int]]] = {node: [] for node in range(self.num_hosts, len(self.names))}
        for link, (a, b) in enumerate(zip(self.link_from.tolist(), self.link_to.tolist(), strict=True)):
            if a >= self.num_hosts and b >= self.num_hosts:
                found[a].append((b, link))
        return {node: sorted(links) for node, links in found.items()}

    @cached_property
    def _known(self) -> dict[Any, Any]:
        # Paths and distances do not depend on what has failed, but the object may be copied with other links.
        return {}

    def _distances(self, to: int) -> dict[int, int]:
        """Links from each switch to ``to``."""
        if ("to", to) not in self._known:
            distance, queue = {to: 0}, deque([to])
            while queue:
                node = queue.popleft()
                for other, _ in self._next[node]:
                    if other not in distance:
                        distance[other] = distance[node] + 1
                        queue.append(other)
            self._known["to", to] = distance
        return self._known["to", to]

    def paths(self, leaf: int, to: int) -> np.ndarray:
        """int32 [P, D]: the links of each shortest path between two leaves; [1, 0] within one.

        Raises CapacityError beyond 4,096 paths, InputError where there is none.
        """
        if (leaf, to) not in self._known:
            distance = self._distances(to)
            if leaf not in distance:
                raise InputError(f"no route from {self.names[leaf]} to {self.names[to]}")
            paths: list[list[int]] = [[]]
            ends = [leaf]
            for left in range(distance[leaf], 0, -1):
                further = [
                    ([*path, link], other)
                    for path, end in zip(paths, ends, strict=True)
                    for other, link in self._next[end]
                    if distance.get(other) == left - 1
                ]
                if len(further) > MOST_PATHS:
                    raise CapacityError(
                        f"more than {MOST_PATHS:,} paths from {self.names[leaf]} to {self.names[to]}; the planner numbers each"
                    )
                paths, ends = [path for path, _ in further], [end for _, end in further]
            self._known[leaf, to] = np.array(paths, np.int32).reshape(len(paths), distance[leaf])
        return self._known[leaf, to]

    def path_capacity(self, leaf: int, to: int) -> np.ndarray:
        """int64 [P], bit/s: the slowest link of each path; 0 where one has failed. Hosts' own cables do not count."""
        capacity_L = np.where(self.is_up_L, self.capacity_L, 0)
        paths_PD = self.paths(leaf, to)
        if not paths_PD.shape[1]:
            return np.full(1, self.capacity_L.max(), np.int64)
        return capacity_L[paths_PD].min(1)

    def link_name(self, link: int) -> str:
        """``leaf0 > spine3``."""
        return f"{self.names[self.link_from[link]]} > {self.names[self.link_to[link]]}"

    def failed_cables(self) -> list[str]:
        """Names of the cables with a failed link, in order."""
        return [
            self.link_name(2 * c).replace(" > ", "-")
            for c in np.flatnonzero(~self.is_up_L.reshape(-1, 2).all(1)).tolist()
        ]


def _bits(name: str, gbps: float) -> int:
    return round(finite(name, gbps, SLOWEST, FASTEST) * GIGA)


def _pod(pod: int, half: int, per_leaf: int, hosts: int, k: int) -> frozenset[int]:
    own = range(pod * half, (pod + 1) * half)
    members = {host for leaf in own for host in range(leaf * per_leaf, (leaf + 1) * per_leaf)}
    return frozenset(members | {hosts + leaf for leaf in own} | {hosts + k * half + agg for agg in own})
