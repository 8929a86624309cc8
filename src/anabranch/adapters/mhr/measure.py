"""What a routing table has learned, and whether tasks pull at shared numbers in one direction.

sparsity       mean of floor(sigmoid(z) + 0.5): the share of skills that are more on than off
discreteness   mean entropy of Bernoulli(sigmoid(z)), over ln 2: 1 undecided, 0 decided
efficiency     entropy of the mean usage over tasks, over ln K: 1 all skills are used alike
alignment      mean cosine of the gradients that two tasks have for the shared adapters; the formula is ours
"""
# Shapes: T tasks, q heads, K skills

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.mhr.inventory import AdapterInventory
from anabranch.adapters.mhr.table import RoutingTable, tables_of
from anabranch.errors import ConfigError

__all__ = ["Diagnosis", "diagnose", "gradient_alignment", "shared_numbers"]

_TINY = 1e-12


@dataclass(frozen=True)
class Diagnosis:
    """Of one routing table; see the top of this file. Numbers from 0 to 1."""

    sparsity: float
    discreteness: float
    efficiency: float

    @classmethod
    def of(cls, table: RoutingTable) -> "Diagnosis":
        """Of a table as it is now."""
        with torch.no_grad():
            on_TqK = torch.sigmoid(table.z.double())
            entropy_TqK = -(on_TqK * (on_TqK + _TINY).log() + (1 - on_TqK) * (1 - on_TqK + _TINY).log())
            usage_qK = table.evaluated().double().clamp_min(0).mean(0)
            usage_qK = usage_qK / (usage_qK.sum(-1, keepdim=True) + _TINY)
            skills = usage_qK.shape[-1]
            spread = float(-(usage_qK * (usage_qK + _TINY).log()).sum(-1).mean())
            return cls(
                float((on_TqK + 0.5).floor().mean()),
                float(entropy_TqK.mean() / math.log(2)),
                spread / math.log(skills) if skills > 1 else 1.0,
            )


def diagnose(model: nn.Module) -> dict[str, Diagnosis]:
    """Of each table of ``model``, by the name of its module; a table that layers share once. Raises ConfigError where there is none."""
    tables = tables_of(model)
    if not tables:
        raise ConfigError("the model has no routing tables; it does not route by task")
    return {name: Diagnosis.of(table) for name, table in tables.items()}


def shared_numbers(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter of ``model``, which all tasks use."""
    found = [
        parameter
        for module in model.modules()
        if isinstance(module, AdapterInventory | LowRank)
        for parameter in module.parameters(recurse=False)
    ]
    if not found:
        raise ConfigError("the model has no adapters whose gradients could be compared")
    return found


def gradient_alignment(
    model: nn.Module, losses: Mapping[str, Callable[[], Tensor]]
) -> tuple[float, dict[tuple[str, str], float]]:
    """The mean cosine of the gradients of tasks, and that of each pair.

    Args:
        model: whose adapters are shared: `MultiHeadRouted` or `LowRank` layers. Its gradients are left as they are.
        losses: for each task what computes its loss.

    Raises ConfigError for fewer than two tasks, and for a model without adapters.
    """
    if len(losses) < 2:
        raise ConfigError(f"there are {len(losses)} tasks; gradients of at least two are compared")
    parameters = shared_numbers(model)
    learned = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        flat = {}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
            flat[name] = torch.cat(
                [
                    (torch.zeros_like(parameter) if gradient is None else gradient).detach().double().flatten()
                    for parameter, gradient in zip(parameters, gradients, strict=True)
                ]
            )
    finally:
        for parameter, learns in zip(parameters, learned, strict=True):
            parameter.requires_grad_(learns)
    pairs = {
        (one, other): float(torch.dot(flat[one], flat[other]) / (flat[one].norm() * flat[other].norm() + _TINY))
        for one, other in itertools.combinations(flat, 2)
    }
    return sum(pairs.values()) / len(pairs), pairs
