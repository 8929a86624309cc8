"""What one rank does in a pass, as a generator that yields what it waits for: so real processes and simulated ranks run the same lines.

    for each step: send on what is here and what the step before made; compute; wait for the next block; take in what came home

A `Passenger` says what travels, what is computed where it arrives, and what goes home. Results are merged in order of distance, whenever
they arrive, so they do not depend on it.
"""
# Shapes: B sequences, H query heads, G key heads, L rows of a block, D head width

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anabranch.cluster.ring import by_heads, hybrid
from anabranch.cluster.ring.by_heads import ByHeads
from anabranch.cluster.ring.hybrid import Hybrid
from anabranch.cluster.ring.inputs import Inputs, Program, like_rows
from anabranch.cluster.ring.kernel import attend, gradients, merge
from anabranch.cluster.ring.link import Handle, Link, Outgoing
from anabranch.cluster.ring.pieces import Piece, Rows
from anabranch.cluster.ring.schedule import Schedule, Share

__all__ = ["backward", "forward"]

Waits = Generator[Handle, None, None]


class Passenger(Protocol):
    """What a scheme moves, and what becomes of it. Parts of a message are ordered by the size of their numbers, the largest first."""

    def own(self, rows: Rows) -> list[Tensor]:
        """What travels of these rows of this rank's block."""

    def like(self, rows: int) -> list[Tensor]:
        """Tensors on ``meta`` as `own` gives them, of so many rows of another rank's."""

    def visit(self, parts: list[Tensor], first: int, pieces: tuple[Piece, ...], wanted: Rows) -> list[Tensor] | None:
        """Work on a block of which ``parts`` begin at row ``first``; what goes home of the rows ``wanted``, if anything does."""

    def home_like(self, rows: int) -> list[Tensor]:
        """Tensors on ``meta`` as `visit` gives them; empty where nothing goes home."""

    def come_home(self, parts: list[Tensor], rows: Rows) -> None:
        """Take in what was made of these rows."""

    def result(self) -> tuple[Tensor, ...]:
        """What the pass gives."""


def forward(schedule: Schedule | ByHeads | Hybrid, rank: int, inputs: Inputs, link: Link) -> Program:
    """(out_BHLD, lse_BHL) of this rank's queries, both of `fine_dtype`; lse is minus infinity where a query sees nothing."""
    if isinstance(schedule, ByHeads):
        return by_heads.forward(schedule, rank, inputs, link)
    if isinstance(schedule, Hybrid):
        return hybrid.forward(schedule, rank, inputs, link, forward)
    kind = _QueriesForward if schedule.moves_queries else _KeysForward
    return _circulate(schedule, rank, kind(inputs), link)


def backward(
    schedule: Schedule | ByHeads | Hybrid,
    rank: int,
    inputs: Inputs,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    link: Link,
) -> Program:
    """(dquery, dkey, dvalue) of this rank, of `fine_dtype`. ``lse`` and ``delta`` are those of its queries, see `kernel`."""
    if isinstance(schedule, ByHeads):
        return by_heads.backward(schedule, rank, inputs, dout, lse, delta, link)
    if isinstance(schedule, Hybrid):
        return hybrid.backward(schedule, rank, inputs, dout, lse, delta, link, backward)
    kind = _QueriesBackward if schedule.moves_queries else _KeysBackward
    return _circulate(schedule, rank, kind(inputs, dout, lse, delta), link)


@dataclass
class _Block:
    """What of a block is here: ``parts`` are its rows; ``buffer`` is how they came, and can go on as they are."""

    rows: Rows
    parts: list[Tensor]
    buffer: Tensor | None = None

    def cut(self, rows: Rows) -> Outgoing:
        """Of it, these rows."""
        if rows == self.rows and self.buffer is not None:
            return self.buffer
        first, last = rows[0] - self.rows[0], rows[1] - self.rows[0]
        return [part[:, :, first:last] for part in self.parts]


@dataclass
class _Homecoming:
    """A result that this rank waits for."""

    handle: Handle
    rows: Rows


# What is on its way here: the block of a share at a step, and which rows of it.
_Coming = dict[tuple[Share, int], tuple[Handle, Rows]]


def _circulate(schedule: Schedule, rank: int, passenger: Any, link: Link) -> Program:
    shares = schedule.shares
    held: dict[Share, _Block] = {
        share: _Block(rows, passenger.own(rows)) for share in shares for rows in [schedule.rows_of(share, rank)]
    }
    coming: _Coming = {}
    returning: list[_Homecoming] = []
    # What was sent and may still be read; that of the step before is waited for, so that memory does not grow with the ranks.
    sent: list[Handle] = []
    lasting: list[Handle] = []
    if schedule.is_direct:
        for step in range(schedule.world - 1):
            lasting += _travel(schedule, rank, held, passenger, link, step, coming)
    for step in range(schedule.world):
        before, sent = sent, []
        if not schedule.is_direct:
            sent += _travel(schedule, rank, held, passenger, link, step, coming)
        made = _work(schedule, rank, held, passenger, step)
        expected = returning
        going, returning = _go_home(schedule, rank, passenger, link, step, made)
        sent += going
        yield from _take_in(passenger, expected)
        yield from _arrive(held, coming, shares, step)
        yield from before
    yield from _take_in(passenger, returning)
    yield from (*sent, *lasting)
    return passenger.result()


