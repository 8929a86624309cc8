"""Which block is trained when: an orthogonal schedule of the P x P blocks [head part, tail part].

A step is a set of blocks no two of which share a head part or a tail part; they may be trained at once, in any order, with the same
result to the bit. With groups of G (G divides P), for x, y in steps of G and offset = 0 ... G - 1, a step is

    (x + (i + offset) mod G,  y + i),  i = 0 ... G - 1

The paper's G is the number of workers. Ours is P by default (a Latin square of order P), whatever the number of workers: then the
order of blocks, and with it the result, does not depend on who trains them.

            tail part  0  1  2  3        the step in which each block of P = G = 4 is trained
    head part 0        0  3  2  1
              1        1  0  3  2
              2        2  1  0  3
              3        3  2  1  0
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from anabranch.errors import InputError
from anabranch.graph.workers import Workers


@dataclass(frozen=True)
class Block:
    """One block of a schedule.

    Attributes:
        head: its head part.
        tail: its tail part.
        after: places in the schedule of the blocks before it that use the same head part or tail part last.
    """

    head: int
    tail: int
    after: tuple[int, ...] = ()


def orthogonal_steps(num_parts: int, group: int) -> list[list[tuple[int, int]]]:
    """The steps of one episode, each a list of (head part, tail part). Raises InputError if ``group`` does not divide P."""
    if not 1 <= group <= num_parts or num_parts % group:
        raise InputError(f"group is {group}; it must divide the number of parts, {num_parts}")
    return [
        [(x + (i + offset) % group, y + i) for i in range(group)]
        for x in range(0, num_parts, group)
        for y in range(0, num_parts, group)
        for offset in range(group)
    ]


def blocks_in_order(num_parts: int, group: int) -> list[Block]:
    """The blocks of one episode in order, each with those that must be done before it."""
    last_head: dict[int, int] = {}
    last_tail: dict[int, int] = {}
    found: list[Block] = []
    for step in orthogonal_steps(num_parts, group):
        for head, tail in step:
            before = {last_head.get(head), last_tail.get(tail)} - {None}
            last_head[head] = last_tail[tail] = len(found)
            found.append(Block(head, tail, tuple(sorted(place for place in before if place is not None))))
    return found


def run_blocks(blocks: list[Block], workers: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(worker, place)`` for every block, in ``workers`` threads.

    A worker owns the tail parts that are its number modulo ``workers`` and takes its blocks in order; each waits for those it comes
    after and for no other. The first error of any worker is raised, once all have stopped.
    """
    if workers == 1:
        for place in range(len(blocks)):
            work(0, place)
        return
    done = [threading.Event() for _ in blocks]
    failed = threading.Event()

    def run(worker: int) -> None:
        for place, block in enumerate(blocks):
            if block.tail % workers != worker:
                continue
            for before in block.after:
                done[before].wait()
            if failed.is_set():
                return
            work(worker, place)
            done[place].set()

    def guarded(worker: int) -> None:
        try:
            run(worker)
        except BaseException:
            failed.set()
            # Let the others see that it failed.
            for event in done:
                event.set()
            raise

    with Workers(workers) as threads:
        # A thread for each: they wait for each other.
        threads.each(guarded, [(worker,) for worker in range(workers)])
