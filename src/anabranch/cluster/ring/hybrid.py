"""TokenRing inside nodes and a ring of keys between them, for links of a node that are quicker than those between nodes.

    step t, on each node:      keys and values of the node t further on are here, a rank's by the ranks of its place
        step s inside of it:   queries travel among the ranks of the node, partial results return (TokenRing)
        meanwhile:             keys and values go on to the next node

N ranks are M nodes of P, one behind another. In a pass a node sends N - P blocks of keys out, each rank M - 1 of them, where the ring of
all ranks sends N - 1, and TokenRing of all N - 1 blocks of queries and P (N - P) results. Inside a node queries take M (P - 1) hops.
Backward is the same: gradients of queries go home inside the node, those of keys and values straight to their owners.
"""
# Shapes: N ranks, M nodes, P ranks of a node, B sequences, G key heads, S keys, D head width

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from anabranch.cluster.ring.inputs import Inputs, Program, like_rows
from anabranch.cluster.ring.kernel import merge
from anabranch.cluster.ring.layout import Placement, rows_together
from anabranch.cluster.ring.link import Handle, Link, Receive, Send
from anabranch.cluster.ring.pieces import Mask, Rows
from anabranch.cluster.ring.schedule import Schedule, Share, schedule_of
from anabranch.errors import InputError

__all__ = ["Hybrid", "KeysHop", "backward", "forward", "hybrid_of"]


class KeysHop(NamedTuple):
    """Keys and values, or their gradients, that go from a node to another.

    Attributes:
        source, to: ranks.
        rows: of the owner's block.
    """

    source: int
    to: int
    rows: Rows


@dataclass(frozen=True)
class Hybrid:
    """The work of nodes; what `Schedule` is for rings of ranks.

    Attributes:
        queries, keys: where positions are, node by node.
        mask: what queries see.
        size: P.

    Raises InputError for nodes that the ranks are not whole ones of, or placements on different numbers of ranks.
    """

    queries: Placement
    keys: Placement
    mask: Mask
    size: int
    _found: dict[tuple[int, int], Schedule] = field(default_factory=dict, init=False, repr=False, compare=False)

    scheme: ClassVar[str] = "hybrid"

    def __post_init__(self) -> None:
        if self.queries.world != self.keys.world:
            raise InputError(f"queries are on {self.queries.world} ranks and keys on {self.keys.world}")
        if self.size < 1 or self.world % self.size:
            raise InputError(f"a node has {self.size} ranks, and there are {self.world}; use a divisor of that")

    @property
    def world(self) -> int:
        """N."""
        return self.queries.world

    @property
    def nodes(self) -> int:
        """M."""
        return self.world // self.size

    def between(self, place: int) -> Schedule:
        """The ring of nodes on which the keys of the ranks of one place travel, past the queries of all ranks of a node."""
        keys = self.keys
        ranks = range(place, self.world, self.size)
        own = Placement(tuple(keys.rows[rank] for rank in ranks), tuple(keys.runs[rank] for rank in ranks))
        return schedule_of("ring", rows_together(self.queries, self.size), own, self.mask)

    def share(self) -> Share:
        """What travels between nodes: whole blocks, in one direction."""
        return self.between(0).shares[0]

    def held(self, node: int, step: int, place: int) -> Rows:
        """The rows of keys that the rank of a place has at a step, of the owner's block; (0, 0) for none."""
        ring, share = self.between(place), self.share()
        owner = ring.owner(share, node, step)
        return ring.rows_of(share, owner) if step == 0 else ring.hop(share, owner, step - 1) or (0, 0)

    def inside(self, node: int, step: int) -> Schedule:
        """TokenRing of a node's queries over the keys that its ranks have at a step."""
        if (node, step) not in self._found:
            first = node * self.size
            ranks = range(first, first + self.size)
            queries = Placement(
                tuple(self.queries.rows[rank] for rank in ranks), tuple(self.queries.runs[rank] for rank in ranks)
            )
            owner = self.between(0).owner(self.share(), node, step)
            rows, runs = [], []
            for place in range(self.size):
                begin, end = self.held(node, step, place)
                cut = (run.within(begin, end) for run in self.keys.runs[owner * self.size + place])
                rows.append(end - begin)
                runs.append(tuple(run._replace(row=run.row - begin) for run in cut if run.positions))
            keys = Placement(tuple(rows), tuple(runs))
            self._found[node, step] = schedule_of("token_ring", queries, keys, self.mask)
        return self._found[node, step]

    def onward(self, rank: int, step: int) -> KeysHop | None:
        """The keys that leave ``rank`` at ``step``, for the next node; None for none."""
        node, place = divmod(rank, self.size)
        ring, share = self.between(place), self.share()
        owner = ring.owner(share, node, step)
        rows = ring.hop(share, owner, step) if step + 1 < self.nodes else None
        to = ring.visitor(share, owner, step + 1) * self.size + place
        return None if rows is None else KeysHop(rank, to, rows)

    def incoming(self, rank: int, step: int) -> KeysHop | None:
        """The keys that are on their way to ``rank`` at ``step``."""
        node, place = divmod(rank, self.size)
        source = (node - self.share().direction) % self.nodes * self.size + place
        return self.onward(source, step)

    def homeward(self, rank: int, step: int) -> KeysHop | None:
        """The gradients of keys that ``rank`` sends to their owner after ``step``; None for none."""
        node, place = divmod(rank, self.size)
        ring, share = self.between(place), self.share()
        owner = ring.owner(share, node, step)
        rows = ring.wanted(share, owner, node) if step else None
        return None if rows is None else KeysHop(rank, owner * self.size + place, rows)

    def returning(self, rank: int, step: int) -> KeysHop | None:
        """The gradients of its own keys that come to ``rank`` after ``step``."""
        node, place = divmod(rank, self.size)
        there = self.between(place).visitor(self.share(), node, step) * self.size + place
        return self.homeward(there, step)

    def pairs(self, rank: int, step: int) -> int:
        """Pairs of query and key that ``rank`` computes at ``step`` of all N, for one head."""
        node, place = divmod(rank, self.size)
        outer, inner = divmod(step, self.size)
        return self.inside(node, outer).pairs(place, inner)


