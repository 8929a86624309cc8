"""Who trains the blocks of an episode: the plan that all executors share, and the one for CPU threads."""
# Shapes: S samples of a pool, P parts, B = P^2 blocks

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from anabranch.graph.alias import AliasTable
from anabranch.graph.graphvite.augmentation import Pool
from anabranch.graph.graphvite.partition import Partition
from anabranch.graph.graphvite.parts import Parts
from anabranch.graph.graphvite.schedule import Block, run_blocks
from anabranch.graph.graphvite.train import Rate, Rule, negative_stream, train_block


@dataclass(frozen=True)
class Plan:
    """What is fixed for a whole run.

    Attributes:
        partition: of the nodes.
        blocks: of an episode, in the order of the schedule.
        tables: of negatives, one per part.
        rule: of the update.
        seed: of the negatives.
    """

    partition: Partition
    blocks: list[Block]
    tables: AliasTable
    rule: Rule
    seed: int

    def number(self, place: int) -> int:
        """The number of the block at a place of the schedule: (head part) P + (tail part)."""
        block = self.blocks[place]
        return block.head * self.partition.num_parts + block.tail

    def table(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """The alias table of the negatives of a part."""
        rows = slice(self.partition.start_P[part], self.partition.start_P[part + 1])
        return self.tables.keep_M[rows], self.tables.other_M[rows]

    def firsts(self, count_B: np.ndarray) -> np.ndarray:
        """Samples of an episode before each place of the schedule, int64 [B]."""
        count = count_B[[self.number(place) for place in range(len(self.blocks))]]
        return np.cumsum(count) - count

    def state(self, episode: int, place: int) -> np.uint64:
        """Where the stream of negatives of a block starts."""
        return negative_stream(self.seed, episode, self.number(place))


class BlockExecutor(Protocol):
    """Trains pools; the parameters lie in `Parts` before and, after `finish`, again."""

    def route(self, pool: Pool) -> Pool:
        """Bring samples to where they are trained."""

    def run(self, pool: Pool, episode: int, rate: Rate) -> np.ndarray:
        """Train a pool; the sums of losses, float64 [B]."""

    def finish(self) -> None:
        """Bring all parameters back."""


class ThreadExecutor:
    """CPU threads, each on blocks that no other touches at that time: no races, and one result for any number of threads."""

    def __init__(self, plan: Plan, parts: Parts, workers: int) -> None:
        self.plan, self.parts, self.workers = plan, parts, workers

    def route(self, pool: Pool) -> Pool:
        """They are where they are trained."""
        return pool

    def run(self, pool: Pool, episode: int, rate: Rate) -> np.ndarray:
        """Train a pool; the sums of losses, float64 [B]."""
        plan, parts = self.plan, self.parts
        loss_B = np.zeros(len(plan.blocks))
        first_B = plan.firsts(pool.count_B)
        # The tail part that each worker keeps.
        held: list[tuple[int, list[np.ndarray]] | None] = [None] * self.workers

        def tail_of(worker: int, part: int) -> list[np.ndarray]:
            kept = held[worker]
            if kept is None or kept[0] != part:
                if kept is not None:
                    parts.store("tail", *kept)
                kept = held[worker] = (part, parts.load("tail", part))
            return kept[1]

        def work(worker: int, place: int) -> None:
            block, number = plan.blocks[place], plan.number(place)
            samples = pool.block(number)
            if not len(samples[0]):
                return
            # Gives the one before back, so that no third part is held.
            tail = tail_of(worker, block.tail)
            head = parts.load("head", block.head)
            state, table = plan.state(episode, place), plan.table(block.tail)
            at = Rate(rate.first + int(first_B[place]), rate.total)
            loss_B[number] = train_block(head, tail, samples, table, state, plan.rule, at)
            parts.store("head", block.head, head)

        run_blocks(plan.blocks, self.workers, work)
        for kept in held:
            if kept is not None:
                parts.store("tail", *kept)
        return loss_B

    def finish(self) -> None:
        """Nothing to bring back."""
