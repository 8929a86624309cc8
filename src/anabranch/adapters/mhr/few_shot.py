"""A trained inventory for a new task, at three prices, and the average of all skills.

    adapt(model, "legal", mode="full")      # MHR, Poly:   A, B and a fresh row of Z learn
    adapt(model, "legal", mode="z")         # MHR-z:       the row alone, selectors x q x K numbers
    adapt(model, mode="mu")                 # MHR-mu:      one adapter, the mean of all skills, and no router
    adapt(model, "legal", mode="random")    # PolyRand:    routed, with skills drawn anew; a control

Export to plain LoRA, which any server loads: `to_single_lora` for one task, `mu` for the average.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from anabranch.adapters.graft import layers_of
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.mhr.layer import MultiHeadRouted, routed_layers
from anabranch.adapters.mhr.table import tables_of
from anabranch.adapters.peft_folder import Adapter
from anabranch.adapters.plain import peft_adapter
from anabranch.adapters.put_on import linears_on, put_on, take_off
from anabranch.errors import ConfigError

__all__ = ["MODES", "Mode", "adapt", "merge_task", "mu", "to_single_lora"]

M = TypeVar("M", bound=nn.Module)
Mode = Literal["full", "z", "mu", "random"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})
MODES: tuple[Mode, ...] = ("full", "z", "mu", "random")


def adapt(
    model: M,
    tasks: str | Sequence[str] = (),
    *,
    mode: Mode = "full",
    redundant: bool = False,
    seed: int = 0,
    anew: Mapping[str, Any] = _NOTHING,
) -> M:
    """Make ``model``, whose layers were trained on many tasks, ready to learn others; in place, and returned.

    Args:
        model: with `MultiHeadRouted` layers, one of ours or any that `put_on` put them onto.
        tasks: names of the new ones, which get fresh rows of Z in the place of the old table; none with mode ``mu``, which knows no task.
        mode: what learns, see the top of this file. All else is frozen.
        redundant: with ``mu``, keep all skills and weigh each 1/K, as the reference does; they learn K times as slowly in sum.
        seed: of fresh rows, and of skills that are drawn anew.
        anew: fields of `MultiHeadRouted.Config` that routed layers have from now on: how rows are weighed, what is added to the loss.

    Raises ConfigError for another mode, no task where one is needed or one where none is, and a model without such layers.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if mode == "mu" and names:
        raise ConfigError(f"mode 'mu' knows no task, and {names[0]!r} is given; leave it out")
    if mode != "mu" and not names:
        raise ConfigError(f"mode {mode!r} learns a row for each new task; name at least one")
    if redundant and mode != "mu":
        raise ConfigError(f"redundant is for mode 'mu', and mode is {mode!r}; leave it out")
    routed_layers(model)
    if mode == "mu" and not redundant:
        return _as_average(model, seed)
    changes: dict[str, Any] = {"uniform": True} if mode == "mu" else {"tasks": names, **anew}
    before = {part: _only_routed(part, layer) for part, layer in layers_of(model).items()}
    _replaced(model, {pattern: _changed(kind, **changes) for pattern, kind in linears_on(model).items()}, seed)
    if mode != "random":
        _take_skills(model, before)
    _learn(model, inventory=mode != "z", table=mode != "mu")
    return model


def _changed(kind: Any, **changes: Any) -> Any:
    return kind.replace(**changes) if isinstance(kind, MultiHeadRouted.Config) else kind


def _replaced(model: nn.Module, linears: Mapping[str, Any], seed: int) -> None:
    """Other layers in the place of those that there are."""
    take_off(model)
    put_on(model, linears, seed=seed)


@torch.no_grad()
def _take_skills(model: nn.Module, before: Mapping[str, MultiHeadRouted]) -> None:
    for part, layer in layers_of(model).items():
        if part in before:
            layer.inventory.load_state_dict(before[part].inventory.state_dict())


def _learn(model: nn.Module, *, inventory: bool, table: bool) -> None:
    for layer in routed_layers(model):
        layer.inventory.requires_grad_(inventory)
    for each in tables_of(model).values():
        each.requires_grad_(table)


def _as_average(model: M, seed: int) -> M:
    """One plain adapter beside each matrix: the mean of its skills."""
    pairs = {part: _only_routed(part, layer).pair(None) for part, layer in layers_of(model).items()}
    linears = {
        pattern: LowRank.Config(rank=_rank_of(kind), alpha=_alpha_of(kind))
        for pattern, kind in linears_on(model).items()
    }
    _replaced(model, linears, seed)
    for part, layer in layers_of(model).items():
        layer.put(pairs[part], layer.a.device, trainable=True)
    return model


def _rank_of(kind: Any) -> int:
    return kind.rank * (kind.skills if kind.mixes == "outputs" else 1)


def _alpha_of(kind: Any) -> float:
    return float(kind.alpha * (kind.skills if kind.mixes == "outputs" else 1))


def _only_routed(part: str, layer: Any) -> MultiHeadRouted:
    if not isinstance(layer, MultiHeadRouted):
        raise ConfigError(f"{part} has a {type(layer).__name__} beside it too, which does not route by task")
    return layer


def to_single_lora(model: nn.Module, task: str, *, family: str | None = None) -> Adapter:
    """The adapter of one task as plain LoRA, by the names that peft has for the layers; `write_peft` writes it.

    Args:
        model: with `MultiHeadRouted` layers.
        task: its name.
        family: the ``model_type`` of Hugging Face whose names are used, where several could be the model's.

    Raises InputError for a task that there is not, ConfigError for a model without such layers, CheckpointError where no family of Hugging
    Face's has such a model.
    """
    return _exported(model, task, family)


def mu(model: nn.Module, *, family: str | None = None) -> Adapter:
    """The average of all skills as plain LoRA: what `to_single_lora` is for one task, for none (zero-shot MHR-mu)."""
    return _exported(model, None, family)


def _exported(model: nn.Module, task: str | None, family: str | None) -> Adapter:
    routed_layers(model)
    pairs = {part: _only_routed(part, layer).pair(task) for part, layer in layers_of(model).items()}
    return peft_adapter(model, pairs, family)


def merge_task(model: M, task: str | None) -> M:
    """Leave the adapter of one task (None: the average) beside the matrices as plain LoRA, in place, and return the model.

    What is then served is of this task alone; `anabranch.adapters.merge` lets the matrices take it in, and `unmerge` gives them back.

    Raises InputError for a task that there is not, ConfigError for a model without `MultiHeadRouted` layers.
    """
    routed_layers(model)
    pairs = {part: _only_routed(part, layer).pair(task) for part, layer in layers_of(model).items()}
    configs = {part: LowRank.Config(rank=pair.rank, alpha=pair.alpha) for part, pair in pairs.items()}
    _replaced(model, configs, 0)
    for part, layer in layers_of(model).items():
        layer.put(pairs[part], layer.a.device)
    return model
