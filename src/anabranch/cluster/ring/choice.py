"""Which scheme is quickest where: `auto`, and `plan_attention`, which says why. Both take the least of the same sums.

    print(plan_attention(length=32768, world=8, heads=32, kv_heads=8, head_dim=128, causal=True, layout="zigzag").explain())

The messages and the work are those of the schedule that would run, so what is counted here is what is sent. Ranks and links are the
resources of a discrete-event simulation: a rank computes one block at a time, a directed link carries one message at a time, both at once.

Bytes per rank and step, forward, with b bytes per number and o per number of a partial result:

    ring          2 n G D b one way
    ring2         n G D b each way
    token_ring    n H D b one way, n H D o + 4 n H the other
    all_gather    2 n G D b to each rank at once, and memory for all of it
    ulysses       n (2 H + 2 G) D b / N to each rank in all, where heads divide
    hybrid        of M nodes: token_ring inside of a node, M times; and M - 1 times 2 n G D b of a rank out of its node, in all

So with o = b TokenRing beats the ring where H < 2 G, ties at groups of 2 and loses with larger ones; it wins clearly where queries are few
against keys that stay (`kv_cached`).
"""
# Shapes: N ranks, n rows of a rank, H query heads, G key heads, D head width

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from anabranch.cluster.ring.by_heads import head_shares, schedule_by_heads
from anabranch.cluster.ring.costs import (
    ORDER,
    SCHEMES,
    SchemeCost,
    Sizes,
    Topology,
    cost_by_heads,
    cost_of,
    cost_of_nodes,
)
from anabranch.cluster.ring.hybrid import Hybrid, hybrid_of
from anabranch.cluster.ring.layout import Layout, Placement
from anabranch.cluster.ring.pieces import Mask
from anabranch.cluster.ring.schedule import RINGS, schedule_of
from anabranch.errors import InputError

__all__ = ["AttentionPlan", "choose", "plan_attention"]


@dataclass(frozen=True)
class AttentionPlan:
    """The costs of all schemes.

    Attributes:
        choice: the quickest of those that are allowed, which is what ``auto`` runs: of a forward pass where no gradient is asked for, of
            forward and backward pass together in training.
        costs: in the order of `ORDER`; behind them, where the topology has nodes, that of ``hybrid``.
        topology: that was assumed.
        sizes: likewise.
        backward: whether ``costs`` are of the backward pass, and ``choice`` of training.
        auto_s: seconds by which ``choice`` is the quickest, of each of the costs: of a forward pass, or of both passes.
    """

    choice: str
    costs: tuple[SchemeCost, ...]
    topology: Topology
    sizes: Sizes
    backward: bool
    auto_s: tuple[float, ...]

    def explain(self) -> str:
        """The costs as a table, the one that ``auto`` runs marked; of a backward pass with the time of both passes, by which it is."""
        both = f"{'both (ms)':>12}" if self.backward else ""
        lines = [
            f"{'':2}{'scheme':<12}{'time (ms)':>12}{both}{'compute (ms)':>14}{'sent (MB)':>12}{'busiest link (MB)':>19}{'memory (MB)':>13}"
        ]
        for cost, auto_s in zip(self.costs, self.auto_s, strict=True):
            mark = "*" if cost.scheme == self.choice else " "
            both = f"{auto_s * 1e3:>12.3f}" if self.backward else ""
            beside = "" if cost.is_allowed else "  too much memory"
            lines.append(
                f"{mark:2}{cost.scheme:<12}{cost.time_s * 1e3:>12.3f}{both}{cost.compute_s * 1e3:>14.3f}{cost.size_bytes / 1e6:>12.3f}"
                f"{cost.link_bytes / 1e6:>19.3f}{cost.memory_bytes / 1e6:>13.3f}{beside}"
            )
        lines.append(f"auto runs {self.choice}, by the time of {self.passes}")
        group = self.sizes.heads // self.sizes.kv_heads
        lines.append(
            f"{self.sizes.heads} query heads over {self.sizes.kv_heads} key heads (groups of {group}): "
            f"a travelling query and its result are "
            f"{self.sizes.row_bytes('travel', moves_queries=True, backward=self.backward):,} and "
            f"{self.sizes.row_bytes('home', moves_queries=True, backward=self.backward):,} bytes a row, keys and values "
            f"{self.sizes.row_bytes('travel', moves_queries=False, backward=self.backward):,}"
        )
        return "\n".join(lines)

    @property
    def passes(self) -> str:
        """What ``choice`` is the quickest of, in words."""
        return "forward and backward together" if self.backward else "a forward pass"

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
    schemes: Sequence[str] | None = None,
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
        backward: costs of the backward pass, and the choice of training; without it both of a forward pass alone.
        topology: of the ranks; None for `Topology()`.
        schemes: that are compared; None for all that the heads allow.

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
    costs, auto_s = _compared(queries, keys, Mask(causal, window), sizes, topology, backward)
    if schemes is not None:
        known = (*SCHEMES, Hybrid.scheme)
        if unknown := [name for name in schemes if name not in known]:
            raise InputError(f"schemes has {unknown[0]!r}; use {', '.join(known)}")
        kept = [place for place, cost in enumerate(costs) if cost.scheme in schemes]
        costs, auto_s = tuple(costs[place] for place in kept), tuple(auto_s[place] for place in kept)
        if not any(cost.is_allowed for cost in costs):
            raise InputError(f"none of the schemes {', '.join(schemes)} can be used here; name another")
    return AttentionPlan(_quickest(costs, auto_s), costs, topology, sizes, backward, auto_s)


