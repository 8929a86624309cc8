"""What a scheme costs on a topology: the tasks of its messages and its work, simulated."""
# Shapes: N ranks, n rows of a rank, H query heads, G key heads, D head width

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from anabranch.cluster.events import Task, run_tasks
from anabranch.cluster.ring.by_heads import ByHeads, head_shares
from anabranch.cluster.ring.hybrid import Hybrid
from anabranch.cluster.ring.schedule import RINGS, Message, Schedule
from anabranch.errors import ConfigError

__all__ = ["ORDER", "SCHEMES", "SchemeCost", "Sizes", "Topology", "cost_by_heads", "cost_of", "cost_of_nodes"]

# Of equally quick ones the first: fewer messages, less memory.
ORDER = ("ring", "ring2", "token_ring", "all_gather", "ulysses")
SCHEMES = (*RINGS, ByHeads.scheme)
assert set(ORDER) == set(SCHEMES)


@dataclass(frozen=True)
class Topology:
    """How ranks are connected.

    Attributes:
        kind: ``mesh``: a link of its own for each directed pair; ``ring``: links between neighbours, one each way, others are reached over
            several; ``switch``: one port out of each rank; ``nodes``: a mesh inside each node, and one port out of each node.
        bandwidth: bytes per second of a directed link; of ``nodes``, inside them.
        latency_s: of a message, on each link.
        flops: floating point operations per second of a rank; None for so many that links alone count.
        matrix: bytes per second from each rank to each, in the place of ``bandwidth`` in a mesh.
        node_size: ranks of a node, which follow each other: with them ``hybrid`` is looked at, in any kind; None for none.
        between: bytes per second out of each node, of ``nodes``.
        gather_bytes: ``all_gather`` is left out where the blocks of the others take more memory than this.

    Raises ConfigError for a kind that is none, and for numbers that are not positive.
    """

    kind: Literal["mesh", "ring", "switch", "nodes"] = "mesh"
    bandwidth: float = 16e9
    latency_s: float = 1e-5
    flops: float | None = None
    matrix: tuple[tuple[float, ...], ...] | None = None
    gather_bytes: int = 64 << 20
    node_size: int | None = None
    between: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("mesh", "ring", "switch", "nodes"):
            raise ConfigError(f"kind is {self.kind!r}; use mesh, ring, switch or nodes")
        self._check_nodes()
        if not self.bandwidth > 0 or self.latency_s < 0 or (self.flops is not None and not self.flops > 0):
            raise ConfigError(
                f"bandwidth is {self.bandwidth}, latency_s {self.latency_s} and flops {self.flops}; use positive numbers "
                "(a latency may be 0)"
            )
        if self.matrix is not None:
            if self.kind != "mesh":
                raise ConfigError(f"kind is {self.kind!r} and a matrix is given; only a mesh has one")
            off = [
                speed for row, speeds in enumerate(self.matrix) for column, speed in enumerate(speeds) if row != column
            ]
            if any(len(speeds) != len(self.matrix) for speeds in self.matrix) or not all(speed > 0 for speed in off):
                raise ConfigError("matrix must be square, with positive numbers beside its diagonal")

    def _check_nodes(self) -> None:
        if self.node_size is not None and self.node_size < 1:
            raise ConfigError(f"node_size is {self.node_size}; use at least 1")
        if (self.kind == "nodes") != (self.between is not None) or (self.kind == "nodes" and self.node_size is None):
            raise ConfigError(
                f"kind is {self.kind!r}, node_size {self.node_size} and between {self.between}; nodes have both, and between goes with no "
                "other kind"
            )
        if self.between is not None and not self.between > 0:
            raise ConfigError(f"between is {self.between}; use a positive number of bytes per second")

    def route(self, source: int, to: int, world: int) -> list[tuple[Any, float]]:
        """The links that a message takes, each with its bytes per second."""
        if self.kind == "switch":
            return [((source, "out"), self.bandwidth)]
        if self.kind == "nodes":
            assert self.node_size is not None, "it is checked"
            assert self.between is not None, "it is checked"
            node = source // self.node_size
            if node != to // self.node_size:
                return [((node, "node"), self.between)]
        if self.kind == "ring":
            ahead = (to - source) % world
            turn, hops = (1, ahead) if ahead <= world - ahead else (-1, world - ahead)
            stations = [(source + turn * hop) % world for hop in range(hops + 1)]
            return [((one, other), self.bandwidth) for one, other in pairwise(stations)]
        if self.matrix is None:
            return [((source, to), self.bandwidth)]
        if len(self.matrix) != world:
            raise ConfigError(f"matrix is of {len(self.matrix)} ranks, and there are {world}")
        return [((source, to), self.matrix[source][to])]


