"""A coordinator's decisions without sockets: lines that keep what is said, and ranks that are words alone."""

import time

from anabranch.cluster.elastic.decisions import Decisions
from anabranch.cluster.elastic.replanning import Replanner

SIGNATURE = {"sizes": [6, 6, 6, 6], "global_batch": 8, "micro_batches": 0, "block": 1, "copies": 1, "seed": 5}


HELLO = {
    "kind": "hello",
    "host": "127.0.0.1",
    "port": 4711,
    "weights": "ab",
    "moments": "",
    "version": 0,
    "mesh": None,
    "signature": SIGNATURE,
}


class Line:
    """A channel that keeps what is said."""

    def __init__(self):
        self.peer, self.said, self.is_admitted, self.is_closed = None, [], False, False

    def send(self, header, body=b""):
        self.said.append(header)

    def admit(self):
        self.is_admitted = True

    def close(self, why="", *, after_sends=False):
        self.is_closed = True

    def kinds(self):
        return [header["kind"] for header in self.said if header["kind"] != "beat"]


class Room:
    """Decisions, and the lines of all who said hello, by rank."""

    def __init__(self, replicas=2, stages=2, chunk=None, **settings):
        self.history, self.lines = [], {}
        plans = Replanner(stages, settings.pop("policy", None), None, [1.0] * 4)
        patience_s = settings.pop("patience_s", 0.0)
        self.made = Decisions(
            replicas,
            stages,
            plans,
            chunk,
            lambda what, **more: self.history.append((what, more)),
            patience_s=patience_s,
        )
        self.signature = {**SIGNATURE, **settings}

    def come(self, **changes):
        line = Line()
        self.made.hello(line, {**HELLO, "signature": self.signature, **changes})
        if line.peer is not None:
            self.lines[line.peer] = line
        return line

    def tell(self, who, kind, **more):
        self.made.told(self.made.members[who], {"kind": kind, "epoch": self.made.epoch, **more})

    def begin(self, count=4):
        for _ in range(count):
            self.come()
        self.ready()
        return self

    def ready(self):
        for rank in list(self.made.members):
            self.tell(rank, "ready")
        for owner in self.made.layout.grid.ranks:
            for holder in self.made.layout.holders(owner, self.made.ledger.copies):
                self.held(holder, owner)

    def ready_but(self, away):
        """All but one, who does not come to it."""
        for rank in [rank for rank in self.made.members if rank != away]:
            self.tell(rank, "ready")
        for owner in self.made.layout.grid.ranks:
            for holder in self.made.layout.holders(owner, self.made.ledger.copies):
                self.held(holder, owner)

    def held(self, holder, owner):
        self.tell(holder, "held", owner=owner, version=self.made.version, layout=self.made.epoch)

    def vote(self, *ranks, **more):
        for rank in ranks or self.made.layout.grid.ranks:
            last = rank in self.made.layout.grid.stages[-1]
            place = self.made.layout.grid.stages[-1].index(rank) if last else 0
            loss = [["", 0, place, (1.0).hex()]] if last else []
            blocks = len(self.made.layout.grid.stages[-1])
            self.tell(rank, "vote", **{"step": self.made.version, "blocks": blocks, "loss": loss, "costs": {}, **more})

    def beat(self, rank, waits=None, is_long=False, **more):
        self.tell(rank, "beat", waits=waits, is_long=is_long, **more)

    def look(self, times=2):
        now = time.monotonic()
        for late in range(times):
            self.made.look(now + 10 * late)

    def why_lost(self):
        return {more["rank"]: more["why"] for what, more in self.history if what == "lost"}


def slices(room, rank, **more):
    told = {"what": "slices of step 1", "version": 1, "folder": "kept", "file": f"rank-{rank}", "why": None}
    room.tell(rank, "slices", **{**told, **more})
