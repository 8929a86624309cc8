"""Blocks trained by processes (torch.distributed, any backend that sends CPU tensors, such as gloo): one worker a process.

A process keeps the tail parts that are its number modulo W; head parts go from one process to another as the schedule needs them.
Each makes its share of a pool's walks and sends the samples to whom their tail part belongs. Walks, negatives and the order of blocks
are those of one process, and so is the result, to the bit. Every process has room for all parameters.
"""
# Shapes: S samples of a pool, W processes, P parts, B = P^2 blocks

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from anabranch.errors import BackendError
from anabranch.graph.graphvite.augmentation import Pool, Sampler, shuffled
from anabranch.graph.graphvite.executor import Plan
from anabranch.graph.graphvite.parts import SIDES, Parts
from anabranch.graph.graphvite.schedule import Block
from anabranch.graph.graphvite.torch_executor import import_torch
from anabranch.graph.graphvite.train import Rate, train_block
from anabranch.graph.workers import Workers


def import_distributed() -> Any:
    """`torch.distributed` with a group that is set up. Raises BackendError without one."""
    torch = import_torch()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise BackendError(
            "executor='distributed' needs an initialised process group; start processes with torchrun and call "
            "torch.distributed.init_process_group('gloo') in each"
        )
    return torch.distributed


def steps_of(blocks: list[Block]) -> list[list[int]]:
    """Places of the schedule in runs of blocks that share no part, in order."""
    steps: list[list[int]] = []
    heads: set[int] = set()
    tails: set[int] = set()
    for place, block in enumerate(blocks):
        if not steps or block.head in heads or block.tail in tails:
            steps.append([])
            heads, tails = set(), set()
        steps[-1].append(place)
        heads.add(block.head)
        tails.add(block.tail)
    return steps


class ShareSampler(Sampler):
    """Makes one process's share of the walks of every pool; `DistributedExecutor.route` brings the samples together."""

    def pool(self, first: int, count: int, workers: Workers | None = None) -> Pool:
        """The samples of this process's share of the walks, not yet shuffled; ``num_walks`` counts all walks."""
        distributed = import_distributed()
        rank, world = distributed.get_rank(), distributed.get_world_size()
        begin, end = first + count * rank // world, first + count * (rank + 1) // world
        made = super().pool(begin, end - begin, workers)
        return Pool(made.head_S, made.tail_S, made.start_B, made.count_B, count)


class DistributedExecutor:
    """One worker per process. All processes call the same methods with the same arguments, and end with the same parameters."""

    def __init__(self, plan: Plan, parts: Parts, shuffle_base: int) -> None:
        self.torch, self.distributed = import_torch(), import_distributed()
        self.plan, self.parts, self.shuffle_base = plan, parts, shuffle_base
        self.rank, self.world = self.distributed.get_rank(), self.distributed.get_world_size()
        self.steps = steps_of(plan.blocks)
        # The process that has a head part; all have the first values.
        self.place_of: dict[int, int] = {}
        num_parts = plan.partition.num_parts
        self.owner_B = np.tile(np.arange(num_parts) % self.world, num_parts)

    def route(self, pool: Pool) -> Pool:
        """Send samples to the processes that train their blocks; what comes back holds the blocks of this one."""
        mine = self.torch.from_numpy(pool.count_B)
        gathered = [self.torch.empty_like(mine) for _ in range(self.world)]
        self.distributed.all_gather(gathered, mine)
        count_WB = np.array([counts.numpy() for counts in gathered])
        own = np.flatnonzero(self.owner_B == self.rank)
        received = [self._exchange(pool, array, count_WB, own) for array in (pool.head_S, pool.tail_S)]
        count_B = count_WB.sum(0)
        start_B = np.zeros(len(count_B), np.int64)
        start_B[own] = np.cumsum(count_B[own]) - count_B[own]
        head_S, tail_S = (_assembled(parts, count_WB[:, own], self.shuffle_base) for parts in received)
        return Pool(head_S, tail_S, start_B, count_B, pool.num_walks)

    def _exchange(self, pool: Pool, array: np.ndarray, count_WB: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
        """From every process its samples of our blocks, block after block."""
        sending, received, waiting = [], [], []
        for other in range(self.world):
            blocks = np.flatnonzero(self.owner_B == other)
            parts = [array[pool.start_B[b] : pool.start_B[b] + pool.count_B[b]] for b in blocks]
            outgoing = np.concatenate(parts) if parts else array[:0]
            incoming = np.empty(count_WB[other, own].sum(), array.dtype)
            received.append(incoming)
            if other == self.rank:
                incoming[:] = outgoing
                continue
            if len(outgoing):
                # Held until it has been sent.
                sending.append(outgoing)
                waiting.append(self.distributed.isend(self.torch.from_numpy(outgoing), other))
            if len(incoming):
                waiting.append(self.distributed.irecv(self.torch.from_numpy(incoming), other))
        for work in waiting:
            work.wait()
        return received

    def run(self, pool: Pool, episode: int, rate: Rate) -> np.ndarray:
        """Train the blocks of this process, step by step; the sums of losses of all, float64 [B]."""
        plan, parts = self.plan, self.parts
        loss_B = np.zeros(len(plan.blocks))
        first_B = plan.firsts(pool.count_B)
        for step in self.steps:
            self._move_heads([plan.blocks[place] for place in step])
            for place in step:
                block, number = plan.blocks[place], plan.number(place)
                if block.tail % self.world != self.rank or not pool.count_B[number]:
                    continue
                loss_B[number] = train_block(
                    parts.load("head", block.head),
                    parts.load("tail", block.tail),
                    pool.block(number),
                    plan.table(block.tail),
                    plan.state(episode, place),
                    plan.rule,
                    Rate(rate.first + int(first_B[place]), rate.total),
                )
        # Each is of one process: no rounding.
        self.distributed.all_reduce(self.torch.from_numpy(loss_B))
        return loss_B

    def _move_heads(self, blocks: list[Block]) -> None:
        waiting = []
        for block in blocks:
            to = block.tail % self.world
            source = self.place_of.setdefault(block.head, to)
            if source != to and self.rank in (source, to):
                for array in self.parts.load("head", block.head):
                    tensor = self.torch.from_numpy(array)
                    send = self.rank == source
                    waiting.append(
                        self.distributed.isend(tensor, to) if send else self.distributed.irecv(tensor, source)
                    )
            self.place_of[block.head] = to
        for work in waiting:
            work.wait()

    def finish(self) -> None:
        """Give all parts to all processes."""
        for side in SIDES:
            for part in range(self.plan.partition.num_parts):
                source = self.place_of.get(part, 0) if side == "head" else part % self.world
                for array in self.parts.load(side, part):
                    self.distributed.broadcast(self.torch.from_numpy(array), source)


def _assembled(received: list[np.ndarray], count_WB: np.ndarray, base: int) -> np.ndarray:
    """Blocks with the samples of all processes in the order of their walks, then shuffled."""
    found = np.empty(count_WB.sum(), received[0].dtype)
    end_WB = np.cumsum(count_WB, axis=1)
    at = 0
    for block in range(count_WB.shape[1]):
        parts = [
            array[end_WB[other, block] - count_WB[other, block] : end_WB[other, block]]
            for other, array in enumerate(received)
        ]
        whole = np.concatenate(parts)
        _scatter(whole, base, found[at : at + len(whole)])
        at += len(whole)
    return found


@nb.njit(cache=True, nogil=True)
def _scatter(sample_S, base, found_S):
    for sample in range(len(sample_S)):
        found_S[shuffled(sample, len(sample_S), base)] = sample_S[sample]
