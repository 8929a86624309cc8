"""The coordinator: who is there, which layout holds, which step is committed. It is no rank, holds no weights and does no work of a step.

    with Coordinator(replicas=2, stages=2, secret="s3cret") as coordinator:
        ...                      # ranks: ElasticTrainer(..., coordinator=coordinator.address, secret="s3cret")

A step is committed in two phases: each rank votes when its update stands beside the weights; when all have, the step is decided and every
rank swaps it in. A rank that goes (its connection ends, or it is silent for ``patience_s``) before the decision takes the step back for
all; after it, all who are left have the step. Every change of ranks is an *epoch*: the new layout is announced, ranks move what must move
while the old layout still holds everything, and only when all are ready is it the layout. A loss in between begins another epoch from the
old one.
"""

import hmac
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.planner import ElasticPlan, Policy, plan
from anabranch.cluster.elastic.stages import Memory
from anabranch.cluster.elastic.streaming import steps_of
from anabranch.cluster.elastic.tree import TreeSum
from anabranch.cluster.elastic.wire import Channel, Header, Listener
from anabranch.errors import InputError

__all__ = ["Coordinator", "layout_from", "layout_to"]

_BEAT_S = 0.5
# How often two ranks that lose their link may open it again.
_MOST_TRIES = 3


@dataclass
class _Member:
    """One rank.

    Attributes:
        rank: its name.
        channel: to it.
        host, port: where other ranks reach it.
        hello: what it said of itself.
        heard: when it was last heard of.
        held: of others, the version of the snapshot that it keeps in the layout that holds.
        held_next: likewise in the layout that is announced.
        vote: of the step that runs, what it told.
        is_ready: for the epoch that is announced.
    """

    rank: int
    channel: Channel
    host: str
    port: int
    hello: Header
    heard: float
    held: dict[int, int] = field(default_factory=dict)
    held_next: dict[int, int] = field(default_factory=dict)
    vote: Header | None = None
    is_ready: bool = False


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
        log: called with a line for whatever happens.

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
        log: Callable[[str], None] | None = None,
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
        self._policy, self._memory, self._given_costs = policy or Policy(), memory, layer_costs
        self._patience_s, self._log = patience_s, log
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._members: dict[int, _Member] = {}
        self._signature: Header | None = None
        self._next_rank = replicas * stages
        self._epoch = 0
        # What holds: the last layout for which all ranks were ready, its committed steps, and who keeps whose snapshots in it.
        self._layout: Layout | None = None
        self._layout_epoch = 0
        self._version = 0
        self._copies = 1
        self._bad_snapshots: set[tuple[int, int]] = set()
        # What is announced, until all are ready.
        self._target: Layout | None = None
        self._schedule_name = "1f1b"
        self._costs: dict[int, float] = {}
        self._joiners: list[int] = []
        self._suspects: dict[tuple[int, int], int] = {}
        # Since when two ranks cannot reach each other, as one of them says.
        self._doubts: dict[tuple[int, int], float] = {}
        self._stopped: str | None = None
        self._is_ending = False
        self._checkpoint: str | None = None
        self._saved: dict[int, Header] = {}
        self._listener = Listener(host, port, secret.encode(), self._on_frame, self._on_close)
        self.address = f"{host}:{self._listener.port}"
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
    def layout(self) -> Layout | None:
        """The layout that holds; None before training begins."""
        with self._lock:
            return self._layout

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
                "fail": self._fail, "leave": self._leave, "saved": self._save, "beat": lambda member, header: None,
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
        if self._signature is None:
            self._signature = header["signature"]
            self._copies = int(header["copies"])
        channel.peer = rank
        self._members[rank] = _Member(rank, channel, str(header["host"]), int(header["port"]), header, time.monotonic())
        channel.send({"kind": "welcome", "rank": rank})
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
        if self._signature is None:
            return None
        mine, theirs = self._signature, header.get("signature")
        if not isinstance(theirs, dict):
            return "it says nothing of its model"
        for name in sorted({*mine, *theirs}):
            if not hmac.compare_digest(json.dumps(mine.get(name)), json.dumps(theirs.get(name))):
                return f"its {name} is {theirs.get(name)}, and those here have {mine.get(name)}"
        return None

    def _ready(self, member: _Member, header: Header) -> None:
        if header["epoch"] != self._epoch or self._target is None:
            return
        member.is_ready = True
        wanted = set(self._target.grid.ranks)
        if all(m.is_ready for m in self._members.values() if m.rank in wanted):
            self._layout, self._target = self._target, None
            self._bad_snapshots.clear()
            self._layout_epoch = self._epoch
            for other in self._members.values():
                other.vote, other.held, other.held_next = None, other.held_next, {}
            self._note("go", epoch=self._epoch, version=self._version)
            self._tell({"kind": "go", "epoch": self._epoch})

    def _vote(self, member: _Member, header: Header) -> None:
        if header["epoch"] != self._epoch or self._target is not None or header["step"] != self._version:
            return
        assert self._layout is not None
        member.vote = header
        for layer, seconds in header.get("costs", {}).items():
            self._costs[int(layer)] = float(seconds)
        # Those who take what travels vote too: when a stream ends they have it all.
        watching = () if self._stream is None else self._stream[0].grid.ranks
        ranks = dict.fromkeys((*self._layout.grid.ranks, *watching))
        if not all((m := self._members.get(rank)) is not None and m.vote is not None for rank in ranks):
            return
        loss: TreeSum[float] = TreeSum(int((self._members[self._layout.grid.ranks[0]].vote or {})["blocks"]))
        for rank in ranks:
            for level, place, value in (self._members[rank].vote or {})["loss"]:
                loss.add_node((level, place), float.fromhex(value))
            self._members[rank].vote = None
        self._version += 1
        told: Header = {"kind": "commit", "epoch": self._epoch, "step": self._version - 1, "loss": loss.root().hex()}
        if self._stream is not None:
            self._tell(told)
            if self._version == self._stream[1]:
                self._begin_epoch(self._stream[0])
            return
        joins = [rank for rank in self._joiners if rank in self._members]
        target = None
        if joins or self._replans:
            self._joiners, self._replans = [], False
            target = self._grown(joins)
            if target is not None and self._chunk is not None:
                # In the same message: all begin with the same step.
                told["live"] = self._begin_stream(target, self._chunk)
        self._tell(told)
        if target is not None and self._chunk is None:
            self._begin_epoch(target)

    def _held(self, member: _Member, header: Header) -> None:
        if header["layout"] == self._layout_epoch:
            member.held[int(header["owner"])] = int(header["version"])
        elif header["layout"] == self._epoch:
            member.held_next[int(header["owner"])] = int(header["version"])

    def _suspect(self, member: _Member, header: Header) -> None:
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

    def _bad(self, member: _Member, header: Header) -> None:
        owner = int(header["owner"])
        self._note("bad snapshot", owner=owner, holder=member.rank, why=header.get("why"))
        self._bad_snapshots.add((owner, member.rank))
        if header["epoch"] == self._epoch:
            self._begin_epoch()

    def _fail(self, member: _Member, header: Header) -> None:
        self._stop(f"rank {member.rank} failed: {header['why']}")

    def _leave(self, member: _Member, header: Header) -> None:
        del self._members[member.rank]
        member.channel.close(after_sends=True)
        self._note("left", rank=member.rank)
        # A rank leaves when training is done: who goes now is not missed, and who waits to join waits in vain.
        self._is_ending = True
        for rank in self._joiners:
            if rank in self._members:
                self._members[rank].channel.send({"kind": "stop", "why": "training has ended"})

    def _save(self, member: _Member, header: Header) -> None:
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
            member.channel.peer = None
            member.channel.close("lost")
        self._joiners = [rank for rank in self._joiners if rank not in ranks]
        layouts = (self._layout, self._target, None if self._stream is None else self._stream[0])
        matters = {rank for layout in layouts if layout is not None for rank in layout.grid.ranks}
        if self._layout is not None and not (self._stopped or self._is_ending) and matters & set(ranks):
            self._begin_epoch()

    def _grown(self, joins: Sequence[int]) -> Layout | None:
        """The layout with ranks that come in, and with layers moved where the plan says it is worth it; None where that is the same."""
        assert self._layout is not None
        grid = self._layout.grid
        for rank in joins:
            grid = grid.with_rank(rank)
        made = self._planned(grid, self._layout.bounds, moves_layers=True)
        return None if made.layout == self._layout else made.layout

    def _begin_stream(self, target: Layout, chunk: int) -> Header:
        """Pieces begin to travel to a layout; what ranks are told of it."""
        assert self._layout is not None
        end = self._version + steps_of(self._layout, target, (self._signature or {})["sizes"], chunk)
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
        if before is None:
            grid = Grid.full(replicas=self.replicas, stages=self.stages)
        else:
            dead = [rank for rank in before.grid.ranks if rank not in self._members]
            why = self._place_of_dead(before, dead)
            if why is None and len(dead) == len(before.grid.ranks):
                why = "no rank is left"
            if why is not None:
                self._stop(why, is_lost=True)
                return
            grid = before.grid.without(dead).healed()
            self._replans = bool(dead)
        layout = (
            self._planned(grid, None if before is None else before.bounds, moves_layers=False).layout
            if target is None
            else target
        )
        made = self._planned(layout.grid, layout.bounds, moves_layers=False)
        self._target = layout
        base = self._version if before is None else self._base_version(before)
        for member in self._members.values():
            member.is_ready, member.vote, member.held_next = False, None, {}
        self._version = base
        self._note(
            "epoch",
            epoch=self._epoch,
            version=base,
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
                "costs": self._layer_costs(),
                "holders": {} if before is None else self._holders(before),
                "members": self._addresses(),
                "step_s": made.step_s,
                "warnings": list(made.warnings),
            }
        )

    def _planned(self, grid: Grid, bounds: tuple[int, ...] | None, *, moves_layers: bool) -> ElasticPlan:
        """The plan for some ranks, from where layers begin now."""
        signature = self._signature or {}
        sizes = signature["sizes"]
        has_as_many = bounds is not None and len(bounds) == len(grid.stages) - 1
        return plan(
            grid,
            self._layer_costs(),
            global_batch=int(signature["global_batch"]),
            micro_batches=int(signature["micro_batches"]),
            block=int(signature["block"]),
            memory=self._memory,
            size_L=sizes,
            # Who answers for whom is in the announcement; here only bounds count.
            previous=Layout(grid, bounds, len(sizes)) if has_as_many and bounds is not None else None,
            policy=self._policy if moves_layers else replace(self._policy, moves_layers=False),
        )

    def _addresses(self) -> dict[str, list[Any]]:
        return {str(member.rank): [member.host, member.port] for member in self._members.values()}

    def _holders(self, before: Layout) -> dict[str, list[int]]:
        """Of each lost rank, who is there with a sound snapshot."""
        found = {}
        for owner in before.grid.ranks:
            if owner not in self._members:
                kept = before.holders(owner, self._copies)
                found[str(owner)] = [r for r in kept if r in self._members and (owner, r) not in self._bad_snapshots]
        return found

    def _base_version(self, before: Layout) -> int:
        """The newest version that somebody has of every slice: the committed one, or the one before where a snapshot was on its way."""
        base = self._version
        for owner, kept in self._holders(before).items():
            newest = max((self._members[holder].held.get(int(owner), -1) for holder in kept), default=base)
            base = min(base, newest)
        return base

    def _place_of_dead(self, before: Layout, dead: Sequence[int]) -> str | None:
        """Why it cannot go on; None where every slice is with somebody."""
        holders = self._holders(before)
        for owner in dead:
            kept = holders[str(owner)]
            newest = max((self._members[holder].held.get(owner, -1) for holder in kept), default=-1)
            if newest < self._version - 1:
                where = "its neighbour is lost too" if not kept else "no neighbour has a snapshot of the last two steps"
                if any(one == owner for one, _ in self._bad_snapshots):
                    where = "the snapshot of it is damaged"
                way = self._checkpoint or "there is none"
                return f"rank {owner} is lost, and {where}; the last checkpoint: {way}"
        return None

    def _layer_costs(self) -> list[float]:
        sizes = (self._signature or {})["sizes"]
        if self._given_costs is not None:
            return list(self._given_costs)
        if len(self._costs) == len(sizes):
            return [self._costs[layer] for layer in range(len(sizes))]
        # Until they are measured: by parameters, and something for layers without.
        return [1e-9 * (size + 1) for size in sizes]

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
            self._log(f"{what} {details}")


def layout_to(layout: Layout) -> Header:
    """JSON-ready."""
    return {
        "stages": [list(stage) for stage in layout.grid.stages],
        "replicas": layout.grid.replicas,
        "bounds": list(layout.bounds),
        "num_layers": layout.num_layers,
    }


def layout_from(told: Header) -> Layout:
    """What `layout_to` told."""
    grid = Grid(tuple(tuple(stage) for stage in told["stages"]), int(told["replicas"]))
    return Layout(grid, tuple(told["bounds"]), int(told["num_layers"]))
