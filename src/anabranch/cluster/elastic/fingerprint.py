"""What ranks must agree on of layers, an optimizer and a loss: words that are others where a step would be.

    told([nn.Sequential(nn.Linear(6, 6), nn.Tanh())], torch.optim.AdamW, None, None, F.cross_entropy)
    # {"layers": ["Sequential 3f0c9b..."], "optimizer": "AdamW(amsgrad=False, betas=(0.9, 0.999), ...)", "loss": "cross_entropy", ...}

Two models of the same sizes may compute other things: another activation, another slope of it, other heads. So a layer's word is of all
its modules with their settings, modes and hooks, and of its parameters' names, shapes and types; of those that do not learn, of buffers
and of tensors among the settings of their numbers too. What a function computes cannot be told: of a loss, a hook and the like it is the
name, and what it was given.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from anabranch.cluster.elastic.links import pack
from anabranch.cluster.elastic.updating import Groups, OptimizerFactory

__all__ = ["batch_word", "told"]

# What modules count while they run, and ranks need not have alike.
_RUNNING = frozenset({"step", "first_row", "run_seed", "place"})
# Methods of modules that a trainer calls around each step, see `anabranch.train.hooks`.
_STEP_HOOKS = ("before_step", "on_step")
# Where torch keeps what a module calls around its work.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Of objects without a ``repr`` of their own, which another process has elsewhere.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Committed steps at which a learning rate is compared.
_STEPS = (0, 1, 10, 100, 1000, 10_000)


def told(
    layers: Sequence[nn.Module],
    optimizer_factory: OptimizerFactory,
    groups: Groups | None,
    learning_rate: Callable[[int], float] | None,
    loss: Callable[[Any, Any], Any],
) -> dict[str, Any]:
    """JSON-ready, by name; see `anabranch.cluster.elastic.ElasticTrainer` for what is given."""
    return {
        "layers": [_layer(layer) for layer in layers],
        "optimizer": _optimizer(optimizer_factory, grouped=bool(groups)),
        "groups": _groups(groups),
        "learning_rate": _rate(learning_rate),
        "loss": _function(loss),
    }


def batch_word(batch: tuple[Any, Any]) -> str:
    """Of a whole batch, inputs and targets, by their numbers."""
    return hashlib.blake2b(str(_plain(tuple(batch))).encode(), digest_size=8).hexdigest()


def _layer(layer: nn.Module) -> str:
    """The class of a layer, and a hash of what it computes with what numbers of parameters."""
    found = hashlib.blake2b(digest_size=8)
    for name, module in layer.named_modules():
        # What is set after each step is that of the step at which a rank was made.
        is_set = any(callable(getattr(module, hook, None)) for hook in _STEP_HOOKS)
        said = [] if is_set else [_ADDRESS.sub("", module.extra_repr()), _settings(module), _numbers(module)]
        found.update(repr((name, type(module).__qualname__, module.training, _hooks(module), said)).encode())
    for name, parameter in layer.named_parameters():
        told = (name, list(parameter.shape), str(parameter.dtype), parameter.requires_grad)
        found.update(repr(told).encode())
        if not parameter.requires_grad:
            found.update(pack([parameter])[1])
    return f"{type(layer).__name__} {found.hexdigest()}"


def _optimizer(factory: OptimizerFactory, *, grouped: bool) -> str:
    """The class of the optimizer that is made, and its settings."""
    one = nn.Parameter(torch.zeros(1))
    made = factory([{"params": [one]}] if grouped else [one])
    settings = {name: value for name, value in made.param_groups[0].items() if name != "params"}
    return f"{type(made).__name__}({', '.join(f'{name}={settings[name]!r}' for name in sorted(settings))})"


def _groups(groups: Groups | None) -> str | None:
    """A hash of the runs of numbers that learn otherwise."""
    if not groups:
        return None
    runs = [
        (layer, [(first, end, sorted(own.items())) for first, end, own in groups[layer]]) for layer in sorted(groups)
    ]
    return hashlib.blake2b(repr(runs).encode(), digest_size=8).hexdigest()


def _rate(rate: Callable[[int], float] | None) -> list[str] | None:
    """What a learning rate's factor is at some steps; as numbers of six digits, since machines may round otherwise."""
    return None if rate is None else [_at(rate, step) for step in _STEPS]


def _function(function: Any) -> str:
    """The name of a function and what it was given; of a module what a layer's word tells."""
    if isinstance(function, nn.Module):
        return _layer(function)
    if isinstance(function, partial):
        given = [_plain(value) for value in function.args]
        named = {name: _plain(value) for name, value in sorted(function.keywords.items())}
        return f"{_function(function.func)} with {given} and {named}"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """Public attributes that are plain values, tensors, tables or functions, such as a number of heads or an activation."""
    names = sorted(name for name in vars(module) if not name.startswith("_") and name not in _RUNNING)
    return [(name, told) for name in names if (told := _plain(getattr(module, name))) is not None]


def _numbers(module: nn.Module) -> list[tuple[str, str | None]]:
    """Of buffers."""
    return [(name, _plain(buffer)) for name, buffer in module.named_buffers(recurse=False)]


def _hooks(module: nn.Module) -> list[list[str | None]]:
    """Of functions that are called around a module's work, in their order."""
    return [[_plain(hook) for hook in getattr(module, name).values()] for name in _HOOKS]


def _plain(value: Any) -> str | None:
    """Of a plain value, a tensor, a table of such, or a function; None for others, whose ``repr`` is another in each process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)
    if isinstance(value, torch.Tensor):
        numbers = hashlib.blake2b(pack([value])[1], digest_size=8).hexdigest()
        return f"{value.dtype} {list(value.shape)} {numbers}"
    if isinstance(value, tuple | list):
        return repr([_plain(one) for one in value])
    if isinstance(value, set | frozenset):
        return repr(sorted(str(_plain(one)) for one in value))
    if isinstance(value, Mapping):
        return repr(sorted((str(_plain(name)), _plain(one)) for name, one in value.items()))
    if is_dataclass(value) and not isinstance(value, type):
        return repr([(one.name, _plain(getattr(value, one.name))) for one in fields(value)])
    if isinstance(value, partial) or inspect.isroutine(value):
        return _function(value)
    return None


def _at(rate: Callable[[int], float], step: int) -> str:
    try:
        return f"{float(rate(step)):.6g}"
    except Exception as error:
        # One that is made for fewer steps.
        return type(error).__name__