@lru_cache(maxsize=32)
def hybrid_of(queries: Placement, keys: Placement, mask: Mask, size: int) -> Hybrid:
    """The `Hybrid`, which remembers what it worked out."""
    return Hybrid(queries, keys, mask, size)


class _Node:
    """The ways between the ranks of a node, as TokenRing counts them: steps are those of all N."""

    def __init__(self, link: Link, first: int, step: int) -> None:
        self.link, self.first, self.step = link, first, step

    def exchange(
        self, flow: str, step: int, sends: Sequence[Send], receives: Sequence[Receive]
    ) -> tuple[list[Handle], list[Handle]]:
        """See `Link`."""
        return self.link.exchange(
            flow,
            self.step + step,
            [(self.first + to, number, parts) for to, number, parts in sends],
            [(self.first + source, number, like) for source, number, like in receives],
        )


class _Keys:
    """Keys and values that are here, and those that come."""

    def __init__(self, schedule: Hybrid, rank: int, inputs: Inputs, link: Link) -> None:
        self.schedule, self.rank, self.link = schedule, rank, link
        self.own = [inputs.key_BGSD, inputs.value_BGSD]
        self.parts, self.rows = self.own, (0, self.own[0].shape[2])
        self._coming: tuple[Handle, Rows] | None = None
        self._sent: list[Handle] = []

    def pass_on(self, step: int) -> None:
        """Send what is here to the next node, and be ready for what comes."""
        going, coming = self.schedule.onward(self.rank, step), self.schedule.incoming(self.rank, step)
        sends: list[Send] = []
        receives: list[Receive] = []
        if going is not None:
            first, last = (row - self.rows[0] for row in going.rows)
            sends.append((going.to, 0, [part[:, :, first:last] for part in self.parts]))
        if coming is not None:
            count = coming.rows[1] - coming.rows[0]
            receives.append((coming.source, 0, [like_rows(part, count) for part in self.own]))
        self._sent, arriving = self.link.exchange("travel", step, sends, receives)
        self._coming = None if coming is None else (arriving[0], coming.rows)

    def arrive(self) -> Iterator[Handle]:
        """A program: what was sent is gone, and what comes is here."""
        sent, self._sent = self._sent, []
        if self._coming is None:
            self.parts, self.rows = [part[:, :, :0] for part in self.own], (0, 0)
        else:
            handle, rows = self._coming
            yield handle
            self.parts, self.rows = handle.parts(), rows
        yield from sent