def _arrive(held: "dict[Share, _Block]", coming: "_Coming", shares: tuple[Share, ...], step: int) -> Waits:
    """Have the blocks of the next step in the place of those of this one."""
    for share in shares:
        held.pop(share, None)
        if (share, step + 1) in coming:
            handle, rows = coming.pop((share, step + 1))
            yield handle
            held[share] = _Block(rows, handle.parts(), handle.buffer)


def _travel(
    schedule: Schedule,
    rank: int,
    held: dict[Share, _Block],
    passenger: Passenger,
    link: Link,
    step: int,
    coming: _Coming,
) -> list[Handle]:
    """Send what goes on from here at ``step``, and be ready for what comes; gives what is under way."""
    sends, receives, keys = [], [], []
    for number, share in enumerate(schedule.shares):
        # Whose block leaves here, and whose comes: a block that is sent by its owner leaves from there at every step.
        leaving = rank if schedule.is_direct else schedule.owner(share, rank, step)
        rows = schedule.hop(share, leaving, step)
        if rows is not None:
            sends.append((schedule.visitor(share, leaving, step + 1), number, held[share].cut(rows)))
        owner = schedule.owner(share, rank, step + 1)
        rows = schedule.hop(share, owner, step) if step + 1 < schedule.world else None
        if rows is not None:
            source = owner if schedule.is_direct else schedule.visitor(share, owner, step)
            receives.append((source, number, passenger.like(rows[1] - rows[0])))
            keys.append((share, rows))
    outgoing, incoming = link.exchange("travel", step, sends, receives)
    for (share, rows), handle in zip(keys, incoming, strict=True):
        coming[share, step + 1] = (handle, rows)
    return outgoing


def _work(
    schedule: Schedule, rank: int, held: dict[Share, _Block], passenger: Passenger, step: int
) -> list[tuple[int, int, list[Tensor]]]:
    """Compute on the blocks that are here; (owner, number of the share, result) of what goes to others."""
    made = []
    for number, share in enumerate(schedule.shares):
        owner = schedule.owner(share, rank, step)
        pieces, wanted = schedule.pieces(share, owner, rank), schedule.wanted(share, owner, rank)
        if wanted is None:
            continue
        block = held[share]
        result = passenger.visit(block.parts, block.rows[0], pieces, wanted)
        if result is None:
            continue
        if owner == rank:
            passenger.come_home(result, wanted)
        else:
            likes = passenger.home_like(0)
            made.append((owner, number, [part.to(like.dtype) for part, like in zip(result, likes, strict=True)]))
    return made


def _go_home(
    schedule: Schedule,
    rank: int,
    passenger: Passenger,
    link: Link,
    step: int,
    made: list[tuple[int, int, list[Tensor]]],
) -> tuple[list[Handle], list[_Homecoming]]:
    """Send results to their owners, and be ready for what others made of this rank's block at the same step."""
    receives, rows_of = [], []
    for number, share in enumerate(schedule.shares):
        there = schedule.visitor(share, rank, step)
        rows = schedule.wanted(share, rank, there) if step else None
        if rows is not None and (like := passenger.home_like(rows[1] - rows[0])):
            receives.append((there, number, like))
            rows_of.append(rows)
    outgoing, incoming = link.exchange("home", step, made, receives)
    return outgoing, [_Homecoming(handle, rows) for handle, rows in zip(incoming, rows_of, strict=True)]


def _take_in(passenger: Passenger, expected: list[_Homecoming]) -> Waits:
    for one in expected:
        yield one.handle
        passenger.come_home(one.handle.parts(), one.rows)


