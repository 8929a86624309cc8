"""`put_on`: layers beside the matrices of a model that is there, with the numbers that training starts from; and off again.

    put_on(model, {"*.attention.q": LowRank.Config(rank=8)}, seed=0)    # the base is frozen, what was put on learns
    take_off(model)                                                     # the base again

    put_on(gpt2, {"*.c_attn": MultiHeadRouted.Config(tasks=("sql", "law"))})    # of transformers, or any module of torch, by its own names

Any kind of linear layer that stands beside a matrix can be put on a model of ours; on any other, kinds that add alone
(`anabranch.adapters.onto_module`). Its first numbers follow from the seed and from its name alone, so that they are the same whatever else
is adapted.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from anabranch.adapters.around import bare_config, bare_name
from anabranch.adapters.graft import check_pools, graft, layers_of, patterns_of, start_layers, strip, unstrip
from anabranch.adapters.onto_module import (
    added_in,
    built_beside,
    check_module,
    chosen,
    count_beside,
    linears_in,
    put_beside,
    take_away,
)
from anabranch.config import configclass
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty, with_memory
from anabranch.machine import room_bytes
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection
from anabranch.nn.quantize import FewBitLinear, PackedEmbedding, QuantizedPool

__all__ = ["Lifted", "added_names", "built_alone", "lift", "linears_on", "put_back", "put_on", "take_off"]

M = TypeVar("M", bound=nn.Module)


class _Drawn(Linear):
    """Builds the layer of ``inner`` with numbers in it, where the model around it is built empty."""

    @configclass
    class Config(Linear.Config):
        """Attributes: ``inner``, what is built; ``seed`` of its numbers."""

        is_added: ClassVar[bool] = True
        inner: Linear.Config
        seed: int = 0

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """Of what is built."""
            return self.inner.count(projection, context)

        def build(self, projection: Projection, context: BuildContext) -> Any:
            """What is built, in place of this."""
            with with_memory():
                return self.inner.build(projection, replace(context, generator=_generator(self.seed, projection.name)))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """There is none of these in a model."""
        raise AssertionError("a layer that is never built")


def _generator(seed: int, name: str) -> torch.Generator:
    """Of the first numbers of the layer beside ``name``."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63)


def put_on(model: M, linears: Mapping[str, Linear.Config], *, seed: int = 0) -> M:
    """Put the layers of ``linears`` beside matrices of ``model``, in place, and return it. The base stays as it is; what is new learns.

    Args:
        model: one of ours, or any module of torch with linear layers, or Conv1D of transformers' GPT-2. It has no layers of the kind so
            far; the matrices of one of ours may be of any type, others are in floating point, and the layers in float32.
        linears: by patterns of names, as `Decoder.Config.linears`; of a model that is not ours of the names of its modules.
        seed: of the first numbers.

    Raises CapacityError for layers that do not fit into memory; ConfigError: no pattern, one that fits no layer, a kind that does not
    stand beside a matrix, a model that has ``linears`` already, experts that nothing can stand beside, and what a kind itself refuses. Of a
    model that is not ours also: a kind that does more than add, and a matrix in few bits. The model is then as it was.
    """
    check_module(model)
    if not linears:
        raise ConfigError("there is nothing to put on: name at least one pattern of layers, such as '*.attention.q'")
    there = linears_on(model)
    if there:
        raise ConfigError(f"linears of the model has {next(iter(there))!r} already; take it off first, or merge it")
    for pattern, config in linears.items():
        if not config.is_added:
            raise ConfigError(
                f"linears has {pattern!r} of kind {config.owner.kind!r}, which takes the place of a matrix; an adapter stands beside one"
            )
    if isinstance(model, Decoder):
        _onto_decoder(model, linears, seed)
    else:
        configs = chosen(model, linears)
        check_room(count_beside(model, configs))
        put_beside(model, *built_beside(model, configs, partial(_generator, seed)))
    return model


