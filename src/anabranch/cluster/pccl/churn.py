"""A run whose peers are killed and started at random, and what became of it: the stress test of PCCL, on one machine.

    result = churn(seconds=180, peers=8, seed=0)
    result.is_sound         # nobody failed, all had the same bits at every step, and no gap was too long

Peers are processes. By the seed, one after another is killed (SIGKILL), stopped as if it hung (SIGSTOP), or started; every step of those
who are left lets in who waits, shares a state and reduces a gradient, and each peer writes down the hash of what it then has.

A stopped peer is the master's to find: it stands still for three times as long as the master hears nothing of a peer before it drops it.
Then it is killed, or goes on (SIGCONT), and must hear that it is out. One hangs at a time, and the master is not ended before that one is
due to be dropped, nor within a second of a death, as each has a bound of its own: a master that was started again waits longer
(`Times.absence_s`) for those that were lost together with the one before.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch

from anabranch.bounds import shown
from anabranch.cluster.pccl.communicator import Communicator
from anabranch.cluster.pccl.faults import CollectiveError, Kicked, PeerLost, TopologyFailed
from anabranch.cluster.pccl.master import Master
from anabranch.cluster.pccl.sharing import SharedState
from anabranch.cluster.ranks import RankError, Ranks
from anabranch.errors import InputError

__all__ = ["ChurnResult", "churn"]

_TRIES = 64
_DEAD_S = 2.0
# In which a step has to be done, whatever is lost in the midst of it: until a silent peer is dropped, and 2 s.
STEP_S = _DEAD_S + 2.0
# For which a stopped peer stands still, and after which it is due to be dropped.
_STOPPED_S, _DROPPED_S = 3 * _DEAD_S, _DEAD_S + 1.0
# Before and after the end of a master, in which nobody dies: the one hears of who died before, and peers come back to the other.
_CALM_S = 1.0
# In which one that goes on must hear that it is out.
_TOLD_S = 10.0
# Seconds in which peers have to end once they are told to.
_END_S = 60.0


@dataclass(frozen=True)
class ChurnResult:
    """What became of a run.

    Attributes:
        steps: that the group has finished: revisions of the shared state whose reduction some peer has finished.
        begun: steps of survivors, counted by peer: all but those in whose midst the peer itself was killed or stopped.
        completed: of ``begun`` those that were done within `STEP_S`, if need be again with those who were left. Not those that were given
            up, or took longer.
        interrupted: of ``begun`` those in which a loss ended letting in, sharing or reducing; ``recovered``: of these the completed.
        tries: a step's first and one more for each loss; ``lost``: those that a loss ended.
        kills, hangs, starts, master_kills: what was done to it; ``woken``: of those that hung the ones that went on later.
        longest_gap_s: between two finished steps of the group.
        differing: revisions at which two peers had different bits.
        errors: what ended a peer that was not killed, and who hung, went on and did not hear that it was out.
        peers: that were there in the end.
    """

    steps: int
    begun: int
    completed: int
    interrupted: int
    recovered: int
    tries: int
    lost: int
    kills: int
    hangs: int
    woken: int
    starts: int
    master_kills: int
    longest_gap_s: float
    differing: tuple[int, ...]
    errors: tuple[str, ...]
    peers: int

    @property
    def is_sound(self) -> bool:
        """Whether nobody failed who was not killed, and all had the same bits at every step."""
        return not self.errors and not self.differing and self.steps > 0


def churn(
    *,
    seconds: float,
    peers: int = 8,
    least: int = 2,
    every: tuple[float, float] = (0.3, 1.5),
    hangs: float = 0.1,
    master_every: float | None = None,
    numbers: int = 4096,
    seed: int = 0,
    on_event: Callable[[str], None] = lambda text: None,
) -> ChurnResult:
    """Run one.

    Args:
        seconds: how long.
        peers: at most so many at a time.
        least: so many are left alive.
        every: least and most seconds between two events.
        hangs: which share of kills are hangs instead, where nobody hangs yet.
        master_every: seconds after which the master is ended and started again from its journal; None for never.
        numbers: float32 numbers of the shared state and of the gradient.
        seed: of the schedule.
        on_event: told of each event.

    Raises InputError for values that are none.
    """
    if not 0 < seconds < 1e6 or not 1 <= least < peers <= 64:
        raise InputError(
            f"seconds is {shown(seconds)}, peers {shown(peers)} and least {shown(least)}; use a positive time and 1 <= least < peers <= 64"
        )
    if not 0 < every[0] <= every[1] or not 0 <= hangs <= 1 or not 1 <= numbers <= 2**28:
        raise InputError(
            f"every is {every}, hangs {shown(hangs)} and numbers {shown(numbers)}; give positive ones, hangs from 0 to 1"
        )
    with tempfile.TemporaryDirectory(prefix="anabranch-churn-") as folder:
        storm = _Storm(Path(folder), peers, least, hangs, numbers, random.Random(seed), on_event)
        errors = storm.run(seconds, every, master_every)
        return storm.result(errors)


@dataclass
class _Count:
    """Of what peers wrote down; see `ChurnResult`."""

    begun: int = 0
    completed: int = 0
    interrupted: int = 0
    recovered: int = 0
    tries: int = 0
    lost: int = 0
    seen: dict[int, set[str]] = field(default_factory=dict)
    # When the first peer had finished a revision.
    times: dict[int, float] = field(default_factory=dict)

    def read(self, path: Path, *, is_survivor: bool) -> None:
        """Add a peer's notes. A step that it began and did not finish counts where nothing was done to it."""
        since: float | None = None
        for line in path.read_text(encoding="ascii").splitlines():
            words = line.split()
            # The last line of one that was killed may be cut off.
            if not words or words[-1] != ".":
                continue
            if words[0] == "begin":
                since = float(words[1])
            elif words[0] == "done" and since is not None:
                self._add(int(words[1]), words[2], float(words[3]), int(words[4]), float(words[3]) - since)
                since = None
            elif words[0] == "left":
                since = None
        self.begun += since is not None and is_survivor

    def _add(self, revision: int, digest: str, when: float, lost: int, seconds: float) -> None:
        is_in_time = seconds <= STEP_S
        self.begun, self.completed = self.begun + 1, self.completed + is_in_time
        self.interrupted, self.recovered = self.interrupted + (lost > 0), self.recovered + (lost > 0 and is_in_time)
        self.tries, self.lost = self.tries + 1 + lost, self.lost + lost
        self.seen.setdefault(revision, set()).add(digest)
        self.times[revision] = min(self.times.get(revision, float("inf")), when)


