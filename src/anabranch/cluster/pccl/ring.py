"""All-reduce over a ring, on two connections: one to the next peer, one from the previous.

World n, rank r, chunks 0 to n - 1 of which the first are an element longer where n does not divide.

    reduce   step s = 0 .. n - 2:   send chunk r - s,       receive chunk r - s - 1 and reduce it into place
    gather   step s = 0 .. n - 2:   send chunk r + 1 - s,   receive chunk r - s, which is final

What is sent after the first chunk is what was received a chunk before, so both go on a piece at a time: a piece is sent as soon as it is
reduced. Each chunk is finished by one rank, whose bits all others get unchanged: results are equal to the bit on every rank. With a
quantiser a rank writes the partial sum anew at every step of the first phase; in the second the owner writes its chunk once, takes what it
wrote as its own, and the others pass on the bytes as they came.

Bytes that a rank sends: 2 (n - 1) / n of the buffer, and 32 of a head.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from anabranch.cluster.pccl.hashing import bytes_of
from anabranch.cluster.pccl.links import LinkError
from anabranch.cluster.pccl.quantise import Quantiser

PIECE = 1 << 20
HEAD = struct.Struct("!4sIQQQ")
_MAGIC = b"pccl"
# How long a wait for the wires goes without asking whether all is off.
_LOOK_S = 0.05

_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda held, came: held.add_(came),
    "avg": lambda held, came: held.add_(came),
    "prod": lambda held, came: held.mul_(came),
    "max": lambda held, came: torch.maximum(held, came, out=held),
    "min": lambda held, came: torch.minimum(held, came, out=held),
}
OPS = tuple(_REDUCE)


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


def ring_all_reduce(value_X: Tensor, op: str, rank: int, world: int, wires: Wires, quantiser: Quantiser | None) -> int:
    """In place, of a contiguous tensor on the CPU. Returns bytes sent. Raises LinkError; then its contents are of no use."""
    plan = _Plan(value_X, rank, world, quantiser)
    if quantiser is None:
        plan.reduce(_REDUCE[op])
        plan.gather()
    else:
        plan.reduce_quantised(quantiser, _REDUCE[op])
        plan.gather_quantised(quantiser)
    sent = _exchange(plan, wires)
    if op == "avg":
        if value_X.dtype.is_floating_point:
            value_X.div_(world)
        else:
            torch.div(value_X, world, rounding_mode="floor", out=value_X)
    return sent


@dataclass
class _Incoming:
    """A piece that is due: where its bytes go, and what is to be done with them then."""

    view: memoryview
    done: Callable[[], None]


class _Plan:
    """What goes out and what comes in, in order. Pieces that come add to what goes out."""

    def __init__(self, value_X: Tensor, rank: int, world: int, quantiser: Quantiser | None) -> None:
        self.value_X, self.rank, self.world = value_X, rank, world
        self.ranges = chunk_ranges(value_X.numel(), world)
        self.out: deque[memoryview] = deque()
        self.due: deque[_Incoming] = deque()
        self.size = value_X.element_size()
        self.bytes = bytes_of(value_X)
        self.quantiser = quantiser

    def _pieces(self, chunk: int) -> list[tuple[int, int]]:
        """Elements of a chunk, in pieces that a cache has room for."""
        start, end = self.ranges[chunk % self.world]
        step = max(PIECE // self.size, 1)
        return [(place, min(place + step, end)) for place in range(start, end, step)]

    def _view(self, start: int, end: int) -> memoryview:
        return self.bytes[start * self.size : end * self.size]

    def reduce(self, reduce: Callable[[Tensor, Tensor], Tensor]) -> None:
        """The first phase."""
        self.out.extend(self._view(*piece) for piece in self._pieces(self.rank))
        longest = max((end - start for start, end in self._pieces(0)), default=0)
        staged_X = torch.empty(longest, dtype=self.value_X.dtype)
        staged = bytes_of(staged_X)
        for step in range(self.world - 1):
            for start, end in self._pieces(self.rank - step - 1):

                def add(start: int = start, end: int = end) -> None:
                    reduce(self.value_X[start:end], staged_X[: end - start])
                    self.out.append(self._view(start, end))

                self.due.append(_Incoming(staged[: (end - start) * self.size], add))

    def gather(self) -> None:
        """The second phase; the first has put this rank's chunk on its way."""
        for step in range(self.world - 1):
            is_last = step == self.world - 2
            for start, end in self._pieces(self.rank - step):
                view = self._view(start, end)
                self.due.append(_Incoming(view, _nothing if is_last else lambda view=view: self.out.append(view)))  # type: ignore[misc]

    def reduce_quantised(self, quantiser: Quantiser, reduce: Callable[[Tensor, Tensor], Tensor]) -> None:
        """The first phase: partial results are written anew at every step; the last is finished in place."""
        start, end = self.ranges[self.rank]
        self._send(quantiser.write(self.value_X[start:end]))
        for step in range(self.world - 1):
            start, end = self.ranges[(self.rank - step - 1) % self.world]
            data = bytearray(quantiser.size_of(end - start))
            is_last = step == self.world - 2

            def add(start: int = start, end: int = end, data: bytearray = data, is_last: bool = is_last) -> None:
                held_X = self.value_X[start:end]
                reduce(held_X, quantiser.read(data, held_X.dtype))
                written = quantiser.write(held_X)
                if is_last:
                    # What the others will read of this chunk is what it is here too.
                    held_X.copy_(quantiser.read(written, held_X.dtype))
                self._send(written)

            self.due.append(_Incoming(memoryview(data), add))

    def gather_quantised(self, quantiser: Quantiser) -> None:
        """The second phase: bytes are passed on as they came."""
        for step in range(self.world - 1):
            start, end = self.ranges[(self.rank - step) % self.world]
            data = bytearray(quantiser.size_of(end - start))

            def put(start: int = start, end: int = end, data: bytearray = data, step: int = step) -> None:
                self.value_X[start:end].copy_(quantiser.read(data, self.value_X.dtype))
                if step < self.world - 2:
                    self._send(data)

            self.due.append(_Incoming(memoryview(data), put))

    def _send(self, data: bytearray) -> None:
        if data:
            self.out.append(memoryview(data))


