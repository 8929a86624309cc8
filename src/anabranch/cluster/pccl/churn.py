"""A run whose peers are killed and started at random, and what became of it: the stress test of PCCL, on one machine.

    result = churn(seconds=180, peers=8, seed=0)
    result.is_sound         # nobody failed, all had the same bits at every step, and no gap was too long

Peers are processes. By the seed, one after another is killed (SIGKILL), stopped as if it hung (SIGSTOP), or started; every step of those
who are left shares a state and reduces a gradient, and each peer writes down the hash of what it then has.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from anabranch.bounds import shown
from anabranch.cluster.pccl.communicator import Communicator
from anabranch.cluster.pccl.faults import CollectiveError, PeerLost, TopologyFailed
from anabranch.cluster.pccl.master import Master
from anabranch.cluster.pccl.sharing import SharedState
from anabranch.cluster.ranks import RankError, Ranks
from anabranch.errors import InputError

__all__ = ["ChurnResult", "churn"]

_TRIES = 64
_DEAD_S = 2.0
# Seconds in which peers have to end once they are told to.
_END_S = 60.0


@dataclass(frozen=True)
class ChurnResult:
    """What became of a run.

    Attributes:
        steps: that the group has finished: revisions of the shared state whose reduction some peer has finished.
        tries: reductions that survivors began, counted by peer; ``lost``: those that a loss ended, after which they tried again.
        kills, hangs, starts, master_kills: what was done to it.
        longest_gap_s: between two finished steps of the group.
        differing: revisions at which two peers had different bits.
        errors: what ended a peer that was not killed.
        peers: that were there in the end.
    """

    steps: int
    tries: int
    lost: int
    kills: int
    hangs: int
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
        hangs: which share of kills are hangs instead.
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
        self.counts = {"kills": 0, "hangs": 0, "starts": 0, "master_kills": 0}
        self.master = self._new_master("127.0.0.1:0")

    def _new_master(self, address: str) -> Master:
        return Master(address, journal=self.folder / "journal", heartbeat_s=_DEAD_S / 5, dead_s=_DEAD_S).start()

    def run(self, seconds: float, every: tuple[float, float], master_every: float | None) -> list[str]:
        begin = min(self.least + 1, self.most)
        arguments = (self.master.address, str(self.folder), self.numbers)
        try:
            with Ranks(begin, peer_of_churn, *arguments, backend=None, timeout_s=seconds + _END_S + 60) as ranks:
                self.alive = list(range(begin))
                self._wait_for_steps()
                end = time.monotonic() + seconds
                next_master = time.monotonic() + (master_every or seconds + 1)
                while time.monotonic() < end:
                    time.sleep(self.generator.uniform(*every))
                    self._strike(ranks, arguments)
                    if time.monotonic() >= next_master:
                        self._restart_master()
                        next_master = time.monotonic() + (master_every or 0)
                (self.folder / "stop").touch()
                ranks.wait()
        except RankError as error:
            return [str(error).splitlines()[0]]
        finally:
            self.master.stop()
        return []

    def _wait_for_steps(self) -> None:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in self.folder.glob("*.steps")) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _strike(self, ranks: Ranks, arguments: tuple[Any, ...]) -> None:
        is_kill = len(self.alive) > self.least and (len(self.alive) >= self.most or self.generator.random() < 0.5)
        if not is_kill:
            number = ranks.join(peer_of_churn, *arguments)
            self.alive.append(number)
            self.counts["starts"] += 1
            self.on_event(f"started peer {number}, {len(self.alive)} are there")
            return
        number = self.alive.pop(self.generator.randrange(len(self.alive)))
        if self.generator.random() < self.hangs:
            ranks.kill(number, signal.SIGSTOP)
            self.counts["hangs"] += 1
            self.on_event(f"stopped peer {number}, {len(self.alive)} are there")
            time.sleep(_DEAD_S)
        else:
            self.on_event(f"killed peer {number}, {len(self.alive)} are there")
            self.counts["kills"] += 1
        ranks.kill(number)

    def _restart_master(self) -> None:
        address = self.master.address
        self.master.stop()
        self.counts["master_kills"] += 1
        self.on_event("killed the master, and started another")
        self.master = self._new_master(address)

    def result(self, errors: list[str]) -> ChurnResult:
        """Of what peers wrote down."""
        seen: dict[int, set[str]] = {}
        times: dict[int, float] = {}
        tries = lost = 0
        for path in self.folder.glob("*.steps"):
            for line in path.read_text().splitlines():
                words = line.split()
                # The last line of one that was killed may be cut off.
                if len(words) != 5 or words[4] != ".":
                    continue
                revision = int(words[0])
                seen.setdefault(revision, set()).add(words[1])
                times[revision] = min(times.get(revision, float("inf")), float(words[2]))
                tries, lost = tries + 1 + int(words[3]), lost + int(words[3])
        when = sorted(times.values())
        gaps = [later - earlier for earlier, later in pairwise(when)]
        return ChurnResult(
            steps=len(seen),
            tries=tries,
            lost=lost,
            longest_gap_s=max(gaps, default=0.0),
            differing=tuple(sorted(revision for revision, digests in seen.items() if len(digests) > 1)),
            errors=tuple(errors),
            peers=len(self.alive),
            **self.counts,
        )


def peer_of_churn(rank: int, world: int, address: str, folder: str, numbers: int) -> int:
    """A peer's part: steps until all agree to stop. Returns how many."""
    state = SharedState({"weight": torch.ones(numbers), "moment": torch.zeros(numbers)})
    count = 0
    with (
        Communicator(address, idle_s=10.0, master_wait_s=30.0) as peers,
        open(Path(folder) / f"{rank}.steps", "a", encoding="ascii") as notes,
    ):
        while True:
            with suppress(TopologyFailed):
                peers.admit()
            state.revision += 1
            try:
                peers.sync_shared_state(state)
            except PeerLost:
                state.revision -= 1
                continue
            # One number more: who has been told to stop says 1.
            told = torch.cat(
                [torch.sin(state.tensors["weight"]), torch.tensor([float((Path(folder) / "stop").exists())])]
            )
            lost = _reduced(peers, told)
            state.tensors["moment"].mul_(0.9).add_(told[:-1])
            state.tensors["weight"].sub_(state.tensors["moment"], alpha=0.01)
            count += 1
            notes.write(f"{state.revision} {state.digest()} {time.time():.6f} {lost} .\n")
            notes.flush()
            if told[-1] > 0:
                return count


def _reduced(peers: Communicator, told: torch.Tensor) -> int:
    """How many tries were lost before one was not."""
    for lost in range(_TRIES):
        try:
            peers.all_reduce(told, op="avg")
            return lost
        except PeerLost:
            continue
    raise CollectiveError(f"{_TRIES} tries, and no reduction")
