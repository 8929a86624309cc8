"""How blocks get from rank to rank: processes of `torch.distributed`, or ranks that are simulated in this one.

A message is one buffer of bytes: numbers of several types go together, and what is forwarded is not packed again. Both kinds of link count
what they send, pair by pair, in a `MessageLog` (kinds ``travel`` and ``home``; the place of a micro-batch has the step).
"""
# Shapes: N ranks

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.cluster.messages import MessageLog
from anabranch.errors import InputError, PeerError

__all__ = [
    "FLOWS",
    "GroupLink",
    "Handle",
    "Link",
    "Outgoing",
    "SimulatedLinks",
    "Traffic",
    "drive",
    "everyone",
    "pack",
    "unpack",
]

FLOWS = ("travel", "home", "agree")
# Tensors, or a buffer that came from somewhere.
Outgoing = Tensor | Sequence[Tensor]
# (rank, number of the share, what is sent), and (rank, number, tensors like what comes).
Send = tuple[int, int, Outgoing]
Receive = tuple[int, int, Sequence[Tensor]]


def pack(parts: Outgoing) -> Tensor:
    """One uint8 ``[bytes]`` of all parts, in order."""
    if isinstance(parts, Tensor):
        return parts
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts again, without a copy; numbers must not become larger from part to part."""
    parts, start = [], 0
    for shape in like:
        size = shape.numel() * shape.element_size()
        parts.append(buffer[start : start + size].view(shape.dtype).view(shape.shape))
        start += size
    return parts


class Handle(Protocol):
    """A message under way."""

    flow: str
    buffer: Tensor

    @property
    def is_ready(self) -> bool:
        """Whether `wait` would not wait."""

    def wait(self) -> None:
        """Until it is there, or gone. Raises PeerError if that does not happen."""

    def parts(self) -> list[Tensor]:
        """What came, after `wait`."""


class Link(Protocol):
    """The ways from one rank to the others."""

    def exchange(
        self, flow: str, step: int, sends: Sequence[Send], receives: Sequence[Receive]
    ) -> tuple[list[Handle], list[Handle]]:
        """Begin to send and to receive; both give a handle for each."""


@dataclass
class Traffic:
    """What passes cost one rank, or all that are simulated; it adds up until it is made anew.

    Attributes:
        sent: messages by directed pair; None before the first pass.
        waited_s: seconds that a rank stood still for blocks (``travel``), for results (``home``) and until all had agreed (``agree``).
        pairs: pairs of a query and a key that were computed, for one head, by rank and step of forward passes.
    """

    sent: MessageLog | None = None
    waited_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FLOWS, 0.0))
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, world: int, source: int, to: int, flow: str, step: int, size_bytes: int) -> None:
        """One message. Raises InputError for another number of ranks than before."""
        self.sent = self.sent or MessageLog(world)
        if self.sent.num_ranks != world:
            raise InputError(
                f"this traffic is of {self.sent.num_ranks} ranks, and the pass has {world}; make a new one"
            )
        self.sent.add(source, to, size_bytes, kind=flow, micro_batch=step)

    @property
    def size_bytes(self) -> int:
        """Of all messages."""
        return 0 if self.sent is None else int(self.sent.bytes_RR.sum())


class GroupLink:
    """Links between the processes of a group.

    Args:
        group: of torch; None for all processes.
        traffic: what messages are counted in.
        timeout_s: how long a message may take; None for as long as the group says.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, traffic: Traffic | None = None, timeout_s: float | None = None
    ) -> None:
        found = dist.group.WORLD if group is None else group
        assert found is not None, "the processes have joined a group"
        self.group: dist.ProcessGroup = found
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic = Traffic() if traffic is None else traffic
        self.timeout_s = timeout_s
        self._is_nccl = dist.get_backend(self.group) == "nccl"

    def exchange(
        self, flow: str, step: int, sends: Sequence[Send], receives: Sequence[Receive]
    ) -> tuple[list[Handle], list[Handle]]:
        """See `Link`."""
        made: list[_GroupHandle] = []
        for to, number, parts in sends:
            buffer = pack(parts)
            if buffer.numel():
                self.traffic.add(self.world, self.rank, to, flow, step, buffer.numel())
            made.append(_GroupHandle(self, flow, to, True, self._tag(flow, step, number), buffer, ()))
        for source, number, like in receives:
            size = sum(part.numel() * part.element_size() for part in like)
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            made.append(_GroupHandle(self, flow, source, False, self._tag(flow, step, number), buffer, tuple(like)))
        self._begin(made, flow)
        return list(made[: len(sends)]), list(made[len(sends) :])

    def _begin(self, made: "list[_GroupHandle]", flow: str) -> None:
        if not self._is_nccl:
            for handle in made:
                handle.begin()
            return
        made = [handle for handle in made if handle.buffer.numel()]
        if made:
            # Sends and receives of one step in one call: apart, two ranks could each wait for the other's.
            group = _flow_group(self.group, flow)
            operations = [
                dist.P2POp(dist.isend if one.is_send else dist.irecv, one.buffer, one.peer, group) for one in made
            ]
            works = dist.batch_isend_irecv(operations)
            for handle, work in zip(made, works if len(works) == len(made) else works * len(made), strict=False):
                handle.work = work

    @property
    def device(self) -> torch.device:
        """Where messages are."""
        return torch.device("cuda", torch.cuda.current_device()) if self._is_nccl else torch.device("cpu")

    def _tag(self, flow: str, step: int, number: int) -> int:
        return (FLOWS.index(flow) * self.world + step) * 2 + number


