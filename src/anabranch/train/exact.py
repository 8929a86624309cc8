"""What makes a step of stages and pipelines exact: sums, means and norms whose order is that of the model and of the whole batch.

Whatever processes share a batch of G micro-batches, each micro-batch is the same arithmetic. What is left is the order in which results
are joined: gradients are added in pairs (`anabranch.cluster.gradients`), losses without rounding in between, and the norm is that of the
norms of parameters in the order of the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.cluster.gradients import PairwiseSums

__all__ = ["TOTAL", "ExactSums", "Terms", "have_part", "norm_in_order", "weighted_means"]

# The name of the whole loss among its terms.
TOTAL = "total"


@dataclass(frozen=True)
class Terms:
    """What a micro-batch's loss is the sum of, and metrics, by name.

    Attributes:
        row: its first sequence.
        size: its sequences.
        values: means over it.
    """

    row: int
    size: int
    values: dict[str, float]


def weighted_means(told: Sequence[Terms]) -> dict[str, float]:
    """Of each name the mean over micro-batches by their sizes, rounded once, so that their order is of no account."""
    items = sum(terms.size for terms in told)
    products: dict[str, list[float]] = {}
    # In the order of sequences, which that of names follows.
    for terms in sorted(told, key=lambda terms: terms.row):
        for name, value in terms.values.items():
            products.setdefault(name, []).append(value * terms.size)
    return {name: math.fsum(values) / items for name, values in products.items()}


def norm_in_order(
    gradients: Sequence[Tensor | None], group: dist.ProcessGroup | None, device: torch.device | None = None
) -> float:
    """The norm of gradients, of each of which one rank of ``group`` has the value and the others None; None for no group.

    ``device`` is where the ranks talk. Of a gradient that is not finite the norm is not finite.
    """
    norms = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    for number, gradient in enumerate(gradients):
        if gradient is not None:
            # Of one in another layout the squares would be added in another order.
            norms[number] = torch.linalg.vector_norm(gradient.contiguous(), dtype=torch.float64)
    if group is not None:
        # All but one of the numbers that are added are 0.
        dist.all_reduce(norms, group=group)
    return float(torch.linalg.vector_norm(norms))


def have_part(
    gradients: Sequence[Sequence[Tensor | None]], group: dist.ProcessGroup | None, device: torch.device | None = None
) -> list[bool]:
    """Of each of several parameters whether any of its gradients is there on any rank: else it has no part in the step, and keeps none."""
    if not gradients:
        return []
    here = [any(gradient is not None for gradient in each) for each in gradients]
    flags = torch.tensor(here, dtype=torch.float32, device=device)
    if group is not None:
        dist.all_reduce(flags, group=group)
    return [bool(flag) for flag in flags.tolist()]


class ExactSums:
    """Gradients of the micro-batches of a step, taken from parameters one micro-batch at a time.

    Args:
        parameters: what learns here.
        together: parameters that several stages have, in an order that all stages know; those whose gradients are not here are 0.
        micro_batches: of this process in a step, a power of two.
        group: the stages; None for one.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        together: Sequence[nn.Parameter],
        micro_batches: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        shared = {id(parameter) for parameter in together}
        self._own = [parameter for parameter in parameters if id(parameter) not in shared]
        self._learning = {id(parameter) for parameter in parameters}
        self._together, self._micro_batches, self._group = list(together), micro_batches, group
        self.begin()

    def begin(self) -> None:
        """Forget what was taken."""
        self._sums = PairwiseSums(self._micro_batches)
        self._of_stages: dict[int, list[Tensor | None]] = {}

    def take(self, micro_batch: int) -> None:
        """Take the gradients that are there, which are of this micro-batch."""
        self._sums.add(micro_batch, [parameter.grad for parameter in self._own])
        # A sum over stages of sums over micro-batches would be one in another order.
        self._of_stages[micro_batch] = [parameter.grad for parameter in self._together]
        for parameter in (*self._own, *self._together):
            parameter.grad = None

    def finish(self) -> None:
        """Put the sums over the micro-batches into the parameters."""
        for parameter, gradient in zip(self._own, self._sums.total(), strict=True):
            parameter.grad = gradient
        taken = [[row[number] for row in self._of_stages.values()] for number in range(len(self._together))]
        has_part = have_part(taken, self._group, next((one.device for one in self._together), None))
        for number, parameter in enumerate(self._together):
            if not has_part[number]:
                continue
            sums = PairwiseSums(self._micro_batches)
            for micro_batch in range(self._micro_batches):
                gradient = self._of_stages[micro_batch][number]
                own = torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
                # Two of the stages have a part in it, and a + b is b + a.
                dist.all_reduce(own, group=self._group)
                sums.add(micro_batch, [own])
            if id(parameter) in self._learning:
                parameter.grad = sums.total()[0]
        self.begin()