def _nothing() -> None:
    pass


def _exchange(plan: _Plan, wires: Wires) -> int:
    """Move all pieces; how many bytes were sent. One thread for both directions, which waits for neither while the other can go on."""
    total = plan.value_X.numel()
    head = bytearray(HEAD.size)
    plan.out.appendleft(memoryview(HEAD.pack(_MAGIC, plan.world, wires.tag, wires.seq, total)))
    plan.due.appendleft(_Incoming(memoryview(head), lambda: _check_head(head, plan, wires, total)))
    for sock in (wires.to_next, wires.from_previous):
        sock.setblocking(False)
    poll = select.poll()
    incoming = plan.due.popleft()
    view: memoryview | None = incoming.view
    moved, sent = time.monotonic(), 0
    while view is not None or plan.out:
        wires.check()
        gone = _send_some(plan.out, wires)
        sent, is_moving = sent + gone, bool(gone)
        if view is not None:
            count = _receive_some(view, wires)
            is_moving |= bool(count)
            view = view[count:]
            while view is not None and not len(view):
                incoming.done()
                # A chunk without elements has no bytes to wait for.
                incoming = plan.due.popleft() if plan.due else _END
                view = None if incoming is _END else incoming.view
        if is_moving:
            moved = time.monotonic()
            continue
        _wait(poll, wires, is_reading=view is not None, is_writing=bool(plan.out))
        if time.monotonic() - moved > wires.idle_s:
            late = wires.previous_peer if view is not None else wires.next_peer
            raise LinkError(f"peer {late} did nothing for {wires.idle_s:g} s", late)
    return sent


_END = _Incoming(memoryview(b""), _nothing)


def _check_head(head: bytearray, plan: _Plan, wires: Wires, total: int) -> None:
    magic, world, tag, seq, count = HEAD.unpack(head)
    if (magic, world, tag, seq, count) != (_MAGIC, plan.world, wires.tag, wires.seq, total):
        raise LinkError(f"peer {wires.previous_peer} sends something else", wires.previous_peer)


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
    if not len(view):
        return 0
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
    for sock, event in sockets:
        poll.register(sock, event)
    poll.poll(_LOOK_S * 1000)
    for sock, _ in sockets:
        poll.unregister(sock)