class Sizes(NamedTuple):
    """What a row weighs.

    Attributes:
        batch: B.
        heads, kv_heads: H and G.
        head_dim: D.
        item_bytes: of a number of q, k and v.
        fine_bytes: of a number of a lse, and of gradients on their way.
        home_bytes: of a number of a partial result on its way.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    fine_bytes: int
    home_bytes: int

    @classmethod
    def of(cls, query_BHLD: Tensor, key_BGSD: Tensor, home_dtype: torch.dtype | None) -> Self:
        """Those of tensors."""
        fine = torch.promote_types(query_BHLD.dtype, torch.float32)
        batch, heads, _, width = query_BHLD.shape
        home = fine if home_dtype is None else home_dtype
        return cls(batch, heads, key_BGSD.shape[1], width, query_BHLD.dtype.itemsize, fine.itemsize, home.itemsize)

    def row_bytes(self, flow: str, *, moves_queries: bool, backward: bool) -> int:
        """Of one row of a message."""
        queries, keys = self.batch * self.heads, self.batch * self.kv_heads
        if flow == "travel":
            if not moves_queries:
                return 2 * keys * self.head_dim * self.item_bytes
            whole = queries * self.head_dim * self.item_bytes
            return 2 * (whole + queries * self.fine_bytes) if backward else whole
        if not moves_queries:
            return 2 * keys * self.head_dim * self.fine_bytes if backward else 0
        if backward:
            return queries * self.head_dim * self.fine_bytes
        return queries * (self.head_dim * self.home_bytes + self.fine_bytes)

    def work(self, pairs: int, *, backward: bool) -> int:
        """Floating point operations of so many pairs of a query and a key: two products forward, five backward."""
        return pairs * self.batch * self.heads * self.head_dim * (10 if backward else 4)


@dataclass(frozen=True)
class SchemeCost:
    """What a scheme would cost.

    Attributes:
        scheme: its name.
        time_s: until the last rank is done, by simulation.
        compute_s: of the busiest rank.
        size_bytes: of all messages.
        link_bytes: of the busiest directed link (on a ring: of its hops).
        memory_bytes: of the blocks of others that a rank has at a time, at most.
        is_allowed: whether memory suffices, see `Topology.gather_bytes`.
    """

    scheme: str
    time_s: float
    compute_s: float
    size_bytes: int
    link_bytes: int
    memory_bytes: int
    is_allowed: bool


class _Wires:
    """The tasks of a pass, as they are found out: messages over links, and work of ranks."""

    def __init__(self, topology: Topology, world: int) -> None:
        self.topology, self.world = topology, world
        self.tasks: list[Task] = []
        self.link_bytes: dict[Any, int] = {}
        self.size_bytes = 0
        self.compute_s = [0.0] * world

    def send(self, source: int, to: int, size: int, after: tuple[int, ...]) -> int:
        """A message; the number of the task with which it is there."""
        self.size_bytes += size
        for link, speed in self.topology.route(source, to, self.world):
            self.tasks.append(Task(link, size / speed, after, self.topology.latency_s))
            after = (len(self.tasks) - 1,)
            self.link_bytes[link] = self.link_bytes.get(link, 0) + size
        return len(self.tasks) - 1

    def work(self, rank: int, flops: int, after: tuple[int, ...]) -> int:
        """Computing; the number of its task."""
        seconds = 0.0 if self.topology.flops is None else flops / self.topology.flops
        self.compute_s[rank] += seconds
        self.tasks.append(Task(("rank", rank), seconds, after))
        return len(self.tasks) - 1

    def cost(self, scheme: str, memory_bytes: int, *, is_allowed: bool = True) -> SchemeCost:
        """Of all of it."""
        return SchemeCost(
            scheme,
            max((interval.end_s for interval in run_tasks(self.tasks)), default=0.0),
            max(self.compute_s, default=0.0),
            self.size_bytes,
            max(self.link_bytes.values(), default=0),
            memory_bytes,
            is_allowed,
        )


def cost_of(schedule: Schedule, sizes: Sizes, topology: Topology, backward: bool) -> SchemeCost:
    """Of a ring, by the schedule's own messages and work."""
    wires = _Wires(topology, schedule.world)
    _rounds(schedule, wires, range(schedule.world), sizes, backward, dict.fromkeys(range(schedule.world), ()))
    memory = _memory(schedule, sizes, backward)
    is_allowed = not schedule.is_direct or memory <= topology.gather_bytes
    return wires.cost(schedule.scheme, memory, is_allowed=is_allowed)