def _onto_decoder(model: Decoder, linears: Mapping[str, Linear.Config], seed: int) -> None:
    base = model.config
    # Checked as it will be, whose errors speak of what was asked for.
    wanted = base.replace(linears=dict(linears))
    check_room(wanted.count().parameters - base.count().parameters)
    made = built_alone(base, linears, seed=seed)
    check_pools(model, made)
    model.requires_grad_(False)
    device = model.embedding.weight.device
    graft(model, made, lambda part, layer: layer.to(device))
    start_layers(model)
    for name, module in made.shared.items():
        if name not in model.shared:
            model.shared[name] = module.to(device)
    model.config = wanted


def linears_on(model: nn.Module) -> dict[str, Linear.Config]:
    """What is on ``model`` as `put_on` takes it; of a model that is not ours as few patterns as say it."""
    if isinstance(model, Decoder):
        return dict(model.config.linears)
    return patterns_of({name: layer.config for name, layer in layers_of(model).items()}, linears_in(model))


def check_room(numbers: int, of_each: int = 4) -> None:
    """Raise CapacityError where so many numbers of layers, of ``of_each`` bytes, are more than is free."""
    wanted, free = numbers * of_each, room_bytes()
    if wanted > free:
        raise CapacityError(
            f"what is put onto the model has {numbers:,} numbers, which take {wanted / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are "
            "free; take a smaller rank, fewer experts or fewer layers"
        )


def built_alone(base: Decoder.Config, linears: Mapping[str, Linear.Config], *, seed: int = 0) -> Decoder:
    """A model of ``base`` with the layers of ``linears``, which alone take memory; their numbers are drawn by their names."""
    drawn = {key: _Drawn.Config(inner=kind, seed=seed) for key, kind in linears.items()}
    made: Decoder = build_empty(base.replace(linears=drawn))
    return made


def take_off(model: M) -> M:
    """Take off what `put_on` put on, in place, and return the model: the base again, frozen still. Raises ConfigError without any."""
    lift(model)
    return model


@dataclass(frozen=True, eq=False)
class Lifted:
    """What was taken off a model, for `put_back`.

    Attributes:
        layers: by the names of what they stand beside; of a model of ours what the seam built, whole.
        shared: what layers share, by its names.
        linears: of a model of ours.
    """

    layers: Mapping[str, Any]
    shared: Mapping[str, nn.Module]
    linears: Mapping[str, Linear.Config]


def lift(model: nn.Module) -> Lifted:
    """`take_off`, that gives what it takes."""
    if not layers_of(model):
        raise ConfigError("the model has no layers beside its matrices that could be taken off")
    if not isinstance(model, Decoder):
        return Lifted(*take_away(model), {})
    linears = model.config.linears
    kept = build_empty(model.config.replace(linears={})).shared
    layers = strip(model)
    return Lifted(layers, {name: model.shared.pop(name) for name in [*model.shared] if name not in kept}, linears)


def put_back(model: nn.Module, lifted: Lifted) -> None:
    """Put on again what was lifted off, beside the matrices that there are now, on their devices."""
    device = next(model.parameters()).device
    shared = {name: module.to(device) for name, module in lifted.shared.items()}
    if isinstance(model, Decoder):
        unstrip(model, {name: layer.to(device) for name, layer in lifted.layers.items()})
        model.shared.update(shared)
        model.config = model.config.replace(linears=lifted.linears)
    else:
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        put_beside(model, {name: layer.to(device) for name, layer in lifted.layers.items()}, nn.ModuleDict(shared))
        for parameter in learned:
            parameter.requires_grad_(True)


def added_names(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are no matrices of the base, in whatever bits these are, as in the state dict."""
    decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    if decoder is None:
        return added_in(model)
    base = set(build_empty(bare_config(decoder.config)).state_dict())
    for name, module in decoder.named_modules():
        if isinstance(module, FewBitLinear | PackedEmbedding | QuantizedPool):
            # Of experts, layers beside them are in the module too.
            base |= {bare_name(f"{name}.{key}") for key, _ in module.named_buffers(recurse=False)}
    return [name for name in decoder.state_dict() if bare_name(name) not in base]