class _Storm:
    """What is done to a run, and its notes."""

    def __init__(
        self,
        folder: Path,
        most: int,
        least: int,
        hangs: float,
        numbers: int,
        generator: random.Random,
        on_event: Callable[[str], None],
    ) -> None:
        self.folder, self.most, self.least, self.hangs, self.numbers = folder, most, least, hangs, numbers
        self.generator, self.on_event = generator, on_event
        self.alive: list[int] = []
        # To which something was done; when those stopped that still stand still; when those went on that did.
        self.struck: set[int] = set()
        self.stopped: dict[int, float] = {}
        self.woken: dict[int, float] = {}
        self.last_stop = -float("inf")
        self.counts = {"kills": 0, "hangs": 0, "woken": 0, "starts": 0, "master_kills": 0}
        self.master = self._new_master("127.0.0.1:0")

    def _new_master(self, address: str) -> Master:
        return Master(address, journal=self.folder / "journal", heartbeat_s=_DEAD_S / 5, dead_s=_DEAD_S).start()

    def run(self, seconds: float, every: tuple[float, float], master_every: float | None) -> list[str]:
        begin = min(self.least + 1, self.most)
        arguments = (self.master.address, str(self.folder), self.numbers)
        untold: list[str] = []
        try:
            with Ranks(begin, peer_of_churn, *arguments, backend=None, timeout_s=seconds + _END_S + 60) as ranks:
                self.alive = list(range(begin))
                self._wait_for_steps()
                end = time.monotonic() + seconds
                next_master = float("inf") if master_every is None else time.monotonic() + master_every
                while time.monotonic() < end:
                    time.sleep(self.generator.uniform(*every))
                    self._go_on_with_stopped(ranks)
                    if time.monotonic() >= next_master and not self._is_hanging():
                        time.sleep(_CALM_S)
                        self._restart_master()
                        next_master = time.monotonic() + (master_every or 0)
                        time.sleep(_CALM_S)
                    self._strike(ranks, arguments)
                while self.stopped:
                    time.sleep(0.05)
                    self._go_on_with_stopped(ranks)
                untold = self._untold()
                (self.folder / "stop").touch()
                ranks.wait()
        except RankError as error:
            return [*untold, str(error).splitlines()[0]]
        finally:
            self.master.stop()
        return untold

    def _wait_for_steps(self) -> None:
        deadline = time.monotonic() + 60
        while not any(map(self._has_stepped, self.alive)) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _has_stepped(self, number: int) -> bool:
        return "done" in self._notes(number)

    def _notes(self, number: int) -> str:
        path = self.folder / f"{number}.steps"
        return path.read_text(encoding="ascii") if path.exists() else ""

    def _is_hanging(self) -> bool:
        """Whether the master may not have dropped the last one that was stopped."""
        return time.monotonic() - self.last_stop < _DROPPED_S

    def _strike(self, ranks: Ranks, arguments: tuple[Any, ...]) -> None:
        is_kill = len(self.alive) > self.least and (len(self.alive) >= self.most or self.generator.random() < 0.5)
        if not is_kill:
            number = ranks.join(peer_of_churn, *arguments)
            self.alive.append(number)
            self.counts["starts"] += 1
            self.on_event(f"started peer {number}, {len(self.alive)} are there")
            return
        number = self.alive.pop(self.generator.randrange(len(self.alive)))
        is_hang = self.generator.random() < self.hangs
        self.struck.add(number)
        # The master can drop only whom it knows.
        if is_hang and not self._is_hanging() and self._has_stepped(number):
            ranks.expect_end(number)
            ranks.kill(number, signal.SIGSTOP)
            self.stopped[number] = self.last_stop = time.monotonic()
            self.counts["hangs"] += 1
            self.on_event(f"stopped peer {number}, {len(self.alive)} are there")
        else:
            self.on_event(f"killed peer {number}, {len(self.alive)} are there")
            self.counts["kills"] += 1
            ranks.kill(number)

    def _go_on_with_stopped(self, ranks: Ranks) -> None:
        """Kill or wake those that have stood still for long enough."""
        for number, since in list(self.stopped.items()):
            if time.monotonic() - since < _STOPPED_S:
                continue
            del self.stopped[number]
            if self.generator.random() < 0.5:
                ranks.kill(number)
                continue
            self.woken[number] = time.monotonic()
            self.counts["woken"] += 1
            self.on_event(f"woke peer {number}")
            ranks.kill(number, signal.SIGCONT)

    def _untold(self) -> list[str]:
        """Those that hung and went on as if nothing had been; each has a while to hear of it."""
        untold = []
        for number, since in self.woken.items():
            while "kicked" not in self._notes(number):
                if time.monotonic() - since > _TOLD_S:
                    untold.append(f"peer {number} hung, and did not hear that it was out")
                    break
                time.sleep(0.05)
        return untold

    def _restart_master(self) -> None:
        address = self.master.address
        self.master.stop()
        self.counts["master_kills"] += 1
        self.on_event("killed the master, and started another")
        self.master = self._new_master(address)

    def result(self, errors: list[str]) -> ChurnResult:
        """Of what peers wrote down."""
        count = _Count()
        for path in self.folder.glob("*.steps"):
            count.read(path, is_survivor=int(path.stem) not in self.struck)
        when = sorted(count.times.values())
        gaps = [later - earlier for earlier, later in pairwise(when)]
        return ChurnResult(
            steps=len(count.seen),
            begun=count.begun,
            completed=count.completed,
            interrupted=count.interrupted,
            recovered=count.recovered,
            tries=count.tries,
            lost=count.lost,
            longest_gap_s=max(gaps, default=0.0),
            differing=tuple(sorted(revision for revision, digests in count.seen.items() if len(digests) > 1)),
            errors=tuple(errors),
            peers=len(self.alive),
            **self.counts,
        )


