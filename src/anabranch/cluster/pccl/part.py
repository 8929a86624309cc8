"""What a peer does in a collective: waits for its turn on the links, moves the data, hears the verdict, and puts back what there was.

All peers come to the same end: each says how it fared, and the master tells all that it went well, or all that it did not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.cluster.pccl.faults import CollectiveError, Kicked, PeerLost, TagInUse, told
from anabranch.cluster.pccl.line import Line
from anabranch.cluster.pccl.links import AbortedError, LinkError, Links, Listener, Place
from anabranch.cluster.pccl.quantise import Quantiser
from anabranch.cluster.pccl.ring import WIDER, Wires, narrowed, ring_all_reduce, widened
from anabranch.errors import InputError

# Buffers for what is restored after an abort are kept for the next call up to so many bytes in all.
_MOST_KEPT = 1 << 30


@dataclass(frozen=True)
class Reduced:
    """What became of a collective.

    Attributes:
        world: peers that took part.
        alone: there was no other peer, and the result is what was given.
    """

    world: int
    alone: bool


@dataclass(frozen=True)
class Reduction:
    """One of several collectives; as the arguments of `Communicator.all_reduce`."""

    send: Tensor
    recv: Tensor | None = None
    op: str = "sum"
    quantise: Quantiser | str | None = None
    tag: int = 0
    world: int | None = None


@dataclass
class _Op:
    """A collective that this peer is in."""

    tag: int
    seq: int
    epoch: int
    is_aborted: bool = False


class Part:
    """A peer's part in what the group does; `anabranch.cluster.pccl.Communicator` is its public face.

    Args:
        listener, links: of this peer.
        line: to the master.
        wait_s, gives_up: as of `Communicator`.
        before: called with the name of what comes next; of tests, which let a peer die there.

    Attributes:
        sent_bytes: over links to neighbours, by collectives that came to their end here.
    """

    _line: Line
    _links: Links
    _listener: Listener

    def __init__(
        self, wait_s: float | None, gives_up: Callable[[], bool] | None, before: Callable[[str], None]
    ) -> None:
        self._wait_s, self._gives_up, self._before = wait_s, gives_up, before
        # Of ops and turns.
        self._turn = threading.Condition()
        self._ops: dict[tuple[int, int], _Op] = {}
        self._turns: dict[int, deque[int]] = {}
        self._aborted_epoch = -1
        self._is_building = False
        self._tags: set[int] = set()
        self._is_busy = False
        self._kept: list[Tensor] = []
        self._threads: ThreadPoolExecutor | None = None
        self._topology: dict[str, Any] = {}
        self.sent_bytes = 0
        # Let in by those who were past `wait_for`, and nothing was done with them yet.
        self._is_new = False

    @property
    def peer(self) -> int:
        """This peer's number, which no other in the run has or had."""
        return self._line.peer

    @property
    def run(self) -> str:
        """Name of the run, that of the master's first start."""
        return self._line.run

    @property
    def is_given_up(self) -> bool:
        """Whether ``gives_up`` says that this peer waits for nobody any more."""
        return self._gives_up is not None and self._gives_up()

    def _carry_out(
        self, op: _Op, reply: dict[str, Any], one: Reduction, target: Tensor, quantiser: Quantiser | None
    ) -> Reduced:
        ring = [Place.of(row) for row in reply["ring"]]
        with self._leaving_if_it_fails():
            return self._carried_out(op, ring, one, target, quantiser)

    def _carried_out(
        self, op: _Op, ring: list[Place], one: Reduction, target: Tensor, quantiser: Quantiser | None
    ) -> Reduced:
        is_wide = one.op == "avg" and one.send.dtype in WIDER
        is_plain = target.is_contiguous() and target.device.type == "cpu" and not target.is_neg()
        flat = target.detach().reshape(-1) if is_plain and not is_wide else None
        kept = None if flat is None else self._backup(flat)
        work = _staged(one.send) if flat is None else flat
        kind = one.op
        if is_wide:
            work, kind = widened(work, len(ring))
        failure: LinkError | None = None
        try:
            try:
                if flat is not None and one.recv is not None:
                    flat.copy_(one.send.detach().reshape(-1))
                if len(ring) > 1:
                    self._over_links(
                        op, ring, lambda wires, rank: ring_all_reduce(work, kind, rank, len(ring), wires, quantiser)
                    )
            except LinkError as error:
                failure = error
            finally:
                self._leave_turn(op, ring)
            is_aborted = self._verdict(op, failure)
        except BaseException:
            if kept is not None and flat is not None:
                flat.copy_(kept)
            raise
        finally:
            with self._turn:
                self._ops.pop((op.tag, op.seq), None)
        if is_aborted:
            if kept is not None and flat is not None:
                flat.copy_(kept)
                self._keep(kept)
            raise PeerLost(f"collective of tag {op.tag}: {failure or 'another peer was lost'}")
        if flat is None:
            whole = narrowed(work, len(ring), target.dtype) if is_wide else work
            target.copy_(whole.reshape(target.shape))
        if kept is not None:
            self._keep(kept)
        return Reduced(len(ring), len(ring) == 1)

    def _verdict(self, op: _Op, failure: LinkError | None) -> bool:
        vote = {"what": "complete", "tag": op.tag, "seq": op.seq, "aborted": failure is not None}
        if failure is not None and failure.accused is not None:
            vote["accused"] = failure.accused
        reply = self._vote(vote)
        with self._turn:
            if reply["epoch"] >= self._topology["epoch"]:
                self._topology = {key: reply[key] for key in ("epoch", "ring", "world", "groups", "largest")}
        return bool(reply["aborted"])

    def _over_links(self, op: _Op, ring: list[Place], work: Callable[[Wires, int], int]) -> None:
        """Wait for this collective's turn on its links, and do it."""

        def check() -> None:
            if op.is_aborted or self._line.error is not None:
                raise AbortedError("another peer was lost")

        self._ensure(op, ring, check)
        pool = min(place.pool for place in ring)
        index = op.seq % pool
        with self._turn:
            while self._turns[index][0] != op.seq:
                check()
                self._turn.wait(0.05)
        rank = next(number for number, place in enumerate(ring) if place.peer == self.peer)
        self._before("ring")
        check()
        sent = work(
            Wires(
                self._links.to_next[index],
                self._links.from_previous[index],
                ring[(rank + 1) % len(ring)].peer,
                ring[rank - 1].peer,
                op.tag,
                op.seq,
                self._line.times.idle_limit_s,
                check,
            ),
            rank,
        )
        with self._turn:
            self.sent_bytes += sent

    def _ensure(self, op: _Op, ring: list[Place], check: Callable[[], None]) -> None:
        """Links of the epoch of ``op``, once nothing of an older one is under way."""
        with self._turn:
            while self._is_building or self._links.epoch != op.epoch:
                check()
                if self._links.epoch > op.epoch:
                    raise AbortedError("the ring has changed")
                # An older one may want links too, and must get them or hear of its end first.
                if not self._is_building and all(other.epoch >= op.epoch for other in self._ops.values()):
                    break
                self._turn.wait(0.05)
            else:
                return
            self._is_building = True
        self._build(op.epoch, ring, check)

    def _build(self, epoch: int, ring: list[Place], check: Callable[[], None]) -> None:
        try:
            self._before("links")
            self._links.build(epoch, ring, self.peer, self.run, check)
        finally:
            with self._turn:
                self._is_building = False
                self._turn.notify_all()

    def _leave_turn(self, op: _Op, ring: list[Place]) -> None:
        with self._turn:
            for turns in self._turns.values():
                if op.seq in turns:
                    turns.remove(op.seq)
            self._turn.notify_all()

    def _vote(self, body: dict[str, Any], *, deadline: float | None = None) -> dict[str, Any]:
        # What comes after something was decided together is soon over, and not given up.
        is_short = body["what"] in ("complete", "established", "synced", "measured")
        left = self._wait_s if deadline is None else max(deadline - time.monotonic(), 0.0)
        reply = self._line.request(
            body,
            timeout_s=None if is_short else left,
            gives_up=None if is_short else self._gives_up,
        )
        if (error := told(reply)) is not None:
            raise error
        return reply

    def _form(self, reply: dict[str, Any]) -> None:
        """Make the links that the master asks for, and take the ring once all have theirs."""
        if reply.get("establish"):
            epoch, ring = int(reply["epoch"]), [Place.of(row) for row in reply["ring"]]

            def check() -> None:
                if self._aborted_epoch >= epoch:
                    raise AbortedError("another peer was lost")

            vote: dict[str, Any] = {"what": "established", "ok": True}
            try:
                self._build(epoch, ring, check)
            except LinkError as error:
                vote |= {"ok": False, "why": str(error)}
                if error.accused is not None:
                    vote["accused"] = error.accused
            reply = self._vote(vote)
        self._topology = reply

    def _on_reply(self, reply: dict[str, Any]) -> None:
        """In the line's thread, in the order in which the master decided."""
        if "seq" not in reply:
            return
        op = _Op(int(reply["tag"]), int(reply["seq"]), int(reply["epoch"]))
        pool = min(Place.of(row).pool for row in reply["ring"])
        with self._turn:
            self._ops[op.tag, op.seq] = op
            self._turns.setdefault(op.seq % pool, deque()).append(op.seq)

    def _on_abort(self, body: dict[str, Any]) -> None:
        with self._turn:
            for tag, seq in body.get("tags", []):
                if (op := self._ops.get((tag, seq))) is not None:
                    op.is_aborted = True
            self._aborted_epoch = max(self._aborted_epoch, int(body.get("epoch", -1)))
            self._turn.notify_all()

    def _alone_in_it(self, work: Callable[[], Any]) -> Any:
        with self._turn:
            if self._tags or self._is_busy:
                under_way = f"collectives of tags {sorted(self._tags)} are" if self._tags else "another operation is"
                raise TagInUse(f"{under_way} under way; wait for them first")
            self._is_busy, self._is_new = True, False
        try:
            with self._leaving_if_it_fails():
                return work()
        finally:
            with self._turn:
                self._is_busy = False

    @contextmanager
    def _leaving_if_it_fails(self) -> Iterator[None]:
        """What goes wrong here alone (memory, a signal) in the midst of an operation ends this peer's part, so that others do not wait."""
        try:
            yield
        except (CollectiveError, InputError):
            # All know of the one; the other is told before anybody is asked.
            raise
        except BaseException as error:
            self._line.fail(Kicked(f"it failed in the midst of an operation: {type(error).__name__}"))
            raise

    def _take_tag(self, tag: int) -> None:
        with self._turn:
            if self._is_busy or tag in self._tags:
                what = "another operation" if self._is_busy else f"a collective of tag {tag}"
                raise TagInUse(f"{what} is under way; wait for it first, or take another tag")
            self._tags.add(tag)
            self._is_new = False

    def _give_tag(self, tag: int) -> None:
        with self._turn:
            self._tags.discard(tag)

    def _backup(self, flat: Tensor) -> Tensor:
        """A copy; in a buffer of an earlier call where one fits, as fresh memory costs more than the copy."""
        with self._turn:
            for place, kept in enumerate(self._kept):
                if kept.dtype == flat.dtype and kept.numel() == flat.numel():
                    return self._kept.pop(place).copy_(flat)
        return flat.clone()

    def _keep(self, kept: Tensor) -> None:
        with self._turn:
            self._kept.append(kept)
            while sum(one.numel() * one.element_size() for one in self._kept) > _MOST_KEPT:
                self._kept.pop(0)

    def _die(self) -> None:
        """Be gone as if the process had been killed: of tests."""
        self._line.fail(CollectiveError("killed"))
        self._end()

    def _end(self) -> None:
        self._listener.close()
        with self._turn:
            for op in self._ops.values():
                op.is_aborted = True
            self._turn.notify_all()
        self._links.close()
        self._line.join_thread()
        if self._threads is not None:
            self._threads.shutdown(wait=False)


def _staged(send: Tensor) -> Tensor:
    """A flat copy on the CPU; pinned where it comes from a GPU, so that copies run at its link's speed."""
    flat = send.detach().resolve_neg().reshape(-1)
    if flat.device.type == "cpu":
        return flat.clone()
    staged = torch.empty(flat.numel(), dtype=flat.dtype, pin_memory=flat.device.type == "cuda")
    return staged.copy_(flat)


def quantiser_of(given: Quantiser | str | None) -> Quantiser | None:
    """What an argument means: a quantiser, or its kind with 8 bits."""
    return Quantiser(given) if isinstance(given, str) else given
