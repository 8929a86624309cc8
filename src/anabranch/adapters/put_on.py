"""`put_on`: layers beside the matrices of a model that is there, with the numbers that training starts from; and off again.

    put_on(model, {"*.attention.q": LowRank.Config(rank=8)}, seed=0)    # the base is frozen, what was put on learns
    take_off(model)                                                     # the base again

Any kind of linear layer that stands beside a matrix can be put on. Its first numbers follow from the seed and from its name alone, so
that they are the same whatever else is adapted.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anabranch.adapters.around import bare_config, bare_name
from anabranch.adapters.graft import check_decoder, check_pools, graft, layers_of, start_layers, strip
from anabranch.config import configclass
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty, with_memory
from anabranch.machine import room_bytes
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection
from anabranch.nn.quantize import FewBitLinear, PackedEmbedding, QuantizedPool

__all__ = ["added_names", "built_alone", "put_on", "take_off"]


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
            own = (self.seed * 0x9E3779B97F4A7C15 + zlib.crc32(projection.name.encode())) % 2**63
            generator = torch.Generator().manual_seed(own)
            with with_memory():
                return self.inner.build(projection, replace(context, generator=generator))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """There is none of these in a model."""
        raise AssertionError("a layer that is never built")


def put_on(model: Decoder, linears: Mapping[str, Linear.Config], *, seed: int = 0) -> Decoder:
    """Put the layers of ``linears`` beside matrices of ``model``, in place, and return it. The base stays as it is; what is new learns.

    Args:
        model: without layers of the kind so far; its matrices may be of any type, the layers are in float32.
        linears: by patterns of names, as `Decoder.Config.linears`.
        seed: of the first numbers.

    Raises CapacityError for layers that do not fit into memory; ConfigError: no pattern, one that fits no layer, a kind that does not
    stand beside a matrix, a model that has ``linears`` already, experts that nothing can stand beside, and what a kind itself refuses.
    """
    check_decoder(model)
    if not linears:
        raise ConfigError("there is nothing to put on: name at least one pattern of layers, such as '*.attention.q'")
    if model.config.linears:
        first = next(iter(model.config.linears))
        raise ConfigError(f"linears of the model has {first!r} already; take it off first, or merge it")
    for pattern, config in linears.items():
        if not config.is_added:
            raise ConfigError(
                f"linears has {pattern!r} of kind {config.owner.kind!r}, which takes the place of a matrix; an adapter stands beside one"
            )
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
    return model


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


def take_off(model: Decoder) -> Decoder:
    """Take off what `put_on` put on, in place, and return the model: the base again, frozen still. Raises ConfigError without any."""
    if not layers_of(model):
        raise ConfigError("the model has no layers beside its matrices that could be taken off")
    kept = build_empty(model.config.replace(linears={})).shared
    strip(model)
    for name in [name for name in model.shared if name not in kept]:
        del model.shared[name]
    return model


def added_names(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are no matrices of the base, in whatever bits these are, as in the state dict."""
    decoder = model if isinstance(model, Decoder) else next(m for m in model.modules() if isinstance(m, Decoder))
    base = set(build_empty(bare_config(decoder.config)).state_dict())
    for name, module in decoder.named_modules():
        if isinstance(module, FewBitLinear | PackedEmbedding | QuantizedPool):
            # Of experts, layers beside them are in the module too.
            base |= {bare_name(f"{name}.{key}") for key, _ in module.named_buffers(recurse=False)}
    return [name for name in decoder.state_dict() if bare_name(name) not in base]
