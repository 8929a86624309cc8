"""`NativeMover`: loads by threads of the compiled kernels, where a tier only copies.

A thread of the interpreter that loads wants the interpreter between its pieces, and holds up whoever computes each time. Here such a
load is a list of copies that is handed over; one thread (`_feed`) sees to it that there is always one more to begin.
"""

import itertools
import threading
import time
from typing import TypeGuard

from anabranch.errors import CheckpointError, DataError
from anabranch.nn.kernels import load as load_kernels
from anabranch.nn.kernels.transfers import CANCELLED, Transfers
from anabranch.serving.expertflow.arena import Arena
from anabranch.serving.expertflow.cache import ExpertCache, Load
from anabranch.serving.expertflow.mover import Mover
from anabranch.serving.expertflow.tiers import CopiedTier, Tier

# Loads that nobody waits for yet, handed over while others are under way.
BEHIND = 1


def make_mover(cache: ExpertCache, tier: Tier, arena: Arena, workers: int) -> Mover:
    """A `NativeMover` where it can load every expert of the tier, else a `Mover`."""
    if arena.device.type == "cpu" and _only_copies(tier) and load_kernels() is not None:
        layout = cache.layout
        experts = (expert for layer in range(layout.num_layers) for expert in layout.of_layer(layer))
        if all(tier.copies(expert, arena.slot(layout.kind(expert), 0)) is not None for expert in experts):
            return NativeMover(cache, tier, arena, workers=workers)
    return Mover(cache, tier, arena, workers=workers)


def _only_copies(tier: Tier) -> TypeGuard[CopiedTier]:
    """Whether `copies` says what `load` does: not where a subclass has another ``load`` alone."""
    if not isinstance(tier, CopiedTier):
        return False
    return next("copies" in vars(kind) for kind in type(tier).__mro__ if "load" in vars(kind))


class NativeMover(Mover):
    """Moves by `Transfers`. A load that fails there is tried again as `Mover` does it.

    Args:
        cache, tier, arena: as `Mover`'s.
        workers: threads that copy.
        timeout_s: longest wait of a layer for one load.
    """

    tier: CopiedTier

    def __init__(
        self, cache: ExpertCache, tier: CopiedTier, arena: Arena, *, workers: int = 3, timeout_s: float = 120.0
    ) -> None:
        super().__init__(cache, tier, arena, workers=0, timeout_s=timeout_s)
        self._transfers = Transfers(workers, tier.seconds_per_byte)
        self._ids = itertools.count()
        # And what was told of it: urgent, cancelled.
        self._moving: dict[int, tuple[Load, list[bool]]] = {}
        self._repairs: set[threading.Thread] = set()
        self._is_due = False
        self._feeder = threading.Thread(target=self._feed, name="experts", daemon=True)
        self._feeder.start()

    def pump(self) -> None:
        """See `Mover`: what a layer waits for begins at once, the rest is left to the thread that feeds, as it takes longer to decide."""
        self._begin(ahead=0)
        self._is_due = True

    def go_on(self) -> None:
        """See `Mover`: now that thread holds up nobody."""
        if self._is_due and not self._closing:
            self._is_due = False
            self._transfers.kick()

    def wait(self) -> None:
        """See `Mover`."""
        self.check()
        self._begin(ahead=BEHIND)
        if self.cache.ready() or self.cache.failures:
            return
        begin, seen = time.perf_counter(), self._transfers.seen
        self.lock.release()
        try:
            ended = self._transfers.wait(seen, self.timeout_s)
        finally:
            self.lock.acquire()
        self.cache.stalled(time.perf_counter() - begin)
        self.check()
        if not ended:
            raise DataError(f"no expert came within {self.timeout_s:g} s; is the disk or device gone?")
        self._take()

    def close(self) -> None:
        """See `Mover`."""
        with self.lock:
            was_open, self._closing = not self._closing, True
        if not was_open:
            return
        self._transfers.stop()
        self._feeder.join()
        for thread in list(self._repairs):
            thread.join()
        self._transfers.close()
        self.tier.close()

    def _feed(self) -> None:
        try:
            while self._transfers.wait_for_kick():
                with self.lock:
                    self._begin(ahead=BEHIND)
                    # For when that has ended.
                    self.cache.policy.prepare()
        except BaseException as error:
            with self.lock:
                self._broken = error
                self._tell()

    def _begin(self, ahead: int) -> None:
        """Take what has ended, pass on what was decided, and begin what can begin; nothing once it is closed. Hold the lock."""
        if self._closing:
            return
        self._take()
        for id, (load, told) in self._moving.items():
            if [load.urgent, load.cancelled] != told:
                told[:] = load.urgent, load.cancelled
                self._transfers.change(id, urgent=load.urgent, cancelled=load.cancelled)
        while (new := self.cache.next_load(ahead, behind=True)) is not None:
            self._hand_over(new)

    def _hand_over(self, load: Load) -> None:
        copies = self.tier.copies(load.expert, self.arena.slot(self.cache.layout.kind(load.expert), load.slot))
        if copies is None:
            self._repair(load, 0)
            return
        id = next(self._ids)
        self._moving[id] = load, [load.urgent, False]
        self._transfers.begin(id, load.urgent, copies)

    def _take(self) -> None:
        for id, result in self._transfers.take():
            load, _ = self._moving.pop(id)
            if result == 0 and self._is_intact(load):
                self.cache.loaded(load)
            elif result != CANCELLED:
                self._repair(load, 1)
            elif load.cancelled:
                self.cache.cancelled(load)
            else:
                # It is wanted again meanwhile.
                self._hand_over(load)

    def _is_intact(self, load: Load) -> bool:
        try:
            self.tier.check(load.expert)
        except CheckpointError:
            return False
        return True

    def _repair(self, load: Load, turn: int) -> None:
        """Load it as `Mover` does, which knows better what is wrong; rarely wanted, so each in a thread of its own."""

        def run() -> None:
            self._move(load, turn)
            with self.lock:
                self._repairs.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        self._repairs.add(thread)
        thread.start()

    def _tell(self) -> None:
        self._transfers.poke()
