"""The coordinator: who is there, which layout holds, which step is committed. It is no rank, holds no weights and does no work of a step.

    with Coordinator(replicas=2, stages=2, secret="s3cret") as coordinator:
        ...                      # ranks: ElasticTrainer(..., coordinator=coordinator.address, secret="s3cret")

A step is committed in two phases: each rank votes when its update stands beside the weights; when all have, the step is decided and every
rank swaps it in. A rank that goes (its connection ends, or it is silent for ``patience_s``) before the decision takes the step back for
all; after it, all who are left have the step. Every change of ranks is an *epoch*: the new layout is announced, ranks move what must move
while the old layout still holds everything, and only when all are ready is it the layout. A loss in between begins another epoch from the
old one. How far a loss takes the training back, and where it cannot go on, `anabranch.cluster.elastic.ledger` says.

A rank that ends by an error is a rank that is lost: its error is told, and the others do its samples. Where the same step then ends another
rank by such an error it is the step that cannot be made, and training stops with it.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from anabranch.cluster.elastic.layout import Grid, Layout, layout_to, steps_of
from anabranch.cluster.elastic.ledger import Ledger
from anabranch.cluster.elastic.planner import Policy
from anabranch.cluster.elastic.replanning import Replanner
from anabranch.cluster.elastic.seats import Seat, refusal
from anabranch.cluster.elastic.stages import Memory
from anabranch.cluster.elastic.tree import TreeSum
from anabranch.cluster.elastic.wire import Channel, Header, Listener
from anabranch.errors import InputError

__all__ = ["Coordinator"]

_BEAT_S = 0.5
# How often two ranks that lose their link may open it again.
_MOST_TRIES = 3


class Coordinator:
    """A thread per connection, one state under a lock. A context manager.

    Args:
        replicas, stages: D and P; training begins when D P ranks are there.
        secret: that ranks must know.
        host, port: where it listens; port 0 finds a free one.
        patience_s: after so long without a word a rank counts as lost.
        policy: of the planner.
        memory: what layers take and ranks have, for the planner.
        layer_costs: seconds of each layer; None for those that ranks measure.
        chunk_bytes: of each piece that moves while training goes on, in one step. None: whoever comes, and layers that move, stop training
            until all is there.
        log: called with whatever happens, and its details.

    Attributes:
        history: (seconds since the beginning, what happened, details), for tests and for people.
    """

    def __init__(
        self,
        *,
        replicas: int,
        stages: int,
        secret: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        patience_s: float = 10.0,
        policy: Policy | None = None,
        memory: Memory | None = None,
        layer_costs: Sequence[float] | None = None,
        chunk_bytes: int | None = 4 * 2**20,
        log: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        for name, number in (("replicas", replicas), ("stages", stages)):
            if number < 1:
                raise InputError(f"{name} is {number}; use at least 1")
        if not patience_s > 2 * _BEAT_S:
            raise InputError(f"patience_s is {patience_s}; ranks are heard every {_BEAT_S} s, use more than twice that")
        if chunk_bytes is not None and chunk_bytes < 4:
            raise InputError(f"chunk_bytes is {chunk_bytes}; a number has 4, use more")
        self.replicas, self.stages = replicas, stages
        self._chunk = None if chunk_bytes is None else chunk_bytes // 4
        # The layout that pieces travel to while the other holds, and the version at which they are all there.
        self._stream: tuple[Layout, int] | None = None
        self._replans = False
        self.history: list[tuple[float, str, dict[str, Any]]] = []
        self._plans = Replanner(stages, policy, memory, layer_costs)
        self._patience_s, self._log = patience_s, log
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._members: dict[int, Seat] = {}
        self._next_rank = replicas * stages
        self._epoch = 0
        # What holds: the last layout for which all ranks were ready, its committed steps, and who keeps whose snapshots in it.
        self._layout: Layout | None = None
        self._version = 0
        self._ledger = Ledger()
        # Of ranks that are gone, why; and the step and the kind of error by which the last one ended.
        self._lost: dict[int, str] = {}
        self._failed: tuple[int, str] | None = None
        # What is announced, until all are ready.
        self._target: Layout | None = None
        self._joiners: list[int] = []
        self._suspects: dict[tuple[int, int], int] = {}
        # Since when two ranks cannot reach each other, as one of them says.
        self._doubts: dict[tuple[int, int], float] = {}
        self._stopped: str | None = None
        self._is_ending = False
        self._checkpoint: str | None = None
        self._saved: dict[int, Header] = {}
        self._listener = Listener(host, port, secret.encode(), self._on_frame, self._on_close)
        self.address = f"[{host}]:{self._listener.port}" if ":" in host else f"{host}:{self._listener.port}"
        self._watching = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; ranks that still train are told."""
        self._watching.set()
        self._listener.close()
        with self._lock:
            members = list(self._members.values())
            self._members.clear()
        for member in members:
            member.channel.send({"kind": "stop", "why": "the coordinator was closed"})
            member.channel.close(after_sends=True)

    @property
    def version(self) -> int:
        """Steps that are committed."""
        with self._lock:
            return self._version

    @property
    def floor(self) -> int | None:
        """The version below which no loss takes the training back; None where nobody keeps snapshots of all ranks."""
        with self._lock:
            return self._ledger.floor

    @property
    def layout(self) -> Layout | None:
        """The layout that holds; None before training begins."""
        with self._lock:
            return self._layout

    @property
    def stopped(self) -> str | None:
        """Why training has stopped before its end; None where it has not."""
        with self._lock:
            return self._stopped

    @property
    def has_ended(self) -> bool:
        """Whether training was done, or has stopped, and nobody is there any more."""
        with self._lock:
            return (self._is_ending or self._stopped is not None) and not self._members

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who is there."""
        with self._lock:
            return tuple(sorted(self._members))

    def wait_for(self, holds: Callable[["Coordinator"], bool], timeout_s: float = 60.0) -> bool:
        """Until ``holds`` of this coordinator; whether it did in time."""
        deadline = time.monotonic() + timeout_s
        while not holds(self):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    # What ranks tell

    def _on_frame(self, channel: Channel, header: Header, body: bytes) -> None:
        with self._lock:
            kind = header.get("kind")
            if kind == "hello":
                self._hello(channel, header)
                return
            member = self._members.get(channel.peer)
            if member is None or member.channel is not channel:
                channel.close("not a member")
                return
            member.heard = time.monotonic()
            told = {
                "ready": self._ready, "vote": self._vote, "held": self._held, "suspect": self._suspect, "bad": self._bad,
                "fail": self._fail, "quit": self._quit, "leave": self._leave, "saved": self._save, "wrote": self._wrote,
                "beat": lambda member, header: None,
            }.get(str(kind))  # fmt: skip
            if told is None:
                raise ValueError(f"kind {kind!r}")
            told(member, header)

    def _on_close(self, channel: Channel, why: str) -> None:
        with self._lock:
            member = self._members.get(channel.peer)
            if member is not None and member.channel is channel:
                self._lose([member.rank], why)

    def _watch(self) -> None:
        while not self._watching.wait(_BEAT_S):
            with self._lock:
                now = time.monotonic()
                silent = [m.rank for m in self._members.values() if now - m.heard > self._patience_s]
                if silent:
                    self._lose(silent, f"silent for {self._patience_s:g} s")
                self._try_anew(now)

    def _try_anew(self, now: float) -> None:
        """Where two ranks that are both there have lost their link: another epoch, in which it is opened again."""
        pairs = [pair for pair, since in self._doubts.items() if now - since >= _BEAT_S]
        if not pairs:
            return
        self._doubts = {pair: since for pair, since in self._doubts.items() if pair not in pairs}
        is_on = self._layout is not None and not (self._stopped or self._is_ending)
        if is_on and any(all(rank in self._members for rank in pair) for pair in pairs):
            self._begin_epoch()

    def _hello(self, channel: Channel, header: Header) -> None:
        why = self._refusal(header)
        if why is not None:
            self._note("refused", why=why)
            channel.send({"kind": "refuse", "why": why})
            channel.close(after_sends=True)
            return
        wish = header.get("wish")
        is_forming = self._layout is None
        whole = self.replicas * self.stages
        if is_forming and len(self._members) >= whole:
            channel.send(
                {"kind": "refuse", "why": f"{whole} ranks are there already; one can join when training has begun"}
            )
            channel.close(after_sends=True)
            return
        if is_forming and isinstance(wish, int) and 0 <= wish < whole and wish not in self._members:
            rank = wish
        elif is_forming:
            rank = min(set(range(whole)) - set(self._members))
        else:
            rank, self._next_rank = self._next_rank, self._next_rank + 1
        if not self._plans.signature:
            self._plans.signature = header["signature"]
            self._ledger.copies = int(header["signature"]["copies"])
        channel.peer = rank
        self._members[rank] = Seat(rank, channel, str(header["host"]), int(header["port"]), header, time.monotonic())
        channel.send({"kind": "welcome", "rank": rank, "micro_batches": self._plans.micro_batches})
        self._note("joined", rank=rank)
        if is_forming and len(self._members) == whole:
            self._form()
        elif not is_forming:
            self._joiners.append(rank)

    def _refusal(self, header: Header) -> str | None:
        if self._stopped is not None:
            return f"training has stopped: {self._stopped}"
        if self._is_ending:
            return "training has ended"
        return refusal(header, self._plans.signature or None, (self.replicas, self.stages))

    def _ready(self, member: Seat, header: Header) -> None:
        if header["epoch"] != self._epoch or self._target is None:
            return
        member.is_ready = True
        wanted = set(self._target.grid.ranks)
        if all(m.is_ready for m in self._members.values() if m.rank in wanted):
            self._layout, self._target = self._target, None
            self._ledger.hold(self._layout, self._version)
            for other in self._members.values():
                other.vote = None
            self._note("go", epoch=self._epoch, version=self._version)
            self._tell({"kind": "go", "epoch": self._epoch})

    def _vote(self, member: Seat, header: Header) -> None:
        if header["epoch"] != self._epoch or self._target is not None or header["step"] != self._version:
            return
        assert self._layout is not None
        member.vote = header
        self._plans.measured(header.get("costs", {}))
        # Those who take what travels vote too: when a stream ends they have it all.
        watching = () if self._stream is None else self._stream[0].grid.ranks
        ranks = dict.fromkeys((*self._layout.grid.ranks, *watching))
        if not all((m := self._members.get(rank)) is not None and m.vote is not None for rank in ranks):
            return
        told: Header = {"kind": "commit", "epoch": self._epoch, "step": self._version, "loss": self._losses(ranks)}
        self._version += 1
        if self._stream is not None:
            self._tell(told)
            if self._version == self._stream[1]:
                self._begin_epoch(self._stream[0])
            return
        joins = [rank for rank in self._joiners if rank in self._members]
        target = None
        if joins or self._replans:
            self._joiners, self._replans = [], False
            target = self._plans.grown(self._layout, joins)
            if target is not None and self._chunk is not None:
                # In the same message: all begin with the same step.
                told["live"] = self._begin_stream(target, self._chunk)
        self._tell(told)
        if target is not None and self._chunk is None:
            self._begin_epoch(target)

    def _losses(self, ranks: Collection[int]) -> dict[str, str]:
        """By name, what votes told of the loss and its terms, added up; votes are then counted."""
        sums: dict[str, TreeSum[float]] = {}
        votes = [self._members[rank].vote or {} for rank in ranks]
        for vote in votes:
            for name, level, place, value in vote["loss"]:
                tree = sums.setdefault(name, TreeSum(int(votes[0]["blocks"])))
                tree.add_node((level, place), float.fromhex(value))
        for rank in ranks:
            self._members[rank].vote = None
        return {name: tree.root().hex() for name, tree in sums.items()}

    def _held(self, member: Seat, header: Header) -> None:
        owner, version, epoch = (int(header[name]) for name in ("owner", "version", "layout"))
        self._ledger.heard(holder=member.rank, owner=owner, version=version, epoch=epoch)

    def _suspect(self, member: Seat, header: Header) -> None:
        accused = int(header["rank"])
        if header["epoch"] != self._epoch or accused not in self._members:
            return
        pair = (min(member.rank, accused), max(member.rank, accused))
        self._suspects[pair] = self._suspects.get(pair, 0) + 1
        self._note("suspect", by=member.rank, accused=accused)
        if self._suspects[pair] > _MOST_TRIES:
            self._lose([accused], f"rank {member.rank} does not reach it")
        else:
            # Its own connection will end in a moment if its process has. If not, all try anew.
            self._doubts[pair] = time.monotonic()

    def _bad(self, member: Seat, header: Header) -> None:
        owner = int(header["owner"])
        self._note("bad snapshot", owner=owner, holder=member.rank, why=header.get("why"))
        self._ledger.damaged(holder=member.rank, owner=owner)
        if header["epoch"] == self._epoch:
            self._begin_epoch()

    def _fail(self, member: Seat, header: Header) -> None:
        step, why = int(header["step"]), str(header["why"])
        self._note("failed", rank=member.rank, step=step, why=why)
        # Others have the same samples then: what ends two of them so does not lie in one machine.
        failed, self._failed = self._failed, (step, why.partition(":")[0])
        if self._failed == failed:
            self._stop(f"step {step} ends one rank after another: rank {member.rank} failed: {why}")
        else:
            self._lose([member.rank], f"it failed: {why}")

    def _quit(self, member: Seat, header: Header) -> None:
        self._lose([member.rank], "it left before the end")

    def _leave(self, member: Seat, header: Header) -> None:
        del self._members[member.rank]
        member.channel.close(after_sends=True)
        self._note("left", rank=member.rank)
        # A rank leaves when training is done: who goes now is not missed, and who waits to join waits in vain.
        self._is_ending = True
        for rank in self._joiners:
            if rank in self._members:
                self._members[rank].channel.send({"kind": "stop", "why": "training has ended"})

    def _save(self, member: Seat, header: Header) -> None:
        self._saved[member.rank] = header
        assert self._layout is not None
        ranks = self._layout.grid.ranks
        of = [self._saved.get(rank) for rank in ranks]
        if not all(one is not None and one["version"] == header["version"] for one in of):
            return
        failed = next(((rank, one["why"]) for rank, one in zip(ranks, of, strict=True) if one and one.get("why")), None)
        told: Header = {"kind": "saved", "version": header["version"], "folder": header["folder"]}
        self._note("saved", version=header["version"], why=None if failed is None else failed[1])
        if failed is None:
            self._checkpoint = f"{header['folder']} (step {header['version']})"
            told["files"] = {str(rank): one["file"] for rank, one in zip(ranks, of, strict=True) if one}
        else:
            told["why"] = f"rank {failed[0]}: {failed[1]}"
        self._saved = {}
        self._tell(told)

    def _wrote(self, member: Seat, header: Header) -> None:
        """The first rank has a checkpoint on disk that any number of ranks can read."""
        where = str(header["where"])
        self._checkpoint = f"{where} (step {header['version']})"
        self._note("wrote", rank=member.rank, version=header["version"], where=where)
        if header["is_last"]:
            # Nobody is missed from here on.
            self._is_ending = True
            self._tell({"kind": "finished", "where": where})

    # What follows

    def _form(self) -> None:
        first = next(iter(self._members.values()))
        for member in self._members.values():
            if member.hello["weights"] != first.hello["weights"]:
                self._stop(
                    f"rank {member.rank} begins with other weights than rank {first.rank}; give all the same seed, or the same checkpoint"
                )
                return
        self._version = int(first.hello["version"])
        self._begin_epoch()

    def _lose(self, ranks: Sequence[int], why: str) -> None:
        lost = [self._members.pop(rank) for rank in ranks if rank in self._members]
        if not lost:
            return
        for member in lost:
            self._note("lost", rank=member.rank, why=why)
            self._lost[member.rank] = why
            member.channel.peer = None
            member.channel.close("lost")
        self._joiners = [rank for rank in self._joiners if rank not in ranks]
        layouts = (self._layout, self._target, None if self._stream is None else self._stream[0])
        matters = {rank for layout in layouts if layout is not None for rank in layout.grid.ranks}
        if self._stopped or self._is_ending or not matters & set(ranks):
            return
        if self._layout is not None:
            self._begin_epoch()
            return
        # Training has not begun: the others wait for one in its place.
        self._target = None
        self._tell({"kind": "regroup"})

    def _begin_stream(self, target: Layout, chunk: int) -> Header:
        """Pieces begin to travel to a layout; what ranks are told of it."""
        assert self._layout is not None
        end = self._version + steps_of(self._layout, target, self._plans.sizes, chunk)
        self._stream = (target, end)
        self._note("stream", version=self._version, end=end, bounds=list(target.bounds))
        return {
            "kind": "live",
            "epoch": self._epoch,
            "version": self._version,
            "chunk": chunk,
            "before": layout_to(self._layout),
            "after": layout_to(target),
            "members": self._addresses(),
        }

    def _begin_epoch(self, target: Layout | None = None) -> None:
        """Announce a layout: the target, or that of the ranks that are there with the layers where they are."""
        self._epoch += 1
        self._doubts.clear()
        waiting = [
            layout for layout in (self._target, None if self._stream is None else self._stream[0]) if layout is not None
        ]
        before = self._layout
        if before is not None and target is None:
            # Who was to come in what failed comes after the next commit.
            old = set(before.grid.ranks)
            late = {
                rank for layout in waiting for rank in layout.grid.ranks if rank not in old and rank in self._members
            }
            self._joiners += sorted(late - set(self._joiners))
        self._stream = None
        way = self._ledger.way_back(self._members.keys(), self._version)
        if way.why is not None:
            self._stop(
                f"{way.why}{self._told_of_lost(before)}; the last checkpoint: {self._checkpoint or 'there is none'}",
                is_lost=True,
            )
            return
        if before is None:
            grid = Grid.full(replicas=self.replicas, stages=self.stages)
        else:
            dead = [rank for rank in before.grid.ranks if rank not in self._members]
            grid = before.grid.without(dead).healed()
            self._replans = bool(dead)
        layout = (
            self._plans.planned(grid, None if before is None else before.bounds, moves_layers=False).layout
            if target is None
            else target
        )
        made = self._plans.planned(layout.grid, layout.bounds, moves_layers=False)
        self._target = layout
        self._ledger.announce(self._epoch)
        for member in self._members.values():
            member.is_ready, member.vote = False, None
        self._version = base = way.version
        self._note(
            "epoch",
            epoch=self._epoch,
            version=base,
            floor=self._ledger.floor,
            stages=[list(stage) for stage in layout.grid.stages],
            bounds=list(layout.bounds),
            warnings=list(made.warnings),
        )
        self._tell(
            {
                "kind": "epoch",
                "epoch": self._epoch,
                "version": base,
                "before": None if before is None else layout_to(before),
                "after": layout_to(layout),
                "schedule": made.schedule_name,
                "costs": self._plans.layer_costs,
                "holders": {str(owner): list(holders) for owner, holders in way.holders.items()},
                "lost": {str(rank): self._lost.get(rank, "") for rank in way.holders},
                "members": self._addresses(),
                "step_s": made.step_s,
                "warnings": list(made.warnings),
            }
        )

    def _addresses(self) -> dict[str, list[Any]]:
        return {str(member.rank): [member.host, member.port] for member in self._members.values()}

    def _told_of_lost(self, before: Layout | None) -> str:
        """Why those of a layout are lost who ended by an error."""
        ranks = () if before is None else before.grid.ranks
        failed = [f"rank {rank}: {self._lost[rank]}" for rank in ranks if "failed" in self._lost.get(rank, "")]
        return f" ({'; '.join(failed)})" if failed else ""

    def _stop(self, why: str, *, is_lost: bool = False) -> None:
        if self._stopped is None:
            self._stopped = why
            self._note("stopped", why=why)
            self._tell({"kind": "stop", "why": why, "is_lost": is_lost})

    def _tell(self, header: Header) -> None:
        for member in self._members.values():
            member.channel.send(header)

    def _note(self, what: str, **details: Any) -> None:
        self.history.append((time.monotonic() - self._began, what, details))
        if self._log is not None:
            self._log(what, details)
