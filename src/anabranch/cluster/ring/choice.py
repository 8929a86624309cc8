"""Which scheme is quickest where: `auto`, and `plan_attention`, which says why.

    print(plan_attention(length=32768, world=8, heads=32, kv_heads=8, head_dim=128, causal=True, layout="zigzag").explain())

The messages and the work are those of the schedule that would run, so what is counted here is what is sent. Ranks and links are the
resources of a discrete-event simulation: a rank computes one block at a time, a directed link carries one message at a time, both at once.

Bytes per rank and step, forward, with b bytes per number and o per number of a partial result:

    ring          2 n G D b one way
    ring2         n G D b each way
    token_ring    n H D b one way, n H D o + 4 n H the other
    all_gather    2 n G D b to each rank at once, and memory for all of it

So with o = b TokenRing beats the ring where H < 2 G, ties at groups of 2 and loses with larger ones; it wins clearly where queries are few
against keys that stay (`kv_cached`).
"""
# Shapes: N ranks, n rows of a rank, H query heads, G key heads, D head width

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from anabranch.cluster.events import Task, run_tasks
from anabranch.cluster.ring.layout import Layout, Placement
from anabranch.cluster.ring.pieces import Mask
from anabranch.cluster.ring.schedule import SCHEMES, Schedule
from anabranch.errors import ConfigError, InputError

__all__ = ["AttentionPlan", "SchemeCost", "Sizes", "Topology", "choose", "plan_attention"]

# Of equally quick ones the first: fewer messages, less memory.
ORDER = ("ring", "ring2", "token_ring", "all_gather")
assert set(ORDER) == set(SCHEMES)


@dataclass(frozen=True)
class Topology:
    """How ranks are connected.

    Attributes:
        kind: ``mesh``: a link of its own for each directed pair; ``ring``: links between neighbours, one each way, others are reached over
            several; ``switch``: one port out of each rank.
        bandwidth: bytes per second of a directed link.
        latency_s: of a message, on each link.
        flops: floating point operations per second of a rank; None for so many that links alone count.
        matrix: bytes per second from each rank to each, in the place of ``bandwidth`` in a mesh.
        gather_bytes: ``all_gather`` is left out where the blocks of the others take more memory than this.

    Raises ConfigError for a kind that is none, and for numbers that are not positive.
    """

    kind: Literal["mesh", "ring", "switch"] = "mesh"
    bandwidth: float = 16e9
    latency_s: float = 1e-5
    flops: float | None = None
    matrix: tuple[tuple[float, ...], ...] | None = None
    gather_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.kind not in ("mesh", "ring", "switch"):
            raise ConfigError(f"kind is {self.kind!r}; use mesh, ring or switch")
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

    def route(self, source: int, to: int, world: int) -> list[tuple[Any, float]]:
        """The links that a message takes, each with its bytes per second."""
        if self.kind == "switch":
            return [((source, "out"), self.bandwidth)]
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


