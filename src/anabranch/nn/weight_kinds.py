"""How the numbers of a model's weights are stored."""

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.nn.nf4 import Nf4Linear
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.packed import Packed
from anabranch.nn.parted import PartedLinear
from anabranch.nn.parts import form_of, parts_of
from anabranch.nn.quantize import FewBitLinear, PackedEmbedding, QuantizedLinear, QuantizedPool

__all__ = ["FLOATS", "numbers_of_kinds"]

# Kinds in floating point.
FLOATS = ("float64", "float32", "bfloat16", "float16")


def numbers_of_kinds(model: nn.Module) -> dict[str, int]:
    """How many weights are stored in each kind (`anabranch.nn.packed.Kind`, a type of torch, ``nf4``), the most frequent first.

    Memory that several modules share, such as a table that is the head too, counts once. Experts of a budget count all, as they are in
    their slots.
    """
    # By the place of each in memory.
    kind_of: dict[Any, tuple[str, int]] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                kind_of[id(weight)] = _name(weight.dtype), weight.numel()
        for bias in _biases_of(module):
            kind_of[id(bias)] = _name(bias.dtype), bias.numel()
        if isinstance(module, Nf4Linear):
            kind_of[id(module)] = "nf4", module.in_features * module.out_features
        for packed in _packed_of(module):
            kind_of[packed.data.data_ptr()] = packed.kind, packed.num_experts * packed.rows * packed.depth
        if isinstance(module, OffloadedPool):
            for number, pair in enumerate(_kinds_of_slots(module)):
                kind_of[module, number] = pair
    found: dict[str, int] = {}
    for kind, count in kind_of.values():
        found[kind] = found.get(kind, 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kinds_of_slots(pool: OffloadedPool) -> list[tuple[str, int]]:
    """(kind, how many) of the weights of all experts."""
    if pool.packed is not None:
        return [(kind, pool.num_experts * rows * each.depth) for each in pool.packed for rows, kind, _ in form_of(each)]
    return list(zip((_name(pool.w13_SFD.dtype), _name(pool.w2_SDF.dtype)), pool.num_weights, strict=True))


def _biases_of(module: nn.Module) -> list[Tensor]:
    """Those that are no parameters."""
    found: list[Tensor | None] = [module.bias] if isinstance(module, FewBitLinear) else []
    found += [module.b13, module.b2] if isinstance(module, QuantizedPool | OffloadedPool) else []
    return [bias for bias in found if bias is not None]


def _packed_of(module: nn.Module) -> tuple[Packed, ...]:
    """The matrices of a module that stand packed in memory."""
    if isinstance(module, QuantizedLinear | PackedEmbedding):
        return (module.packed,)
    if isinstance(module, PartedLinear):
        return module.parts
    return tuple(part for each in module.packed for part in parts_of(each)) if isinstance(module, QuantizedPool) else ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
