"""How quick the links between ranks, and the ranks, really are: a `Topology` for plans and for ``scheme="auto"``.

options = {"scheme": "auto", "topology": measure_topology()}       # all ranks of the group call it
"""
# Shapes: B sequences, L positions, H heads, D head width, N ranks

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from anabranch.cluster.ring.costs import Topology
from anabranch.cluster.ring.kernel import attend, fine_dtype
from anabranch.cluster.ring.link import GroupLink, Traffic, drive, everyone
from anabranch.cluster.ring.pieces import Piece
from anabranch.cluster.ring.team import Group, process_group
from anabranch.errors import InputError

__all__ = ["measure_topology"]

# Of the attention that is timed: one block of some heads.
_BATCH, _HEADS, _LENGTH, _WIDTH = 1, 4, 512, 64
_SMALL = 64


def measure_topology(
    group: Group = None, *, size_bytes: int = 4 << 20, repeats: int = 3, dtype: torch.dtype = torch.float32
) -> Topology:
    """A mesh with the bandwidth of each directed pair, the latency of a message, and the speed of attention on a rank.

    One pair after another sends ``size_bytes`` and gets an answer, the quickest of ``repeats`` counts; N (N - 1) pairs take turns, so this
    is for the beginning of a run. All ranks get the same.

    Args:
        group: of processes, or a mesh of one dimension; None for all.
        size_bytes: of a message that is timed.
        repeats: of each.
        dtype: of the attention that is timed.

    Raises InputError where there is one rank, or for sizes and numbers below 1.
    """
    found = process_group(group)
    if found is None or dist.get_world_size(found) < 2:
        raise InputError("there is one rank; links are between several")
    if size_bytes <= _SMALL or repeats < 1:
        raise InputError(f"size_bytes is {size_bytes} and repeats {repeats}; use more than {_SMALL} and at least 1")
    link = GroupLink(found)
    speeds, latencies = [0.0] * link.world, []
    for source in range(link.world):
        for to in range(link.world):
            if source == to:
                continue
            # Links may share a card or a switch: one pair at a time.
            dist.barrier(found)
            small, large = (_quickest(link, source, to, size, repeats) for size in (_SMALL, size_bytes))
            if link.rank == source:
                latencies.append(small / 2)
                speeds[to] = (size_bytes - _SMALL) / max(large - small, 1e-9)
    mine = torch.tensor([*speeds, min(latencies), _flops(link.device, dtype)], dtype=torch.float64, device=link.device)
    rows = [parts[0].tolist() for parts in drive(everyone(link, "agree", [mine]), Traffic())]
    matrix = tuple(tuple(row[: link.world]) for row in rows)
    return Topology(
        "mesh",
        bandwidth=min(speed for rank, row in enumerate(matrix) for to, speed in enumerate(row) if rank != to),
        latency_s=min(row[-2] for row in rows),
        flops=min(row[-1] for row in rows),
        matrix=matrix,
    )


def _quickest(link: GroupLink, source: int, to: int, size: int, repeats: int) -> float:
    """Seconds of the quickest message with its answer; of a rank that is neither of the two, 0."""
    if link.rank not in (source, to):
        return 0.0
    buffer = torch.zeros(size, dtype=torch.uint8, device=link.device)
    answer = torch.zeros(8, dtype=torch.uint8, device=link.device)

    def ask() -> Any:
        sent, came = link.exchange("travel", 0, [(to, 0, [buffer])], [])
        sent_back, answered = link.exchange("home", 0, [], [(to, 0, [answer.to("meta")])])
        yield from (*sent, *came, *sent_back, *answered)

    def reply() -> Any:
        _, came = link.exchange("travel", 0, [], [(source, 0, [buffer.to("meta")])])
        yield from came
        sent, _ = link.exchange("home", 0, [(source, 0, [answer])], [])
        yield from sent

    program: Callable[[], Any] = ask if link.rank == source else reply
    return min(_seconds(lambda: drive(program(), Traffic()), link.device) for _ in range(repeats))


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of attention on this rank, all ranks working."""
    query, key, value = (torch.zeros(_BATCH, _HEADS, _LENGTH, _WIDTH, dtype=dtype, device=device) for _ in range(3))
    out = torch.zeros(query.shape, dtype=fine_dtype(dtype), device=device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=out.dtype, device=device)
    pieces = (Piece((0, _LENGTH), (0, _LENGTH)),)

    def work() -> None:
        attend(query, key, value, pieces, out, lse, scale=1.0)

    work()
    return 4 * _BATCH * _HEADS * _LENGTH**2 * _WIDTH / min(_seconds(work, device) for _ in range(3))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - began, 1e-9)