@dataclass(frozen=True)
class AttentionPlan:
    """The costs of all schemes.

    Attributes:
        choice: the quickest of those that are allowed.
        costs: in the order of `ORDER`.
        topology: that was assumed.
        sizes: likewise.
        backward: whether of a backward pass.
    """

    choice: str
    costs: tuple[SchemeCost, ...]
    topology: Topology
    sizes: Sizes
    backward: bool

    def explain(self) -> str:
        """The costs as a table, the quickest marked."""
        lines = [
            f"{'':2}{'scheme':<12}{'time (ms)':>12}{'compute (ms)':>14}{'sent (MB)':>12}{'busiest link (MB)':>19}{'memory (MB)':>13}"
        ]
        for cost in self.costs:
            mark = "*" if cost.scheme == self.choice else " "
            beside = "" if cost.is_allowed else "  too much memory"
            lines.append(
                f"{mark:2}{cost.scheme:<12}{cost.time_s * 1e3:>12.3f}{cost.compute_s * 1e3:>14.3f}{cost.size_bytes / 1e6:>12.3f}"
                f"{cost.link_bytes / 1e6:>19.3f}{cost.memory_bytes / 1e6:>13.3f}{beside}"
            )
        group = self.sizes.heads // self.sizes.kv_heads
        lines.append(
            f"{self.sizes.heads} query heads over {self.sizes.kv_heads} key heads (groups of {group}): "
            f"a travelling query and its result are "
            f"{self.sizes.row_bytes('travel', moves_queries=True, backward=self.backward):,} and "
            f"{self.sizes.row_bytes('home', moves_queries=True, backward=self.backward):,} bytes a row, keys and values "
            f"{self.sizes.row_bytes('travel', moves_queries=False, backward=self.backward):,}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "sizes": self.sizes._asdict(), "costs": [asdict(cost) for cost in self.costs]}


def plan_attention(
    length: int,
    world: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 1,
    causal: bool = True,
    window: int | None = None,
    layout: Literal["contiguous", "zigzag", "stripe"] = "zigzag",
    documents: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    kv_cached: int = 0,
    backward: bool = False,
    topology: Topology | None = None,
) -> AttentionPlan:
    """What each scheme would cost for ``length`` positions over ``world`` ranks.

    Args:
        length: S, positions that ask.
        world: N.
        heads, kv_heads, head_dim: H, G (None: H) and D.
        dtype: of q, k and v.
        batch: B.
        causal, window, layout, documents, out_dtype: as of `context_parallel_attention`.
        kv_cached: positions before those that ask, whose keys and values lie on the ranks already, a stretch on each.
        backward: of the backward pass.
        topology: of the ranks; None for `Topology()`.

    Raises InputError and ConfigError for what cannot be.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if min(heads, kv_heads, head_dim, batch) < 1 or heads % kv_heads:
        raise InputError(
            f"heads is {heads}, kv_heads {kv_heads}, head_dim {head_dim} and batch {batch}; all are at least 1, and kv_heads divides heads"
        )
    fine = torch.promote_types(dtype, torch.float32)
    home = fine if out_dtype is None else out_dtype
    sizes = Sizes(batch, heads, kv_heads, head_dim, dtype.itemsize, fine.itemsize, home.itemsize)
    places = None if documents is None else tuple(documents)
    queries = Layout(layout, world, length, places, first=kv_cached).placement
    keys = queries
    if kv_cached:
        keys = Layout("contiguous", world, kv_cached).placement.followed_by(queries)
    topology = topology or Topology()
    costs = _costs(queries, keys, Mask(causal, window), sizes, topology, backward)
    return AttentionPlan(_quickest(costs), costs, topology, sizes, backward)


def choose(queries: Placement, keys: Placement, mask: Mask, sizes: Sizes, topology: Topology) -> str:
    """The quickest scheme of forward and backward together."""
    costs = [_costs(queries, keys, mask, sizes, topology, backward) for backward in (False, True)]
    return min(
        (forward for forward in costs[0] if forward.is_allowed),
        key=lambda cost: sum(pass_[costs[0].index(cost)].time_s for pass_ in costs),
    ).scheme


def _quickest(costs: Sequence[SchemeCost]) -> str:
    return min((cost for cost in costs if cost.is_allowed), key=lambda cost: cost.time_s).scheme


@lru_cache(maxsize=256)
def _costs(
    queries: Placement, keys: Placement, mask: Mask, sizes: Sizes, topology: Topology, backward: bool
) -> tuple[SchemeCost, ...]:
    return tuple(_cost(Schedule(scheme, queries, keys, mask), sizes, topology, backward) for scheme in ORDER)


def _cost(schedule: Schedule, sizes: Sizes, topology: Topology, backward: bool) -> SchemeCost:
    """By the schedule's own messages and work."""
    brings_home = schedule.moves_queries or backward
    world = schedule.world
    tasks: list[Task] = []
    computed: dict[tuple[int, int], int] = {}
    arrived: dict[tuple[int, int], list[int]] = {}
    returned: dict[tuple[int, int], list[int]] = {}
    link_bytes: dict[Any, int] = {}
    total, compute = 0, [0.0] * world
    messages: dict[tuple[int, str], list[Any]] = {}
    for message in schedule.messages(brings_home=brings_home):
        messages.setdefault((message.step, message.flow), []).append(message)

    def send(message: Any, after: tuple[int, ...]) -> int:
        nonlocal total
        rows = message.rows[1] - message.rows[0]
        size = rows * sizes.row_bytes(message.flow, moves_queries=schedule.moves_queries, backward=backward)
        total += size
        for link, speed in topology.route(message.source, message.to, world):
            tasks.append(Task(link, size / speed, after, topology.latency_s))
            after = (len(tasks) - 1,)
            link_bytes[link] = link_bytes.get(link, 0) + size
        return len(tasks) - 1

    for step in range(world):
        for message in messages.get((step, "travel"), []):
            # A block goes on when its sender has come to this step, and has it.
            came = arrived.get((message.source, step), [])
            after = () if schedule.is_direct or not step else (computed[message.source, step - 1], *came)
            arrived.setdefault((message.to, step + 1), []).append(send(message, after))
        for rank in range(world):
            work = sizes.work(schedule.pairs(rank, step), backward=backward)
            seconds = 0.0 if topology.flops is None else work / topology.flops
            compute[rank] += seconds
            before = [computed[rank, step - 1]] if step else []
            needs = (*before, *arrived.get((rank, step), []), *returned.get((rank, step - 2), []))
            tasks.append(Task(("rank", rank), seconds, needs))
            computed[rank, step] = len(tasks) - 1
        for message in messages.get((step, "home"), []):
            returned.setdefault((message.to, step), []).append(send(message, (computed[message.source, step],)))
    memory = _memory(schedule, sizes, backward)
    return SchemeCost(
        schedule.scheme,
        max((interval.end_s for interval in run_tasks(tasks)), default=0.0),
        max(compute, default=0.0),
        total,
        max(link_bytes.values(), default=0),
        memory,
        not schedule.is_direct or memory <= topology.gather_bytes,
    )


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
