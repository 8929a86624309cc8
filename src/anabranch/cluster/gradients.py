"""Gradients averaged over processes, in few messages; and sums whose order is the same however a batch is shared.

A sum of floating-point numbers depends on the order in which they are added. `PairwiseSums` adds those of M micro-batches in pairs, and
pairs of pairs, whatever order they come in; ranks that have equally many in a row each have a subtree of the same tree, and with
``in_pairs`` `average_gradients` adds these likewise. So where there are 2^n micro-batches, 2^k ranks get to the bit what one process does.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anabranch.errors import InputError

__all__ = ["PairwiseSums", "average_gradients", "is_power_of_two"]

# Numbers in one message: more would need as much memory again as all gradients.
_MOST = 1 << 25


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is 1, 2, 4, ..."""
    return number > 0 and number & (number - 1) == 0


def average_gradients(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, *, in_pairs: bool = False
) -> None:
    """Replace the gradients of ``parameters`` by their means over the ranks of ``group``; all of them call it together.

    One that has no gradient on some ranks counts as 0 there; one that has none anywhere keeps none, as what has no part in a step is not
    moved by an optimizer. The mean of sparse ones is dense. Those of which each rank has a part (DTensors) are left as they are: whoever
    spread them averages them.

    Args:
        parameters: the same on every rank, in the same order; those that do not learn are left out.
        group: None for all processes.
        in_pairs: add in pairs of neighbours, and pairs of those, for sums that do not depend on how many ranks there are. It takes log2 of
            their number exchanges of all gradients.

    Raises InputError with ``in_pairs`` for a number of ranks that is no power of two.
    """
    size = dist.get_world_size(group)
    if in_pairs and not is_power_of_two(size):
        raise InputError(f"there are {size} ranks, and sums in pairs are of 1, 2, 4, 8, ...")
    parameters = [one for one in parameters if one.requires_grad and not isinstance(one, DTensor)]
    if size == 1 or not parameters:
        return
    device = parameters[0].device
    has_part = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
    dist.all_reduce(has_part, group=group)
    taking = [parameter for parameter, has in zip(parameters, has_part.tolist(), strict=True) if has]
    for bucket in _buckets(taking):
        given = [torch.zeros_like(one) if one.grad is None else one.grad.to_dense() for one in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in given])
        if in_pairs:
            _add_in_pairs(flat, group)
        else:
            dist.all_reduce(flat, group=group)
        flat /= size
        for one, piece in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            if one.grad is None or one.grad.layout != one.layout:
                one.grad = torch.empty_like(one)
            one.grad.copy_(piece.view(one.shape))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose gradients go in one message: of one type and device, and not too many numbers."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in by_kind.values():
        bucket: list[nn.Parameter] = []
        for parameter in alike:
            if bucket and sum(one.numel() for one in bucket) + parameter.numel() > _MOST:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket


def _add_in_pairs(flat: Tensor, group: dist.ProcessGroup | None) -> None:
    """The sum over ranks in place: with the neighbour, then with the neighbouring pair, ... a + b is b + a, so both have the same."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    other = torch.empty_like(flat)
    distance = 1
    while distance < size:
        peer = rank ^ distance
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, flat, group=group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
            ]
        )
        for work in works:
            work.wait()
        flat += other
        distance *= 2


class PairwiseSums:
    """Sums of lists of tensors, one list of each of M micro-batches, in an order that is a function of M alone.

    Micro-batches 0 and 1 are added, 2 and 3, then these pairs, whatever order they come in; so of M there are at most about log2 M + 1
    lists at a time if they come in order or in the reverse order. An entry that is None counts as 0, and is None if it is so in all.

    Args:
        total: M, a power of two.

    Raises InputError for another M.
    """

    def __init__(self, total: int) -> None:
        if not is_power_of_two(total):
            raise InputError(f"there are {total} micro-batches, and sums in pairs are of 1, 2, 4, 8, ...")
        self._total = total
        # By (how many micro-batches, which of the nodes with so many).
        self._nodes: dict[tuple[int, int], list[Tensor | None]] = {}

    def add(self, number: int, tensors: list[Tensor | None]) -> None:
        """Those of micro-batch ``number``; they are changed. Each number once."""
        if not 0 <= number < self._total:
            raise InputError(f"micro-batch {number} is none of 0 to {self._total - 1}")
        width = 1
        while (sibling := self._nodes.pop((width, number ^ 1), None)) is not None:
            tensors = [_sum(one, other) for one, other in zip(tensors, sibling, strict=True)]
            width, number = width * 2, number // 2
        self._nodes[width, number] = tensors

    def total(self) -> list[Tensor | None]:
        """The sums over all. Raises InputError while some are missing."""
        if (self._total, 0) not in self._nodes:
            raise InputError(f"of {self._total} micro-batches some are missing")
        return self._nodes[self._total, 0]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)
