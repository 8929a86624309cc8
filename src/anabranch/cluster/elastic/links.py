"""A rank's links to the others: one connection for each pair, kept over every change of ranks; an edit opens those that are missing alone.

Frames go into a mailbox by (epoch, sender, tag). Who receives waits there, and is called away (`CalledAwayError`) when the coordinator
announces another epoch: no wait outlives the ranks it was for.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.cluster.elastic.wire import Body, Channel, Header, Listener, connect
from anabranch.errors import PeerError

__all__ = ["CalledAwayError", "LinkPool", "Packed", "pack", "unpack"]

log = logging.getLogger(__name__)

# For so long who leaves waits until others have taken what it sent.
_PARTING_S = 5.0
# Links that are opened at once, a thread for each.
_AT_ONCE = 64
# (list of [dtype, shape], bytes)
Packed = tuple[list[Any], bytes]
_NAMES = {
    name: getattr(torch, name)
    for name in ("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool").split()
}


class CalledAwayError(Exception):
    """The coordinator has announced something else to do."""


def pack(tensors: Collection[Tensor]) -> Packed:
    """Tensors as a list for a header and bytes."""
    spec, parts = [], []
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous()
        spec.append([str(flat.dtype).removeprefix("torch."), list(flat.shape)])
        parts.append(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return spec, b"".join(parts)


def unpack(spec: list[Any], body: Body) -> list[Tensor]:
    """The tensors of `pack`, as copies. Raises ValueError for bytes that are not as the list says."""
    found, place = [], 0
    for name, shape in spec:
        dtype = _NAMES[name]
        count = 1
        for size in shape:
            count *= int(size)
        size = count * dtype.itemsize
        if place + size > len(body):
            raise ValueError(f"{len(body)} bytes are too few for {spec}")
        if size:
            # One copy, so that each begins where its type may.
            raw = torch.from_numpy(np.frombuffer(body, np.uint8, size, place).copy())
            found.append(raw.view(dtype).view(tuple(shape)))
        else:
            found.append(torch.empty(tuple(shape), dtype=dtype))
        place += size
    if place != len(body):
        raise ValueError(f"{len(body)} bytes are too many for {spec}")
    return found


class LinkPool:
    """The links of one rank.

    Args:
        host: where others reach it.
        secret: of all.
        on_snapshot: called with (sender, header, body) of a snapshot, in the thread that reads.
        interrupted: whether whoever waits is called away; asked with ``changed`` held.
        suspect: called with a rank whose link broke.
        waiting: a context in which this rank waits for what it is given: ``{"ranks": [...]}`` when it is called.
        timeout_s: after so long a wait ends with PeerError; infinite where others see to it that none lasts for ever.

    Attributes:
        rank: set when the coordinator has told it.
        changed: notified whenever something came.
        opened, closed: links, ever.
        sent_bytes: by peer, of links that were closed.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        *,
        on_snapshot: Callable[[int, Header, Body], None],
        interrupted: Callable[[], bool],
        suspect: Callable[[int], None],
        timeout_s: float,
        waiting: Callable[[Callable[[], Header]], AbstractContextManager[None]] = lambda of: nullcontext(),
    ) -> None:
        self.rank = -1
        self.changed = threading.Condition()
        self.opened = self.closed = 0
        self.sent_bytes: dict[int, int] = {}
        self._secret, self._timeout_s = secret, timeout_s
        self._on_snapshot, self._interrupted, self._suspect = on_snapshot, interrupted, suspect
        self._waiting = waiting
        self._channels: dict[int, Channel] = {}
        self._mail: dict[tuple[int, int, str], tuple[Header, Body]] = {}
        self._epoch = 0
        self._members: set[int] = set()
        self._is_closed = False
        self._listener = Listener(host, 0, secret, self._on_frame, self._on_close, tell=log.warning)
        self.port = self._listener.port

    @property
    def count(self) -> int:
        """Open links."""
        return len(self._channels)

    def edit(self, epoch: int, members: Mapping[int, tuple[str, int]]) -> tuple[int, int]:
        """Links to exactly these ranks; mail of older epochs is dropped. Returns how many were (opened, closed).

        The rank with the higher number opens a link, the other one waits for it. Raises CalledAwayError when called away, PeerError after
        ``timeout_s``.
        """
        with self.changed:
            before, self._epoch, self._members = self._members, epoch, set(members)
            self._mail = {key: value for key, value in self._mail.items() if key[0] >= epoch}
            # Out of the table here, not where it is closed: if the other end was quicker, the thread that hears of it may not have come to
            # that yet, and a link that is over would be taken for one that is there.
            gone = [link for link in self._channels.items() if link[0] not in members or link[1].is_closed]
            for rank, _ in gone:
                del self._channels[rank]
            missing = [rank for rank in members if rank not in self._channels and rank != self.rank]
        for rank, channel in gone:
            channel.close("its rank is gone")
            self._count(rank, channel)
            if rank in before and rank in members:
                self._suspect(rank)
        self._open_all({rank: members[rank] for rank in missing if rank < self.rank})
        self._wait_for(
            lambda: all(rank in self._channels for rank in missing),
            lambda: [rank for rank in missing if rank not in self._channels],
            lambda: f"no link to ranks {missing}",
        )
        return len(set(members) - before - {self.rank}), len(before - set(members))

    def send(self, target: int, tag: str, tensors: Collection[Tensor], **more: Any) -> int:
        """Queue tensors for a rank. Returns their bytes. A link that is broken loses them: the coordinator knows of it."""
        spec, body = pack(tensors)
        self.send_packed(target, {"kind": "data", "epoch": self._epoch, "tag": tag, "spec": spec, **more}, body)
        return len(body)

    def send_packed(self, target: int, header: Header, body: Body) -> None:
        """Queue a frame as it is."""
        channel = self._channels.get(target)
        if channel is not None:
            channel.send(header, body)

    def receive(self, source: int, tag: str) -> tuple[list[Tensor], Header]:
        """What ``source`` sent under ``tag`` in this epoch. Raises CalledAwayError when called away, PeerError after ``timeout_s``."""
        key = (self._epoch, source, tag)
        self._wait_for(lambda: key in self._mail, lambda: [source], lambda: f"rank {source} did not send {tag!r}")
        with self.changed:
            header, body = self._mail.pop(key)
        try:
            return unpack(header["spec"], body), header
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(f"rank {source} sent {tag!r} in a form that makes no sense: {error}") from None

    def close(self) -> None:
        """End all links, after what is queued has gone; those to ranks that do not take it are left after some seconds."""
        self._is_closed = True
        self._listener.close()
        channels = list(self._channels.values())
        for channel in channels:
            channel.close(after_sends=True)
        deadline = time.monotonic() + _PARTING_S
        for channel in channels:
            channel.wait_closed(max(deadline - time.monotonic(), 0))

    def _wait_for(self, holds: Callable[[], bool], ranks: Callable[[], list[int]], told: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._timeout_s
        with self.changed, self._waiting(lambda: {"ranks": ranks()}):
            while not holds():
                if self._interrupted():
                    raise CalledAwayError
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerError(f"{told()} in {self._timeout_s:g} s")
                self.changed.wait(min(left, 1.0))

    def _open_all(self, ranks: Mapping[int, tuple[str, int]]) -> None:
        """Open links at once: a newcomer waits as long as for one, and one that does not answer holds up no other."""
        if len(ranks) < 2:
            for rank, at in ranks.items():
                self._open(rank, *at)
            return
        with ThreadPoolExecutor(min(len(ranks), _AT_ONCE)) as pool:
            made = [pool.submit(self._open, rank, *at) for rank, at in ranks.items()]
        for one in made:
            one.result()

    def _open(self, rank: int, host: str, port: int) -> None:
        try:
            channel = connect(
                host,
                port,
                self._secret,
                on_frame=self._on_frame,
                on_close=self._on_close,
                peer=rank,
                timeout_s=min(self._timeout_s, 10.0),
            )
        except PeerError:
            self._suspect(rank)
            return
        channel.send({"kind": "link", "rank": self.rank})
        self._add(rank, channel)

    def _add(self, rank: int, channel: Channel) -> None:
        with self.changed:
            old = self._channels.get(rank)
            self._channels[rank] = channel
            self.opened += 1
            self.changed.notify_all()
        if old is not None:
            old.peer = None
            old.close("opened anew")
            self._count(rank, old)
        if channel.is_closed:
            # Before it was in the table, where nobody found it then.
            self._on_close(channel, "it ended at once")

    def _on_frame(self, channel: Channel, header: Header, body: Body) -> None:
        kind = header["kind"]
        if kind == "link" and channel.peer is None:
            channel.peer = int(header["rank"])
            channel.admit()
            self._add(channel.peer, channel)
            return
        if channel.peer is None:
            raise ValueError("data before its sender is known")
        if kind == "snapshot":
            self._on_snapshot(channel.peer, header, body)
        elif kind == "data" and int(header["epoch"]) >= self._epoch:
            with self.changed:
                self._mail[int(header["epoch"]), channel.peer, str(header["tag"])] = (header, body)
                self.changed.notify_all()

    def _count(self, rank: int, channel: Channel) -> None:
        with self.changed:
            self.closed += 1
            self.sent_bytes[rank] = self.sent_bytes.get(rank, 0) + channel.sent_bytes

    def _on_close(self, channel: Channel, why: str) -> None:
        with self.changed:
            rank = channel.peer
            if rank is None or self._channels.get(rank) is not channel:
                return
            del self._channels[rank]
            self._count(rank, channel)
            is_missed = rank in self._members and not self._is_closed
            self.changed.notify_all()
        if is_missed:
            self._suspect(rank)
