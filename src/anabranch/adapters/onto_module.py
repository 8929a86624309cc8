"""Layers beside the matrices of a model that is not ours, any module of torch: found by patterns of its own names, built, and put on.

A matrix is a linear layer, or a Conv1D of transformers' GPT-2, which is one that lies turned. What stands beside it adds to what it makes
(`anabranch.adapters.beside`); kinds that do more, as DoRA, need to be in a model of ours.
"""
# Shapes: C inputs, O outputs

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from anabranch.adapters.beside import Beside, sizes_of
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some
from anabranch.nn import BuildContext, Linear
from anabranch.nn.linear import Projection

__all__ = [
    "SHARED",
    "added_in",
    "built_beside",
    "check_module",
    "chosen",
    "count_beside",
    "linears_in",
    "put_beside",
    "take_away",
]

# What layers share (a routing table of many) is a module of the model by this name.
SHARED = "anabranch_shared"
_NUMBER = re.compile(r"\d+")


def check_module(model: object) -> None:
    """Raise ConfigError for what is no module of torch, or one around a model of ours, whose layers are asked otherwise."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is a {type(model).__name__}; layers are put onto a Decoder of ours or a module of torch"
        )
    ours = next((name for name, module in model.named_modules() if isinstance(module, Decoder)), None)
    if ours is not None and not isinstance(model, Decoder):
        raise ConfigError(f"the model is a {type(model).__name__} around a Decoder, {ours}; put layers onto that one")


def linears_in(model: nn.Module) -> dict[str, Any]:
    """The matrices of a model by their names, each once; those that something stands beside, too."""
    found, beside = dict[str, Any](), list[str]()
    for name, module in model.named_modules():
        if name.startswith(tuple(beside)) or name.partition(".")[0] == SHARED:
            continue
        if isinstance(module, Beside):
            found[name] = module.matrix
            beside.append(f"{name}.")
        elif name and sizes_of(module) is not None:
            found[name] = module
    return found


def chosen(model: nn.Module, linears: Mapping[str, Linear.Config]) -> dict[str, Linear.Config]:
    """The config of each matrix that a pattern names, in the order of the model; the first pattern that fits counts.

    Raises ConfigError for a pattern that fits no matrix, a kind that does not add alone, and a matrix stored in few bits.
    """
    matrices = linears_in(model)
    for pattern, config in linears.items():
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ConfigError(f"linears has {pattern!r}, {_what_fits(model, pattern, matrices)}")
        if not config.owner.only_adds():
            raise ConfigError(
                f"linears has {pattern!r} of kind {config.owner.kind!r}, which does more than add to what a matrix makes; beside matrices "
                f"of a {type(model).__name__} stands what adds alone, as low_rank, routed_low_rank and multi_head_routed do"
            )
    found = {}
    for name, matrix in matrices.items():
        config_or_none = next((config for pattern, config in linears.items() if fnmatchcase(name, pattern)), None)
        if config_or_none is None:
            continue
        if 0 in sizes_of(matrix):  # type: ignore[operator]  # it is a matrix
            raise ConfigError(
                f"{name} has a matrix of {list(matrix.weight.shape)}, beside which nothing can stand; leave it out"
            )
        if matrix.weight.is_complex():
            raise ConfigError(
                f"{name} is of complex numbers, and layers are of real ones; leave it out of the patterns"
            )
        if not matrix.weight.is_floating_point():
            raise ConfigError(
                f"{name} is a {type(matrix).__name__} stored in few bits ({_type_of(matrix.weight)}), which nothing is put beside; load "
                "the model in floating point, or leave the layer out of the patterns"
            )
        found[name] = config_or_none
    return found


def _what_fits(model: nn.Module, pattern: str, matrices: Mapping[str, Any]) -> str:
    """What a pattern fits that fits no matrix."""
    for name, parameter in model.named_parameters():
        if fnmatchcase(name, pattern) and parameter.dim() == 3:
            return (
                f"which fits {name}, a stack of {len(parameter)} matrices in one tensor, as experts are stored; nothing can stand beside "
                "one of them: leave them out of the patterns"
            )
    for name, module in model.named_modules():
        if fnmatchcase(name, pattern):
            return f"which fits {name or 'the model'}, a {type(module).__name__} and no linear layer in floating point"
    words = list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))
    there = f"its linear layers are called {some(words)}" if words else "it has none"
    return f"which fits no linear layer of the {type(model).__name__}; {there}"


def _type_of(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _sites(
    model: nn.Module, configs: Mapping[str, Linear.Config], generator_of: Callable[[str], torch.Generator | None]
) -> Iterator[tuple[str, Any, Projection, BuildContext]]:
    """(name, matrix, its projection, the context to build what stands beside it), of each."""
    matrices, companions, shared = linears_in(model), dict[str, Any](), nn.ModuleDict()
    for name in configs:
        in_dim, out_dim = sizes_of(matrices[name])  # type: ignore[misc]  # it is a matrix
        projection = Projection(name, in_dim, out_dim, parts={name.rpartition(".")[2]: out_dim})
        number = _NUMBER.search(name)
        # The first number in a name counts blocks.
        layer = int(number[0]) if number else 0
        context = BuildContext(in_dim, layer=layer, generator=generator_of(name), companions=companions, shared=shared)
        yield name, matrices[name], projection, context


def count_beside(model: nn.Module, configs: Mapping[str, Linear.Config]) -> int:
    """Numbers of the layers of ``configs`` beside these matrices."""
    return sum(
        configs[name].count(projection, context).parameters
        for name, _, projection, context in _sites(model, configs, lambda name: None)
    )


def built_beside(
    model: nn.Module, configs: Mapping[str, Linear.Config], generator_of: Callable[[str], torch.Generator | None]
) -> tuple[dict[str, Any], nn.ModuleDict]:
    """(layers by the names of the matrices, what they share), on the matrices' devices; the numbers of each are of its generator."""
    made, shared = {}, nn.ModuleDict()
    for name, matrix, projection, context in _sites(model, configs, generator_of):
        layer = configs[name].build(projection, context)
        made[name] = layer.to(matrix.weight.device).train(model.training)
        shared = context.shared.to(matrix.weight.device).train(model.training)
    return made, shared


def put_beside(model: nn.Module, layers: Mapping[str, nn.Module], shared: nn.ModuleDict | None = None) -> None:
    """Put ``layers`` beside the matrices of these names, wherever a matrix stands; the base is frozen."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        _exchange(model, model.get_submodule(name), Beside(model.get_submodule(name), layer, name))
    if shared:
        model.add_module(SHARED, shared)


def take_away(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Take off what `put_beside` put on, and return it: layers by the names of the matrices, and what they share by its names."""
    layers = {}
    for module in [module for module in model.modules() if isinstance(module, Beside)]:
        layers[module.name] = module.beside
        _exchange(model, module, module.matrix)
    shared: Any = model._modules.pop(SHARED, None)
    return layers, {} if shared is None else dict(shared.items())


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """``new`` at each place of ``old``: some modules stand at several."""
    for owner in list(model.modules()):
        # What stands beside has its matrix in itself.
        if owner is not new:
            for leaf in [leaf for leaf, module in owner._modules.items() if module is old]:
                setattr(owner, leaf, new)


def added_in(model: nn.Module) -> list[str]:
    """Names in the state dict of what was put on."""
    places = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Beside)]
    within = (*(f"{name}.beside." for name in places), f"{SHARED}.")
    return [name for name in model.state_dict() if name.startswith(within)]