def _rounds(
    schedule: Schedule,
    wires: _Wires,
    ranks: range,
    sizes: Sizes,
    backward: bool,
    ready: Mapping[int, tuple[int, ...]],
) -> dict[int, tuple[int, ...]]:
    """Add the steps of a ring.

    Args:
        ranks: of all that are simulated, those of the ring.
        ready: tasks after which a rank of the ring begins.

    Returns for each rank of the ring the tasks with which it is done.
    """
    brings_home = schedule.moves_queries or backward
    computed: dict[tuple[int, int], int] = {}
    arrived: dict[tuple[int, int], list[int]] = {}
    returned: dict[tuple[int, int], list[int]] = {}
    messages: dict[tuple[int, str], list[Message]] = {}
    for message in schedule.messages(brings_home=brings_home):
        messages.setdefault((message.step, message.flow), []).append(message)

    def send(message: Message, after: tuple[int, ...]) -> int:
        rows = message.rows[1] - message.rows[0]
        size = rows * sizes.row_bytes(message.flow, moves_queries=schedule.moves_queries, backward=backward)
        return wires.send(ranks[message.source], ranks[message.to], size, after)

    for step in range(schedule.world):
        for message in messages.get((step, "travel"), []):
            # A block goes on when its sender has come to this step, and has it.
            came = arrived.get((message.source, step), [])
            after = (computed[message.source, step - 1], *came) if step else ready[message.source]
            after = ready[message.source] if schedule.is_direct else after
            arrived.setdefault((message.to, step + 1), []).append(send(message, after))
        for rank in range(schedule.world):
            before = (computed[rank, step - 1],) if step else ready[rank]
            needs = (*before, *arrived.get((rank, step), []), *returned.get((rank, step - 2), []))
            flops = sizes.work(schedule.pairs(rank, step), backward=backward)
            computed[rank, step] = wires.work(ranks[rank], flops, needs)
        for message in messages.get((step, "home"), []):
            returned.setdefault((message.to, step), []).append(send(message, (computed[message.source, step],)))
    last = schedule.world - 1
    return {
        rank: (computed[rank, last], *returned.get((rank, last - 1), []), *returned.get((rank, last), []))
        for rank in range(schedule.world)
    }


def _memory(schedule: Schedule, sizes: Sizes, backward: bool) -> int:
    """Bytes of travelling blocks that the fullest rank has: the one it works on and the one that comes, or all of them."""
    row = sizes.row_bytes("travel", moves_queries=schedule.moves_queries, backward=backward)
    most = 0
    for rank in range(schedule.world):
        steps = [0] * schedule.world
        for share in schedule.shares:
            for step in range(1, schedule.world):
                rows = schedule.hop(share, schedule.owner(share, rank, step), step - 1)
                steps[step] += 0 if rows is None else rows[1] - rows[0]
        pairs = [one + other for one, other in pairwise(steps)]
        most = max(most, sum(steps) if schedule.is_direct else max([*steps, *pairs]))
    return most * row


