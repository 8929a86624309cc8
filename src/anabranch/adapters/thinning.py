"""Rules that merge tensors of one shape by their single numbers: what of each is kept, which signs win, how the rest adds up.

    TIES              trim to the greatest, elect the sign of each place, mean of those that have it (Yadav et al. 2023, arXiv 2306.01708)
    DARE              drop at random, divide what stays by the share that stays (Yu et al. 2023, arXiv 2311.03099)
    magnitude pruning trim to the greatest, and add up

As the package peft defines them, so that the same numbers come out. Where it draws what is dropped from torch's global generator, a caller
here gives one, so that one seed gives one result, whatever ran before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RULES", "Majority", "Rule", "drop", "merged", "trim"]

Majority = Literal["total", "frequency"]


@dataclass(frozen=True)
class Rule:
    """How tensors of several adapters become one.

    Attributes:
        thins: ``"trim"`` keeps the numbers of greatest magnitude, ``"drop"`` random ones, rescaled; None all.
        elects: whether each place takes the sign that has the majority, and the mean of those that have it (TIES), or the plain sum.
        density: the usual share of numbers that is kept.
    """

    thins: Literal["trim", "drop"] | None = None
    elects: bool = False
    density: float = 1.0


# TIES keeps a fifth as its paper does; DARE's papers and tools keep from a tenth to a half of an adapter.
RULES = {
    "linear": Rule(),
    "mean": Rule(),
    "ties": Rule("trim", True, 0.2),
    "dare": Rule("drop", False, 0.5),
    "dare_linear": Rule("drop", False, 0.5),
    "dare_ties": Rule("drop", True, 0.5),
    "magnitude_prune": Rule("trim", False, 0.2),
}


def trim(tensor: Tensor, density: float) -> Tensor:
    """``tensor`` with its ``int(density * numel)`` numbers of greatest magnitude, and zeros."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)


def drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """``tensor`` of which each number stays with probability ``density``, divided by it: its mean over draws is the tensor."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def merged(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    rule: Rule,
    density: float,
    generators: Iterable[torch.Generator],
    majority: Majority = "total",
) -> Tensor:
    """One tensor out of several of its shape.

    Args:
        tensors: of one shape, in float32 at least.
        weights: of each, multiplied in after signs are elected.
        rule: what is kept, and how it adds up.
        density: the share of each tensor that is kept.
        generators: of each, which say what of it is dropped.
        majority: which sign wins a place: that of the sum (``"total"``), or that which more tensors have (``"frequency"``); plus if even.
    """
    if rule.thins == "trim":
        tensors = [trim(tensor, density) for tensor in tensors]
    elif rule.thins == "drop":
        tensors = [drop(tensor, density, one) for tensor, one in zip(tensors, generators, strict=True)]
    each = torch.stack(list(tensors))
    weighted = each * each.new_tensor(list(weights)).view(-1, *(1,) * (each.dim() - 1))
    if not rule.elects:
        return weighted.sum(0)
    signs = each.sign()
    total = each.sum(0) if majority == "total" else signs.sum(0)
    agrees = signs == torch.where(total >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)
