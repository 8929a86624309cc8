"""All-reduce over a ring, on two connections: one to the next peer, one from the previous.

World n, rank r, chunks 0 to n - 1 of which the first are an element longer where n does not divide.

    reduce   step s = 0 .. n - 2:   send chunk r - s,       receive chunk r - s - 1 and reduce it into place
    gather   step s = 0 .. n - 2:   send chunk r + 1 - s,   receive chunk r - s, which is final

What is sent after the first chunk is what was received a chunk before, so both go on a piece at a time: a piece is sent as soon as it is
reduced. Each chunk is finished by one rank, whose bits all others get unchanged: results are equal to the bit on every rank. With a
quantiser a rank writes the partial sum anew at every step of the first phase; in the second the owner writes its chunk once, takes what it
wrote as its own, and the others pass on the bytes as they came. Every piece of a chunk has a range of its own.

Bytes that a rank sends: 2 (n - 1) / n of the buffer, and 32 of a head.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from anabranch.cluster.pccl.hashing import bytes_of
from anabranch.cluster.pccl.links import LinkError
from anabranch.cluster.pccl.quantise import Quantiser
from anabranch.cluster.pccl.times import LOOK_S

PIECE = 1 << 20
HEAD = struct.Struct("!4sIQQQ")
_MAGIC = b"pccl"
_CLOSED = "this peer has closed its links"

_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda held, came: held.add_(came),
    "avg": lambda held, came: held.add_(came),
    "prod": lambda held, came: held.mul_(came),
    "max": lambda held, came: torch.maximum(held, came, out=held),
    "min": lambda held, came: torch.minimum(held, came, out=held),
}
OPS = tuple(_REDUCE)
# Types whose means are smaller than the sums on their way to them: these are held and sent in a wider one.
WIDER = {
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
    torch.int32: torch.int64,
    torch.int64: torch.int64,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Wires:
    """A collective's connections.

    Attributes:
        to_next, from_previous: sockets.
        next_peer, previous_peer: whose they are.
        tag, seq: of the collective, so that a peer that sends something else is found out.
        idle_s: after which a neighbour that neither takes nor sends is given up.
        check: called all the time; raises where it is all off.
    """

    to_next: socket.socket
    from_previous: socket.socket
    next_peer: int
    previous_peer: int
    tag: int
    seq: int
    idle_s: float
    check: Callable[[], None]


def chunk_ranges(count: int, world: int) -> list[tuple[int, int]]:
    """Where each chunk begins and ends: as even as can be, the first ones an element longer."""
    base, longer = divmod(count, world)
    starts = [rank * base + min(rank, longer) for rank in range(world + 1)]
    return list(pairwise(starts))


def widened(flat: Tensor, world: int) -> tuple[Tensor, str]:
    """What goes around for a mean of a type in `WIDER`, and the operation.

    There is nothing wider than int64: quotients by ``world`` and what is left of them go in its place, neither of which can be too large.
    """
    if flat.dtype != torch.int64:
        return flat.to(WIDER[flat.dtype]), "avg"
    quotient = torch.div(flat, world, rounding_mode="floor")
    return torch.cat([quotient, flat - quotient * world]), "sum"


def narrowed(work: Tensor, world: int, dtype: torch.dtype) -> Tensor:
    """The mean, of what `widened` made and a ring reduced."""
    if dtype != torch.int64:
        return work.to(dtype)
    quotient, rest = work.chunk(2) if work.numel() else (work, work)
    return quotient + torch.div(rest, world, rounding_mode="floor")


def ring_all_reduce(value_X: Tensor, op: str, rank: int, world: int, wires: Wires, quantiser: Quantiser | None) -> int:
    """In place, of a contiguous tensor on the CPU. Returns bytes sent. Raises LinkError; then its contents are of no use."""
    return _exchange(_Plan(value_X, op, rank, world, quantiser), wires)


class _Incoming(Protocol):
    """A piece that is due."""

    def begin(self) -> memoryview:
        """Where its bytes go; asked for when they are next."""

    def done(self) -> None:
        """They are there."""


class _Reduced:
    """A piece of a partial result: what comes is reduced into place, and goes on."""

    def __init__(self, plan: _Plan, start: int, end: int, is_last: bool) -> None:
        self.plan, self.start, self.end, self.is_last = plan, start, end, is_last

    def begin(self) -> memoryview:
        return self.plan.staged[: (self.end - self.start) * self.plan.size]

    def done(self) -> None:
        plan = self.plan
        plan.reduce(self.start, self.end, plan.staged_X[: self.end - self.start], self.is_last)
        plan.out.append(plan.view(self.start, self.end))


class _Final:
    """A piece of a result: it comes into place, and goes on where others wait for it."""

    def __init__(self, plan: _Plan, start: int, end: int, goes_on: bool) -> None:
        self.plan, self.start, self.end, self.goes_on = plan, start, end, goes_on

    def begin(self) -> memoryview:
        return self.plan.view(self.start, self.end)

    def done(self) -> None:
        if self.goes_on:
            self.plan.out.append(self.begin())


class _Quantised:
    """A piece of a partial result or of a result, in few bits."""

    def __init__(self, plan: _Plan, quantiser: Quantiser, start: int, end: int, step: int, is_final: bool) -> None:
        self.plan, self.quantiser, self.start, self.end = plan, quantiser, start, end
        self.is_last, self.is_final = step == plan.world - 2, is_final
        self.data = bytearray()

    def begin(self) -> memoryview:
        self.data = bytearray(self.quantiser.size_of(self.end - self.start))
        return memoryview(self.data)

    def done(self) -> None:
        plan, held_X = self.plan, self.plan.value_X[self.start : self.end]
        came_X = self.quantiser.read(self.data, held_X.dtype)
        if self.is_final:
            held_X.copy_(came_X)
            if not self.is_last:
                # As it came.
                plan.out.append(memoryview(self.data))
            return
        plan.reduce(self.start, self.end, came_X, self.is_last)
        written = self.quantiser.write(held_X)
        if self.is_last:
            # What the others will read of this piece is what it is here too.
            held_X.copy_(self.quantiser.read(written, held_X.dtype))
        plan.out.append(memoryview(written))


class _Head:
    """What goes ahead of a collective: that both ends mean the same one."""

    def __init__(self, plan: _Plan, wires: Wires) -> None:
        self.sent = HEAD.pack(_MAGIC, plan.world, wires.tag, wires.seq, plan.value_X.numel())
        self.came, self.wires = bytearray(HEAD.size), wires

    def begin(self) -> memoryview:
        return memoryview(self.came)

    def done(self) -> None:
        if self.came != self.sent:
            raise LinkError(f"peer {self.wires.previous_peer} sends something else", self.wires.previous_peer)


class _Plan:
    """What goes out and what comes in, in order. Pieces that come add to what goes out.

    Attributes:
        out: bytes to be sent.
        due: pieces that will come.
        staged_X, staged: where a piece comes to before it is reduced.
    """

    def __init__(self, value_X: Tensor, op: str, rank: int, world: int, quantiser: Quantiser | None) -> None:
        self.value_X, self.rank, self.world, self.size = value_X, rank, world, value_X.element_size()
        self.op = op
        self.ranges = chunk_ranges(value_X.numel(), world)
        self.bytes = bytes_of(value_X)
        self.out: deque[memoryview] = deque()
        longest = max((end - start for start, end in self._pieces(0)), default=0)
        self.staged_X = torch.empty(0 if quantiser is not None else longest, dtype=value_X.dtype)
        self.staged = bytes_of(self.staged_X)
        self.due: deque[_Incoming] = deque(self._reductions(quantiser))
        self.due.extend(self._results(quantiser))
        for start, end in self._pieces(rank):
            written = None if quantiser is None else quantiser.write(value_X[start:end])
            self.out.append(self.view(start, end) if written is None else memoryview(written))

    def _pieces(self, chunk: int) -> list[tuple[int, int]]:
        """Elements of a chunk, in pieces that a cache has room for. The first chunk's are the longest."""
        start, end = self.ranges[chunk % self.world]
        step = max(PIECE // self.size, 1)
        return [(place, min(place + step, end)) for place in range(start, end, step)]

    def view(self, start: int, end: int) -> memoryview:
        """Bytes of elements."""
        return self.bytes[start * self.size : end * self.size]

    def reduce(self, start: int, end: int, came_X: Tensor, is_last: bool) -> None:
        """Reduce a piece into place. Who finishes a chunk of a mean divides it, and the others get what came of that."""
        held_X = _REDUCE[self.op](self.value_X[start:end], came_X)
        if is_last and self.op == "avg":
            if held_X.dtype.is_floating_point:
                held_X.div_(self.world)
            else:
                torch.div(held_X, self.world, rounding_mode="floor", out=held_X)

    def _reductions(self, quantiser: Quantiser | None) -> Iterator[_Incoming]:
        """The first phase."""
        for step in range(self.world - 1):
            for start, end in self._pieces(self.rank - step - 1):
                yield (
                    _Reduced(self, start, end, step == self.world - 2)
                    if quantiser is None
                    else _Quantised(self, quantiser, start, end, step, is_final=False)
                )

    def _results(self, quantiser: Quantiser | None) -> Iterator[_Incoming]:
        """The second, whose first chunk to send the first phase has finished."""
        for step in range(self.world - 1):
            for start, end in self._pieces(self.rank - step):
                yield (
                    _Final(self, start, end, step < self.world - 2)
                    if quantiser is None
                    else _Quantised(self, quantiser, start, end, step, is_final=True)
                )


def _exchange(plan: _Plan, wires: Wires) -> int:
    """Move all pieces; how many bytes were sent. One thread for both directions, which waits for neither while the other can go on."""
    head = _Head(plan, wires)
    plan.out.appendleft(memoryview(head.sent))
    plan.due.appendleft(head)
    try:
        for sock in (wires.to_next, wires.from_previous):
            sock.setblocking(False)
    except OSError:
        raise LinkError(_CLOSED) from None
    poll = select.poll()
    incoming: _Incoming | None = plan.due.popleft()
    view = head.begin()
    moved, sent = time.monotonic(), 0
    while incoming is not None or plan.out:
        wires.check()
        gone = _send_some(plan.out, wires)
        sent, is_moving = sent + gone, bool(gone)
        if incoming is not None:
            count = _receive_some(view, wires)
            is_moving |= bool(count)
            view = view[count:]
            if not len(view):
                incoming.done()
                incoming = plan.due.popleft() if plan.due else None
                view = memoryview(b"") if incoming is None else incoming.begin()
        if is_moving:
            moved = time.monotonic()
            continue
        _wait(poll, wires, is_reading=incoming is not None, is_writing=bool(plan.out))
        if time.monotonic() - moved > wires.idle_s:
            late = wires.previous_peer if incoming is not None else wires.next_peer
            raise LinkError(f"peer {late} did nothing for {wires.idle_s:g} s", late)
    return sent


def _send_some(out: deque[memoryview], wires: Wires) -> int:
    if not out:
        return 0
    try:
        count = wires.to_next.send(out[0])
    except (BlockingIOError, InterruptedError):
        return 0
    except OSError as error:
        raise LinkError(f"the link to peer {wires.next_peer} broke: {error}", wires.next_peer) from None
    if count == len(out[0]):
        out.popleft()
    else:
        out[0] = out[0][count:]
    return count


def _receive_some(view: memoryview, wires: Wires) -> int:
    try:
        count = wires.from_previous.recv_into(view)
    except (BlockingIOError, InterruptedError):
        return 0
    except OSError as error:
        raise LinkError(f"the link from peer {wires.previous_peer} broke: {error}", wires.previous_peer) from None
    if not count:
        raise LinkError(f"peer {wires.previous_peer} closed its link", wires.previous_peer)
    return count


def _wait(poll: select.poll, wires: Wires, *, is_reading: bool, is_writing: bool) -> None:
    wanted = ((wires.from_previous, select.POLLIN, is_reading), (wires.to_next, select.POLLOUT, is_writing))
    sockets = [(sock, event) for sock, event, is_wanted in wanted if is_wanted]
    try:
        for sock, event in sockets:
            poll.register(sock, event)
        poll.poll(LOOK_S * 1000)
        for sock, _ in sockets:
            poll.unregister(sock)
    except (ValueError, KeyError):
        # Of another thread, which has closed this peer; a socket that is closed has no number any more.
        raise LinkError(_CLOSED) from None