def cost_by_heads(schedule: ByHeads, sizes: Sizes, topology: Topology, backward: bool) -> SchemeCost:
    """Two exchanges of all with all, and nothing but computing between them."""
    world, batch, width = schedule.world, sizes.batch, sizes.head_dim
    shares = head_shares(sizes.heads, sizes.kv_heads, world)
    ranks = [(source, to) for source in range(world) for to in range(world) if source != to]
    wires = _Wires(topology, world)
    arrived: dict[int, list[int]] = {rank: [] for rank in range(world)}

    def size_of(owner: int, other: int, *, is_home: bool) -> int:
        """Bytes of what ``other`` computes on of the rows of ``owner``, there or back."""
        queries = schedule.queries.rows[owner] * (shares[other].queries[1] - shares[other].queries[0])
        keys = schedule.keys.rows[owner] * 2 * (shares[other].keys[1] - shares[other].keys[0])
        if is_home and not backward:
            return batch * queries * (width * sizes.home_bytes + sizes.fine_bytes)
        if is_home:
            return batch * (queries + keys) * width * sizes.fine_bytes
        beside = 2 * queries * sizes.fine_bytes if backward else 0
        return batch * ((queries * (2 if backward else 1) + keys) * width * sizes.item_bytes + beside)

    there = {pair: size_of(*pair, is_home=False) for pair in ranks}
    back = {(other, owner): size_of(owner, other, is_home=True) for owner, other in ranks}
    for (source, to), size in there.items():
        arrived[to].append(wires.send(source, to, size, ()))
    flops = sizes.work(schedule.pairs(0, 0), backward=backward)
    computed = {rank: wires.work(rank, flops, tuple(arrived[rank])) for rank in range(world)}
    for (source, to), size in back.items():
        wires.send(source, to, size, (computed[source],))
    memory = max((sum(size for (_, to), size in there.items() if to == rank) for rank in range(world)), default=0)
    return wires.cost(schedule.scheme, memory)


def cost_of_nodes(schedule: Hybrid, sizes: Sizes, topology: Topology, backward: bool) -> SchemeCost:
    """Of TokenRing inside nodes and a ring of keys between them: the keys of the next step travel while this one's rings run."""
    wires = _Wires(topology, schedule.world)
    every = range(schedule.world)
    size, row, home = (
        schedule.size,
        *(sizes.row_bytes(flow, moves_queries=False, backward=backward) for flow in ("travel", "home")),
    )
    done: dict[int, tuple[int, ...]] = dict.fromkeys(every, ())
    arrived: dict[tuple[int, int], tuple[int, ...]] = {}
    returned: dict[tuple[int, int], tuple[int, ...]] = {}
    memory = 0
    for step in range(schedule.nodes):
        for rank in every:
            if (hop := schedule.onward(rank, step)) is not None:
                count = hop.rows[1] - hop.rows[0]
                after = (*done[rank], *arrived.get((rank, step), ()))
                arrived[hop.to, step + 1] = (wires.send(rank, hop.to, count * row, after),)
        ready = {
            rank: (*done[rank], *arrived.get((rank, step), ()), *returned.get((rank, step - 2), ())) for rank in every
        }
        for node in range(schedule.nodes):
            ranks = range(node * size, (node + 1) * size)
            ring = schedule.inside(node, step)
            ended = _rounds(
                ring, wires, ranks, sizes, backward, {place: ready[rank] for place, rank in enumerate(ranks)}
            )
            done |= {ranks[place]: tasks for place, tasks in ended.items()}
            keys = [_held_rows(schedule, node, step, place) for place in range(size)]
            memory = max(memory, max(keys) * row + _memory(ring, sizes, backward))
        for rank in every if backward else ():
            if (hop := schedule.homeward(rank, step)) is not None:
                count = hop.rows[1] - hop.rows[0]
                returned[hop.to, step] = (wires.send(rank, hop.to, count * home, done[rank]),)
    return wires.cost(schedule.scheme, memory)


def _held_rows(schedule: Hybrid, node: int, step: int, place: int) -> int:
    """Rows of others' keys that a rank has at a time: of this step and of the next one."""
    steps = [one for one in (step, step + 1) if 0 < one < schedule.nodes]
    return sum(last - first for first, last in (schedule.held(node, one, place) for one in steps))
