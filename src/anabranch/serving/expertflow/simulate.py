"""Simulated time: one channel that moves experts at a constant rate beside layers that take a constant time.

    replay(cache, batches, predictions, layer_s=1e-3, seconds_per_byte=1e-10)

A *batch* says for each layer which distinct experts its tokens want. What the paper calls hit ratio is not defined there; ours is hits over
accesses, an access being one distinct expert of one batch and layer, a hit one whose bytes are there when the router has spoken.
"""

from collections.abc import Callable, Sequence

from anabranch.serving.expertflow.cache import Counters, ExpertCache, Load
from anabranch.serving.expertflow.layout import Expert

# Experts wanted by each layer.
Batch = Sequence[Sequence[Expert]]


class SimulatedMover:
    """Moves what an `ExpertCache` asks for, one load after another, in simulated seconds.

    Args:
        cache: what asks.
        seconds_per_byte: of the channel; 0 for one without limit.
        move: moves real bytes as well, at the end of each load.
        fails: whether a load fails, for tests.

    Attributes:
        now: seconds.
    """

    def __init__(
        self,
        cache: ExpertCache,
        seconds_per_byte: float,
        move: Callable[[Load], None] | None = None,
        fails: Callable[[Load], bool] = lambda load: False,
    ) -> None:
        self.cache, self.seconds_per_byte, self.now = cache, seconds_per_byte, 0.0
        self._move, self._fails = move, fails
        self._load: Load | None = None
        self._end = 0.0

    def pump(self) -> None:
        """Begin what there is to load; what takes no time is done at once."""
        while self._load is None or self._end <= self.now:
            self._finish()
            self._load = self.cache.next_load()
            if self._load is None:
                return
            self._end = self.now + self.cache.layout.bytes(self._load.expert) * self.seconds_per_byte

    def compute(self, seconds: float) -> None:
        """Let time pass, and loads end and begin in it."""
        until = self.now + seconds
        while self._load is not None and self._end <= until:
            self.now = max(self.now, self._end)
            self.pump()
        self.now = until

    def wait(self) -> None:
        """Until the load under way has ended; the time is a stall."""
        self.pump()
        self.cache.check_failure()
        if self._load is None:
            raise AssertionError("nothing is being loaded, so nothing can be waited for")
        begin = self.now
        # It is given up at once.
        if self._load.cancelled:
            self.cache.cancelled(self._load)
            self._load = None
        else:
            self.now = max(self.now, self._end)
        self.pump()
        self.cache.stalled(self.now - begin)

    def _finish(self) -> None:
        if self._load is None:
            return
        load, self._load = self._load, None
        if self._fails(load):
            self.cache.failed(load, OSError("simulated"))
            return
        if self._move is not None:
            self._move(load)
        self.cache.loaded(load)


def run_layer(cache: ExpertCache, mover: SimulatedMover, layer: int, wanted: Sequence[Expert], layer_s: float) -> None:
    """One layer: what is there runs first; the layer's time is shared out by experts."""
    cache.begin_layer(layer, wanted)
    mover.pump()
    share_s = layer_s / max(len(wanted), 1)
    while cache.wanted:
        ready = cache.ready()
        if not ready:
            mover.wait()
            continue
        mover.compute(share_s)
        cache.used(ready[:1])
        mover.pump()


def replay(
    cache: ExpertCache,
    batches: Sequence[Batch],
    predictions: Sequence[Batch | None] | None = None,
    *,
    seconds_per_byte: float = 0.0,
    layer_s: float = 1.0,
    horizon: int = 1,
    tail: bool = True,
) -> tuple[Counters, float]:
    """Run batches one after another; returns what was counted in all layers, and the simulated seconds.

    Args:
        cache: fresh.
        batches: what each wants.
        predictions: what each is predicted to want, None where nothing is; they are known when the batch begins.
        seconds_per_byte: of the channel.
        layer_s: that a layer computes.
        horizon: batches whose predictions are known (2 in the dual-batch pipeline).
        tail: expect the batch after these to want what the last one wants, in deciding what to keep.
    """
    mover = SimulatedMover(cache, seconds_per_byte)
    for number, batch in enumerate(batches):
        known = [] if predictions is None else [steps for steps in predictions[number : number + horizon] if steps]
        steps = [list(step) for steps in known for step in steps]
        certain = len(steps)
        if tail and known:
            steps += [list(step) for step in known[-1]]
        cache.begin_step(steps, certain)
        mover.pump()
        for layer, wanted in enumerate(batch):
            run_layer(cache, mover, layer, wanted, layer_s)
    return cache.total(), mover.now