def peer_of_churn(rank: int, world: int, address: str, folder: str, numbers: int) -> int:
    """A peer's part: steps until all agree to stop. Returns how many. Raises Kicked where it is out, once it has written that down."""
    state = SharedState({"weight": torch.ones(numbers), "moment": torch.zeros(numbers)})
    count = 0
    with open(Path(folder) / f"{rank}.steps", "a", encoding="ascii") as notes:
        try:
            with Communicator(address, idle_s=10.0, master_wait_s=30.0) as peers:
                while True:
                    _note(notes, "begin", f"{time.time():.6f}")
                    is_first, lost = _shared(peers, state)
                    if is_first and rank >= world:
                        # It came to nobody: those who ran have all stopped.
                        _note(notes, "left")
                        return count
                    # One number more: who has been told to stop says 1.
                    is_stopping = float((Path(folder) / "stop").exists())
                    told = torch.cat([torch.sin(state.tensors["weight"]), torch.tensor([is_stopping])])
                    lost = _reduced(peers, told, lost)
                    state.tensors["moment"].mul_(0.9).add_(told[:-1])
                    state.tensors["weight"].sub_(state.tensors["moment"], alpha=0.01)
                    count += 1
                    _note(notes, "done", f"{state.revision} {state.digest()} {time.time():.6f} {lost}")
                    if told[-1] > 0:
                        return count
        except Kicked:
            _note(notes, "kicked")
            raise


def _note(notes: IO[str], what: str, more: str = "") -> None:
    notes.write(f"{what} {more} .\n")
    notes.flush()


def _shared(peers: Communicator, state: SharedState) -> tuple[bool, int]:
    """Let in who waits and share the state: whether nothing was shared before, and how many tries were lost."""
    lost = 0
    while lost < _TRIES:
        try:
            peers.admit()
        except TopologyFailed:
            lost += 1
        state.revision += 1
        try:
            return peers.sync_shared_state(state).is_first, lost
        except PeerLost:
            state.revision -= 1
            lost += 1
    raise CollectiveError(f"{_TRIES} tries, and no state that is shared")


def _reduced(peers: Communicator, told: torch.Tensor, lost: int) -> int:
    """How many tries of a step were lost before one was not; ``lost`` before it was reduced."""
    while lost < _TRIES:
        try:
            peers.all_reduce(told, op="avg")
            return lost
        except PeerLost:
            lost += 1
    raise CollectiveError(f"{_TRIES} tries, and no reduction")
