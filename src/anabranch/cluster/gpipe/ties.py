"""Parameters that several layers have (an embedding that is the head too), in one stage or in several."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from anabranch.errors import InputError

__all__ = ["Tie", "Ties", "own_copies", "ties_of"]

Ties = Sequence[Sequence[str]] | Literal["auto"]


@dataclass(frozen=True)
class Tie:
    """One parameter with several names.

    Attributes:
        names: as in the model's state dict.
        layers: the layer of each name.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]


def ties_of(model: nn.Sequential, declared: Ties) -> list[Tie]:
    """The parameters of a model that several layers have.

    Args:
        model: with its layers in order.
        declared: groups of names; or ``auto`` for those that there are.

    Raises InputError for a parameter that stands in several layers and is not declared, and for a declared name that is not tied so.
    """
    names: dict[int, list[str]] = defaultdict(list)
    layer_of: dict[str, int] = {}
    for number, (prefix, layer) in enumerate(model.named_children()):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(f"{prefix}.{name}")
            layer_of[f"{prefix}.{name}"] = number
    found = [tuple(group) for group in names.values() if len({layer_of[name] for name in group}) > 1]
    if declared != "auto":
        known = {name: frozenset(group) for group in found for name in group}
        for group in declared:
            for name in group:
                if name not in layer_of:
                    raise InputError(f"tied names {name!r}, and the model has no such parameter")
                if known.get(name) != frozenset(group):
                    others = ", ".join(sorted(known.get(name, frozenset((name,)))))
                    raise InputError(
                        f"tied says that {' and '.join(group)} are one parameter; those of {name!r} are {others}"
                    )
        said = {name for group in declared for name in group}
        for group in found:
            if not said.issuperset(group):
                raise InputError(
                    f"{' and '.join(group)} are one parameter in several layers; declare it with tied=[{list(group)}], or tied='auto'"
                )
    return [Tie(group, tuple(layer_of[name] for name in group)) for group in found]


@contextmanager
def own_copies(model: nn.Module, ties: Sequence[Tie], stage_of: Sequence[int]) -> Iterator[None]:
    """In the block each stage has a parameter of its own for what is tied, over the same memory; then gradients are added up.

    Stages work at once, and the order in which they add to one gradient would be that of their threads. So each adds to its own, and those
    are summed in the order of stages.
    """
    put: list[tuple[nn.Module, str, nn.Parameter]] = []
    groups: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
    for tie in ties:
        original = _parameter(model, tie.names[0])
        copies: dict[int, nn.Parameter] = {}
        for name, layer in zip(tie.names, tie.layers, strict=True):
            stage = stage_of[layer]
            if stage == stage_of[tie.layers[0]]:
                continue
            if stage not in copies:
                copies[stage] = nn.Parameter(original.detach(), requires_grad=original.requires_grad)
            path, _, last = name.rpartition(".")
            owner = model.get_submodule(path)
            put.append((owner, last, original))
            owner._parameters[last] = copies[stage]
        if copies:
            groups.append((original, [copies[stage] for stage in sorted(copies)]))
    try:
        yield
    finally:
        for owner, last, original in put:
            owner._parameters[last] = original
        with torch.no_grad():
            for original, others in groups:
                for copy in others:
                    if copy.grad is not None:
                        grad = copy.grad.to(original.device)
                        original.grad = grad if original.grad is None else original.grad.add_(grad)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    path, _, last = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters[last]
    assert parameter is not None
    return parameter