class _GroupHandle:
    """A message between processes."""

    def __init__(
        self, link: GroupLink, flow: str, to: int, is_send: bool, tag: int, buffer: Tensor, like: tuple[Tensor, ...]
    ) -> None:
        self.link, self.flow, self.to, self.is_send, self.tag, self.buffer, self.like = (
            link,
            flow,
            to,
            is_send,
            tag,
            buffer,
            like,
        )
        # As the whole job counts ranks.
        self.peer = dist.get_global_rank(link.group, to)
        self.work: Any = None

    def begin(self) -> None:
        """Start the transfer; nothing is not sent."""
        if not self.buffer.numel():
            return
        try:
            if self.is_send:
                self.work = dist.isend(self.buffer, self.peer, group=self.link.group, tag=self.tag)
            else:
                self.work = dist.irecv(self.buffer, self.peer, group=self.link.group, tag=self.tag)
        except RuntimeError as error:
            raise self._failed(error) from error

    @property
    def is_ready(self) -> bool:
        return self.work is None or bool(self.work.is_completed())

    def wait(self) -> None:
        timeout = self.link.timeout_s
        if self.work is None:
            return
        try:
            if timeout is None:
                self.work.wait()
            else:
                self.work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise self._failed(error) from error

    def parts(self) -> list[Tensor]:
        return unpack(self.buffer, self.like)

    def _failed(self, error: RuntimeError) -> PeerError:
        what = "take" if self.is_send else "send"
        return PeerError(
            f"rank {self.to} did not {what} what rank {self.link.rank} waits for ({self.flow}, {self.buffer.numel():,} bytes): "
            f"{str(error).splitlines()[0]}"
        )


_GROUPS: dict[tuple[int, str], dist.ProcessGroup] = {}


def _flow_group(group: dist.ProcessGroup, flow: str) -> dist.ProcessGroup:
    """A group of the same ranks of its own for each flow, so that queries do not wait in line behind results."""
    key = (id(group), flow)
    if key not in _GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _GROUPS[key] = dist.new_group(ranks, use_local_synchronization=True)
    return _GROUPS[key]


