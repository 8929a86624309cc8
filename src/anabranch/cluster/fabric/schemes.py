"""Which pieces of the flows of one group go over which path: the eight schemes, each a function of sizes and paths.

A *group* is the flows of one sender (or, with ``scope="leaf"``, of all senders of a leaf) to one leaf in one step. `Group` says what a
scheme may know of it; what it gives back is `Pieces`. Sizes are whole bytes, and no byte is lost.

    ethereal   the paper's: n - n mod s flows whole, round-robin over s paths, each of the others in s / gcd(n mod s, s) equal pieces
    wrap       ours: flows end to end, cut wherever a path has its share (McNaughton's rule); sizes and path capacities may differ
    whole      the sender's round-robin without splitting
    ecmp       each flow by a hash; split:x: each flow in x pieces, each by a hash (MP-RDMA-x, NCCL with x queue pairs)
    greedy     whole flows, the largest first, each where the busiest link stays lightest; it sees all senders' flows
    spray      every packet over any path; reps: as spray, with the paths of unmarked acknowledgements again (packets only)
"""
# Shapes: n flows of a group, s paths, Q pieces

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError

SPREAD = -1
SCHEMES = ("ecmp", "split:4", "whole", "greedy", "ethereal", "wrap", "spray", "reps")
MOST_SPLIT = 64


class Pieces(NamedTuple):
    """Pieces of a group; ``flow`` and ``path`` are places in the group's flows and paths, or path is `SPREAD`."""

    flow: np.ndarray
    path: np.ndarray
    offset: np.ndarray
    size: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """What a scheme knows of a group.

    Attributes:
        size: int64 [n], bytes, in the order in which flows are to be taken.
        capacity: int64 [s], bit/s of each path, in the order in which paths are to be taken; all above 0.
        identity: uint64 [n], what a hash sees of each flow.
    """

    size: np.ndarray
    capacity: np.ndarray
    identity: np.ndarray

    @property
    def is_equal(self) -> bool:
        """Whether all flows have one size, and all paths one capacity."""
        return bool((self.size == self.size[0]).all() and (self.capacity == self.capacity[0]).all())


def cut(size: int, parts: int) -> np.ndarray:
    """int64 [parts + 1]: where a flow is cut into ``parts`` pieces, which differ by a byte at most."""
    return np.array([size * part // parts for part in range(parts + 1)], np.int64)


def num_pieces(flows: int, paths: int) -> int:
    """Pieces that ``ethereal`` makes of n equal flows over s paths: n - r + r s / gcd(r, s) with r = n mod s."""
    left = flows % paths
    return flows - left + (left * (paths // math.gcd(left, paths)) if left else 0)


def num_wrapped(flows: int, paths: int) -> int:
    """Pieces that ``wrap`` makes of n equal flows over s equal paths: n + s - gcd(n, s)."""
    return flows + paths - math.gcd(flows, paths)


def ethereal(group: Group) -> Pieces:
    """The paper's algorithm for equal flows; unequal ones, and paths of unequal capacity, are for `wrap`."""
    count, paths = len(group.size), len(group.capacity)
    left = count % paths
    whole = np.arange(count - left)
    pieces = [_whole(group, whole, whole % paths)]
    if left:
        parts = paths // math.gcd(left, paths)
        bounds = cut(int(group.size[0]), parts)
        flow = np.repeat(np.arange(count - left, count), parts)
        # Round-robin goes on where whole flows ended, which is at path 0.
        path = np.arange(len(flow)) % paths
        pieces.append(Pieces(flow, path, np.tile(bounds[:-1], left), np.tile(np.diff(bounds), left)))
    return _joined(pieces)


def wrap(group: Group) -> Pieces:
    """Flows end to end, cut where a path has its share of the bytes, which is that of the capacity."""
    end = np.cumsum(group.size)
    scale = math.gcd(*group.capacity.tolist())
    capacity = [value // scale for value in group.capacity.tolist()]
    total, all_of_it, so_far, full = int(end[-1]), sum(capacity), 0, []
    for value in capacity:
        so_far += value
        full.append(total * so_far // all_of_it)
    points = np.union1d(end, np.array(full, np.int64))
    points = points[points > 0]
    begin = np.concatenate([[0], points[:-1]])
    flow = np.searchsorted(end, begin, side="right")
    path = np.searchsorted(np.array(full, np.int64), begin, side="right")
    return Pieces(flow, path, begin - (end - group.size)[flow], points - begin)


def round_robin(group: Group) -> Pieces:
    """Whole flows, one path after the other."""
    flow = np.arange(len(group.size))
    return _whole(group, flow, flow % len(group.capacity))


def hashed(parts: int) -> Callable[[Group], Pieces]:
    """The scheme that sends each of ``parts`` pieces of a flow over a path drawn by a hash."""

    def place(group: Group) -> Pieces:
        count = len(group.size)
        flow = np.repeat(np.arange(count), parts)
        part = np.tile(np.arange(parts), count)
        # Sizes are at most 2^50 and parts 64, so products are exact.
        begin, end = group.size[flow] * part // parts, group.size[flow] * (part + 1) // parts
        with np.errstate(over="ignore"):
            drawn = mix(group.identity[flow] + part.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        path = (drawn % np.uint64(len(group.capacity))).astype(np.int64)
        kept = end > begin
        return Pieces(flow[kept], path[kept], begin[kept], (end - begin)[kept])

    return place


def spray(group: Group) -> Pieces:
    """Each flow is one piece whose packets go everywhere."""
    flow = np.arange(len(group.size))
    return _whole(group, flow, np.full(len(flow), SPREAD))


def mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, of uint64."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def placer(scheme: str) -> Callable[[Group], Pieces]:
    """The function of a scheme that places group by group. Raises InputError for a name that is none."""
    split = re.fullmatch(r"split:(\d{1,9})", scheme) if isinstance(scheme, str) else None
    if split:
        parts = int(split[1])
        if not 1 <= parts <= MOST_SPLIT:
            raise InputError(f"scheme {scheme!r} splits into {parts} pieces; 1 to {MOST_SPLIT} are allowed")
        return hashed(parts)
    if not isinstance(scheme, str) or scheme not in _PLACERS:
        raise InputError(
            f"there is no scheme {shown(scheme)}; known: {', '.join(SCHEMES)}, with any number behind split:"
        )
    return _PLACERS[scheme]


def _whole(group: Group, flow: np.ndarray, path: np.ndarray) -> Pieces:
    return Pieces(flow, path, np.zeros(len(flow), np.int64), group.size[flow])


def _joined(pieces: list[Pieces]) -> Pieces:
    made = Pieces(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
    kept = made.size > 0
    return made if kept.all() else Pieces(*(column[kept] for column in made))


_PLACERS: dict[str, Callable[[Group], Pieces]] = {
    "ecmp": hashed(1),
    "whole": round_robin,
    # Round-robin until `anabranch.cluster.fabric.planner` has placed all flows together.
    "greedy": round_robin,
    "ethereal": ethereal,
    "wrap": wrap,
    "spray": spray,
    "reps": spray,
}