def choose(queries: Placement, keys: Placement, mask: Mask, sizes: Sizes, topology: Topology, *, backward: bool) -> str:
    """The scheme that ``auto`` runs, and that `plan_attention` chooses: the quickest of a forward pass, or of both passes together.

    ``backward`` says whether a gradient is asked for.
    """
    return _quickest(*_compared(queries, keys, mask, sizes, topology, backward))


def _compared(
    queries: Placement, keys: Placement, mask: Mask, sizes: Sizes, topology: Topology, backward: bool
) -> tuple[tuple[SchemeCost, ...], tuple[float, ...]]:
    """The costs of the schemes, of the backward pass if there is one, and the seconds of all passes by which they are compared."""
    costs = _costs(queries, keys, mask, sizes, topology, False)
    seconds = [cost.time_s for cost in costs]
    if backward:
        # Whether there is room for the blocks of all_gather, which are as many in both, either pass says.
        costs = _costs(queries, keys, mask, sizes, topology, True)
        seconds = [one + cost.time_s for one, cost in zip(seconds, costs, strict=True)]
    return costs, tuple(seconds)


def _quickest(costs: Sequence[SchemeCost], auto_s: Sequence[float]) -> str:
    allowed = [place for place, cost in enumerate(costs) if cost.is_allowed]
    return costs[min(allowed, key=lambda place: auto_s[place])].scheme


@lru_cache(maxsize=256)
def _costs(
    queries: Placement, keys: Placement, mask: Mask, sizes: Sizes, topology: Topology, backward: bool
) -> tuple[SchemeCost, ...]:
    costs = [
        cost_of(schedule_of(scheme, queries, keys, mask), sizes, topology, backward)
        for scheme in ORDER
        if scheme in RINGS
    ]
    with suppress(InputError):
        head_shares(sizes.heads, sizes.kv_heads, queries.world)
        costs.append(cost_by_heads(schedule_by_heads(queries, keys, mask), sizes, topology, backward))
    size = topology.node_size
    if size is not None and 1 < size < queries.world and queries.world % size == 0:
        costs.append(cost_of_nodes(hybrid_of(queries, keys, mask, size), sizes, topology, backward))
    return tuple(costs)
