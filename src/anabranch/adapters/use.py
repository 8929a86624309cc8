"""`AdapterUse`: how much of each adapter is used for each task beside each matrix, measured on rows, or read off tables of tasks.

use = use_of_rows(model, [(token_BL, mask_BL, task_B)], tasks=("sql", "law"), adapters=pool.names)
use = use_of_tables(model)                       # Poly and MHR: what each task makes of the skills
"""
# Shapes: B rows, L positions, T tasks, M matrices, E adapters or skills, q heads

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.adapters.graft import layers_of
from anabranch.adapters.mhr.layer import MultiHeadRouted
from anabranch.adapters.mixture_report import mixture_report, routed_layers
from anabranch.adapters.skills import SkilledLowRank
from anabranch.errors import ConfigError, InputError
from anabranch.lm.generate import evaluating

__all__ = ["AdapterUse", "use_of_rows", "use_of_tables"]


@dataclass(frozen=True, eq=False)
class AdapterUse:
    """Which adapter served which task and layer.

    Attributes:
        tasks, matrices, adapters: their names.
        weight_TME: mean weight of each adapter over the tokens of a task, float64; NaN where a matrix has no such adapter.
        tokens_T: of each task that were looked at; 0 for what was read off a table.
    """

    tasks: tuple[str, ...]
    matrices: tuple[str, ...]
    adapters: tuple[str, ...]
    weight_TME: np.ndarray
    tokens_T: tuple[int, ...]

    def __post_init__(self) -> None:
        wanted = (len(self.tasks), len(self.matrices), len(self.adapters))
        if self.weight_TME.shape != wanted:
            raise ConfigError(f"weights have shape {self.weight_TME.shape}; names are of {wanted}")

    @property
    def share_TE(self) -> np.ndarray:
        """Of all weight that a task gives, beside all matrices, what goes to each adapter; 0 where it gives none."""
        sum_TE = np.nansum(np.abs(self.weight_TME), axis=1)
        return sum_TE / np.maximum(sum_TE.sum(1, keepdims=True), 1e-30)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: None where a matrix has no such adapter."""
        weights = [
            [[None if np.isnan(weight) else float(weight) for weight in row_E] for row_E in row_ME]
            for row_ME in self.weight_TME
        ]
        return {
            "tasks": list(self.tasks),
            "matrices": list(self.matrices),
            "adapters": list(self.adapters),
            "tokens": list(self.tokens_T),
            "weights": weights,
            "shares": self.share_TE.tolist(),
        }


def use_of_rows(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    *,
    tasks: Sequence[str],
    adapters: Sequence[str],
) -> AdapterUse:
    """Run rows through ``model`` in evaluation, and see whom its routers beside matrices choose.

    Args:
        model: with routers beside its matrices, see `mixture_report`.
        batches: (token_BL, mask_BL or None, task_B), where a task is a number from 0.
        tasks, adapters: their names, in the order of their numbers.

    Raises ConfigError for a model without such routers, with more adapters than names, or with offloaded ones, InputError where a task has
    no tokens.
    """
    tokens = [0] * len(tasks)

    def counted() -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        for token_BL, mask_BL, task_B in batches:
            length_B = torch.full((len(token_BL),), token_BL.shape[1]) if mask_BL is None else mask_BL.sum(1).cpu()
            for task, length in zip(task_B.tolist(), length_B.tolist(), strict=True):
                tokens[task] += int(length)
            yield token_BL, mask_BL, task_B

    report = mixture_report(model, counted())
    most = max(len(facts.weight) for facts in report.routers)
    if most > len(adapters):
        raise ConfigError(f"a router chooses among {most} adapters, and {len(adapters)} are named; name each")
    idle = [name for name, number in zip(tasks, tokens, strict=True) if not number]
    if idle:
        raise InputError(f"task {idle[0]!r} has no tokens; give rows of each")
    matrices = tuple(name for facts in report.routers for name in facts.layers)
    weight_TME = np.full((len(tasks), len(matrices), len(adapters)), np.nan)
    row, layers = 0, routed_layers(model)
    for facts in report.routers:
        for name in facts.layers:
            # Beside an expert there are those tasks whose tokens it was given.
            for task, weight_E in facts.by_task.items():
                weight_TME[task, row, : len(weight_E)] = weight_E
            # Also what a router chooses for other matrices of its.
            weight_TME[:, row, list(layers[name].lacking)] = np.nan
            row += 1
    return AdapterUse(tuple(tasks), matrices, tuple(adapters), weight_TME, tuple(tokens))


@torch.no_grad()
def use_of_tables(model: nn.Module) -> AdapterUse:
    """What each task makes of the skills of Poly or MHR, the mean over heads; nothing is run.

    Raises ConfigError for a model that does not go by tasks.
    """
    layers: dict[str, Any] = {
        name: layer for name, layer in layers_of(model).items() if isinstance(layer, MultiHeadRouted | SkilledLowRank)
    }
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no layer that goes by task")
    tasks = next(iter(layers.values())).tasks
    with evaluating(model):
        weights = [_of_layer(layer) for layer in layers.values()]
    most = max(weight_TE.shape[1] for weight_TE in weights)
    weight_TME = np.full((len(tasks), len(layers), most), np.nan)
    for row, weight_TE in enumerate(weights):
        weight_TME[:, row, : weight_TE.shape[1]] = weight_TE.double().cpu().numpy()
    skills = tuple(f"skill {number}" for number in range(most))
    return AdapterUse(tuple(tasks), tuple(layers), skills, weight_TME, (0,) * len(tasks))


def _of_layer(layer: Any) -> Tensor:
    number_T = torch.arange(len(layer.tasks), device=next(layer.parameters()).device)
    if isinstance(layer, SkilledLowRank):
        return layer.weights(number_T).mean(1)
    if layer.config.uniform:
        return torch.full((len(layer.tasks), layer.config.skills), 1 / layer.config.skills)
    return layer.table(number_T).mean(1)