class SimulatedLinks:
    """Links between ranks that are all in this process, and a driver that takes turns between their programs.

    Args:
        world: N.
        seed: of the order of turns, and of how long messages take; None for one rank after another, and at once.
        traffic: what messages are counted in.
    """

    def __init__(self, world: int, *, seed: int | None = None, traffic: Traffic | None = None) -> None:
        self.world = world
        self.traffic = Traffic() if traffic is None else traffic
        self.turn = 0
        self._draw = None if seed is None else random.Random(seed)
        self._mail: dict[tuple[int, int, str, int, int], tuple[int, Tensor]] = {}

    def link(self, rank: int) -> "_SimulatedLink":
        """The ways from one rank."""
        return _SimulatedLink(self, rank)

    def put(self, key: tuple[int, int, str, int, int], buffer: Tensor) -> None:
        """A message (source, to, flow, step, number)."""
        assert key not in self._mail, f"two messages in one place: {key}"
        delay = 0 if self._draw is None else self._draw.randrange(8 * self.world)
        # A copy, as the sender may use its memory again.
        self._mail[key] = (self.turn + delay, buffer.clone())
        if buffer.numel():
            self.traffic.add(self.world, key[0], key[1], key[2], key[3], buffer.numel())

    def has(self, key: tuple[int, int, str, int, int]) -> bool:
        """Whether a message is there."""
        return key in self._mail and self._mail[key][0] <= self.turn

    def take(self, key: tuple[int, int, str, int, int]) -> Tensor:
        """The message, once."""
        return self._mail.pop(key)[1]

    def run(self, programs: Sequence[Any]) -> list[Any]:
        """Run the program of each rank to its end; what each gave, in order.

        Raises PeerError if all that are not done wait for what nobody sends, or something that was sent was not taken.
        """
        waiting: dict[int, Any] = dict.fromkeys(range(len(programs)))
        given: list[Any] = [None] * len(programs)
        idle = 0
        while waiting:
            self.turn += 1
            ready = [rank for rank, handle in waiting.items() if handle is None or handle.is_ready]
            idle = 0 if ready else idle + 1
            if idle > 8 * self.world:
                shown = ", ".join(f"rank {rank} for {handle.key}" for rank, handle in waiting.items())
                raise PeerError(f"all ranks wait, (source, to, flow, step, number): {shown}")
            if not ready:
                continue
            rank = ready[0] if self._draw is None else self._draw.choice(ready)
            handle = waiting[rank]
            if handle is not None:
                handle.wait()
            try:
                waiting[rank] = next(programs[rank])
            except StopIteration as end:
                given[rank] = end.value
                del waiting[rank]
        if self._mail:
            raise PeerError(f"nobody took the messages {sorted(self._mail)}")
        return given


class _SimulatedLink:
    """One rank's."""

    def __init__(self, links: SimulatedLinks, rank: int) -> None:
        self.links, self.rank = links, rank

    def exchange(
        self, flow: str, step: int, sends: Sequence[Send], receives: Sequence[Receive]
    ) -> tuple[list[Handle], list[Handle]]:
        """See `Link`."""
        outgoing: list[Handle] = []
        for to, number, parts in sends:
            self.links.put((self.rank, to, flow, step, number), pack(parts))
            outgoing.append(_Sent(flow))
        incoming: list[Handle] = [
            _Awaited(self.links, (source, self.rank, flow, step, number), like) for source, number, like in receives
        ]
        return outgoing, incoming


class _Sent:
    """A message that was copied."""

    is_ready = True

    def __init__(self, flow: str) -> None:
        self.flow, self.buffer, self.key = flow, torch.empty(0), None

    def wait(self) -> None:
        """It is gone."""

    def parts(self) -> list[Tensor]:
        return []


class _Awaited:
    """A message that another rank sends, or will."""

    def __init__(self, links: SimulatedLinks, key: tuple[int, int, str, int, int], like: Sequence[Tensor]) -> None:
        self.links, self.key, self.flow, self.like = links, key, key[2], like
        self.buffer = torch.empty(0)

    @property
    def is_ready(self) -> bool:
        return self.links.has(self.key)

    def wait(self) -> None:
        self.buffer = self.links.take(self.key)

    def parts(self) -> list[Tensor]:
        return unpack(self.buffer, self.like)


def everyone(link: Any, flow: str, mine: Sequence[Tensor]) -> Any:
    """A program: the parts of all ranks, in their order. They are alike on all."""
    others = [other for other in range(link.world) if other != link.rank]
    like = [part.to("meta") for part in mine]
    sent, received = link.exchange(flow, 0, [(to, 0, mine) for to in others], [(to, 0, like) for to in others])
    yield from (*received, *sent)
    parts = {other: handle.parts() for other, handle in zip(others, received, strict=True)}
    return [parts.get(rank, list(mine)) for rank in range(link.world)]


def drive(program: Any, traffic: Traffic) -> Any:
    """Run one rank's program, waiting for what it waits for; how long that took is counted."""
    while True:
        try:
            handle = next(program)
        except StopIteration as end:
            return end.value
        began = time.perf_counter()
        handle.wait()
        traffic.waited_s[handle.flow] += time.perf_counter() - began
