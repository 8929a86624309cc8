"""The loop: make a pool while the one before it is trained, until as many samples as asked for are done."""
# Shapes: S samples of a pool

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import InputError
from anabranch.graph.graphvite.augmentation import Pool, Sampler, pairs_of_walk
from anabranch.graph.graphvite.executor import BlockExecutor
from anabranch.graph.graphvite.train import FLOOR, Rate, Rule
from anabranch.graph.workers import Workers


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each pool.

    Attributes:
        done: positive samples so far in this run.
        total: that it is to train (a little more come, since walks are whole).
        epoch: done over edges.
        loss: mean of the pool's samples.
        lr: the rate of its last sample.
        samples_per_second: positives and negatives of this pool over the time since the one before.
    """

    done: int
    total: int
    epoch: float
    loss: float
    lr: float
    samples_per_second: float


Callback = Callable[[Progress], Any]


@dataclass
class Counters:
    """How far training is; with the parameters, all that it takes to go on.

    Attributes:
        walks, episodes: made and trained over all runs, which key the randomness of what follows.
        pairs: samples that the walks gave.
        done, total: samples of the run under way.
        history: per pool, epoch, loss and rate.
    """

    walks: int = 0
    episodes: int = 0
    pairs: int = 0
    done: int = 0
    total: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def next_walks(self, pool_size: int, full: int) -> int:
        """Walks of the next pool, of what is known now: as many as give ``pool_size`` samples, or what is left."""
        of_walk = self.pairs / self.walks if self.walks else full
        return max(1, int(-(-min(pool_size, self.total - self.done) // max(of_walk, 1))))


def train(
    sampler: Sampler,
    executor: BlockExecutor,
    counters: Counters,
    *,
    num_edges: int,
    pool_size: int,
    samplers: int,
    in_turn: int = 1,
    rule: Rule,
    callbacks: Sequence[Callback],
) -> bool:
    """Train until the run is done (True), or a callback returns False (False; ``counters`` then say where to go on).

    ``samplers`` threads make the next pool meanwhile; with 0 of them it is made before training goes on, by ``in_turn`` threads.

    Raises InputError as `diverged` once a loss is not a finite number, before callbacks are told.
    """
    with ExitStack() as stack:
        # One thread waits for those that walk.
        maker, walkers = stack.enter_context(Workers(1)), stack.enter_context(Workers(samplers or in_turn))
        full = pairs_of_walk(sampler.walk_length, sampler.augmentation)

        def begin(after: Counters) -> "Future[Pool] | Callable[[], Pool]":
            arguments = (after.walks, after.next_walks(pool_size, full), walkers)
            return maker.begin(sampler.pool, *arguments) if samplers else lambda: sampler.pool(*arguments)

        upcoming = begin(counters)
        clock = time.perf_counter()
        while counters.done < counters.total:
            pool = executor.route(upcoming.result() if isinstance(upcoming, Future) else upcoming())
            rate = Rate(counters.done, counters.total)
            episode = counters.episodes
            counters.walks += pool.num_walks
            counters.episodes += 1
            counters.pairs += pool.size
            counters.done += pool.size
            if counters.done < counters.total:
                upcoming = begin(counters)
            loss = float(executor.run(pool, episode, rate).sum()) / max(pool.size, 1)
            if not math.isfinite(loss):
                raise diverged(rule, f"the loss of pool {episode + 1} is {loss}")
            now = time.perf_counter()
            last = rule.lr * max(1 - (counters.done - 1) / counters.total, FLOOR)
            progress = Progress(
                counters.done,
                counters.total,
                counters.done / num_edges,
                loss,
                last,
                (1 + rule.negatives) * pool.size / max(now - clock, 1e-9),
            )
            clock = now
            counters.history.append({"epoch": progress.epoch, "loss": loss, "lr": last})
            # All are told, whatever one says.
            answers = [callback(progress) for callback in callbacks]
            if any(answer is False for answer in answers):
                return counters.done >= counters.total
    return True


def diverged(rule: Rule, what: str) -> InputError:
    """The error that says that parameters grew beyond all numbers."""
    return InputError(
        f"training diverged: {what}; lr is {rule.lr:g} ({rule.optimizer}), negative_weight {rule.negative_weight:g} and weight_decay "
        f"{rule.weight_decay:g}: take a smaller lr, or smaller weights"
    )