class _Forward:
    """What forward passes share: the running result of this rank's queries."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        query = inputs.query_BHLD
        self.out = torch.zeros(query.shape, dtype=inputs.fine, device=query.device)
        self.lse = torch.full(query.shape[:3], -torch.inf, dtype=inputs.fine, device=query.device)

    def result(self) -> tuple[Tensor, ...]:
        return self.out, self.lse


class _QueriesForward(_Forward):
    """Queries travel, partial results go home."""

    def own(self, rows: Rows) -> list[Tensor]:
        return [self.inputs.query_BHLD[:, :, slice(*rows)]]

    def like(self, rows: int) -> list[Tensor]:
        return [like_rows(self.inputs.query_BHLD, rows)]

    def visit(self, parts: list[Tensor], first: int, pieces: tuple[Piece, ...], wanted: Rows) -> list[Tensor]:
        inputs = self.inputs
        query = parts[0][:, :, wanted[0] - first : wanted[1] - first]
        out = torch.zeros(query.shape, dtype=inputs.fine, device=query.device)
        lse = torch.full(query.shape[:3], -torch.inf, dtype=inputs.fine, device=query.device)
        attend(query, inputs.key_BGSD, inputs.value_BGSD, pieces, out, lse, scale=inputs.scale, row=wanted[0])
        return [lse, out]

    def home_like(self, rows: int) -> list[Tensor]:
        out = like_rows(self.inputs.query_BHLD, rows)
        lse = out.new_empty(out.shape[:3], dtype=self.inputs.fine)
        return [lse, out.to(self.inputs.home_dtype or self.inputs.fine)]

    def come_home(self, parts: list[Tensor], rows: Rows) -> None:
        here = slice(*rows)
        merge(self.out[:, :, here], self.lse[:, :, here], parts[1], parts[0])


class _KeysForward(_Forward):
    """Keys and values travel; what they give stays here."""

    def own(self, rows: Rows) -> list[Tensor]:
        return [self.inputs.key_BGSD[:, :, slice(*rows)], self.inputs.value_BGSD[:, :, slice(*rows)]]

    def like(self, rows: int) -> list[Tensor]:
        return [like_rows(self.inputs.key_BGSD, rows), like_rows(self.inputs.value_BGSD, rows)]

    def visit(self, parts: list[Tensor], first: int, pieces: tuple[Piece, ...], wanted: Rows) -> None:
        inputs = self.inputs
        key, value = parts
        attend(inputs.query_BHLD, key, value, pieces, self.out, self.lse, scale=inputs.scale, key=first)

    def home_like(self, rows: int) -> list[Tensor]:
        return []

    def come_home(self, parts: list[Tensor], rows: Rows) -> None:
        raise AssertionError("nothing of keys and values goes home in a forward pass")


class _Backward:
    """What backward passes share: the running gradients of this rank."""

    def __init__(self, inputs: Inputs, dout: Tensor, lse: Tensor, delta: Tensor) -> None:
        self.inputs, self.dout, self.lse, self.delta = inputs, dout, lse, delta
        self.dquery, self.dkey, self.dvalue = (
            torch.zeros(part.shape, dtype=inputs.fine, device=part.device) for part in inputs[:3]
        )

    def result(self) -> tuple[Tensor, ...]:
        return self.dquery, self.dkey, self.dvalue


class _QueriesBackward(_Backward):
    """Queries travel with the gradients of their outputs; their own gradients go home."""

    def own(self, rows: Rows) -> list[Tensor]:
        return [part[:, :, slice(*rows)] for part in (self.lse, self.delta, self.inputs.query_BHLD, self.dout)]

    def like(self, rows: int) -> list[Tensor]:
        return [like_rows(part, rows) for part in (self.lse, self.delta, self.inputs.query_BHLD, self.dout)]

    def visit(self, parts: list[Tensor], first: int, pieces: tuple[Piece, ...], wanted: Rows) -> list[Tensor]:
        inputs = self.inputs
        lse, delta, query, dout = (part[:, :, wanted[0] - first : wanted[1] - first] for part in parts)
        dquery = torch.zeros(query.shape, dtype=inputs.fine, device=query.device)
        into = (dquery, self.dkey, self.dvalue)
        gradients(
            query, inputs.key_BGSD, inputs.value_BGSD, dout, lse, delta, pieces, into, scale=inputs.scale, row=wanted[0]
        )
        return [dquery]

    def home_like(self, rows: int) -> list[Tensor]:
        return [like_rows(self.dquery, rows)]

    def come_home(self, parts: list[Tensor], rows: Rows) -> None:
        self.dquery[:, :, slice(*rows)] += parts[0]


class _KeysBackward(_Backward):
    """Keys and values travel; their gradients go home."""

    def own(self, rows: Rows) -> list[Tensor]:
        return [self.inputs.key_BGSD[:, :, slice(*rows)], self.inputs.value_BGSD[:, :, slice(*rows)]]

    def like(self, rows: int) -> list[Tensor]:
        return [like_rows(self.inputs.key_BGSD, rows), like_rows(self.inputs.value_BGSD, rows)]

    def visit(self, parts: list[Tensor], first: int, pieces: tuple[Piece, ...], wanted: Rows) -> list[Tensor]:
        inputs = self.inputs
        key, value = (part[:, :, wanted[0] - first : wanted[1] - first] for part in parts)
        dkey, dvalue = (torch.zeros(part.shape, dtype=inputs.fine, device=part.device) for part in (key, value))
        into = (self.dquery, dkey, dvalue)
        gradients(
            inputs.query_BHLD,
            key,
            value,
            self.dout,
            self.lse,
            self.delta,
            pieces,
            into,
            scale=inputs.scale,
            key=wanted[0],
        )
        return [dkey, dvalue]

    def home_like(self, rows: int) -> list[Tensor]:
        return [like_rows(self.dkey, rows), like_rows(self.dvalue, rows)]

    def come_home(self, parts: list[Tensor], rows: Rows) -> None:
        self.dkey[:, :, slice(*rows)] += parts[0]
        self.dvalue[:, :, slice(*rows)] += parts[1]