def forward(schedule: Hybrid, rank: int, inputs: Inputs, link: Link, run: Callable[..., Program]) -> Program:
    """(out_BHLD, lse_BHL) of this rank's queries, see `anabranch.cluster.ring.program.forward`, which is ``run``."""
    node, place = divmod(rank, schedule.size)
    query = inputs.query_BHLD
    out = torch.zeros(query.shape, dtype=inputs.fine, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=inputs.fine, device=query.device)
    keys = _Keys(schedule, rank, inputs, link)
    for step in range(schedule.nodes):
        keys.pass_on(step)
        ways = _Node(link, node * schedule.size, step * schedule.size)
        part, part_lse = yield from run(schedule.inside(node, step), place, _over(inputs, keys.parts), ways)
        # In the order of nodes, whenever their keys came.
        merge(out, lse, part, part_lse)
        yield from keys.arrive()
    return out, lse


def backward(
    schedule: Hybrid,
    rank: int,
    inputs: Inputs,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    link: Link,
    run: Callable[..., Program],
) -> Program:
    """(dquery, dkey, dvalue) of this rank, see `anabranch.cluster.ring.program.backward`, which is ``run``."""
    node, place = divmod(rank, schedule.size)
    dquery, *dkeys = (torch.zeros(part.shape, dtype=inputs.fine, device=part.device) for part in inputs[:3])
    keys = _Keys(schedule, rank, inputs, link)
    expected: list[tuple[Handle, Rows]] = []
    sent: list[Handle] = []
    for step in range(schedule.nodes):
        keys.pass_on(step)
        ways = _Node(link, node * schedule.size, step * schedule.size)
        over = _over(inputs, keys.parts)
        made = yield from run(schedule.inside(node, step), place, over, dout, lse, delta, ways)
        dquery += made[0]
        yield from _take_in(dkeys, expected)
        yield from sent
        if step == 0:
            _add(dkeys, made[1:], (0, dkeys[0].shape[2]))
        going, coming = schedule.homeward(rank, step), schedule.returning(rank, step)
        sends: list[Send] = []
        if going is not None:
            first, last = (row - keys.rows[0] for row in going.rows)
            sends.append((going.to, 0, [part[:, :, first:last] for part in made[1:]]))
        receives: list[Any] = []
        if coming is not None:
            count = coming.rows[1] - coming.rows[0]
            receives.append((coming.source, 0, [like_rows(part, count) for part in dkeys]))
        sent, arriving = link.exchange("home", step, sends, receives)
        expected = [] if coming is None else [(arriving[0], coming.rows)]
        yield from keys.arrive()
    yield from _take_in(dkeys, expected)
    yield from sent
    return (dquery, *dkeys)


def _over(inputs: Inputs, parts: Sequence[Tensor]) -> Inputs:
    """The same queries over other keys and values."""
    return inputs._replace(key_BGSD=parts[0], value_BGSD=parts[1])


def _take_in(dkeys: Sequence[Tensor], expected: Sequence[tuple[Handle, Rows]]) -> Iterator[Handle]:
    for handle, rows in expected:
        yield handle
        _add(dkeys, handle.parts(), rows)


def _add(dkeys: Sequence[Tensor], parts: Sequence[Tensor], rows: Rows) -> None:
    for whole, part in zip(dkeys, parts, strict=True):
        whole[:, :, slice(*rows)] += part
