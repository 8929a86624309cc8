"""`take_in`: what stands beside matrices into them, whatever its kind, where the kind is one that a matrix can compute.

read_own("runs/shira/adapter", model)
take_in(model)                          # its matrices hold what stands beside them, which is to be taken off
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.after import ScaleShift
from anabranch.adapters.beside import is_plain_product
from anabranch.adapters.gated import GatedLowRank
from anabranch.adapters.graft import layers_of
from anabranch.adapters.ladder import LADDERED
from anabranch.adapters.numbers import Holder
from anabranch.adapters.routed import RoutedLowRank
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some
from anabranch.nn import ExpertPool
from anabranch.nn.expert_layers import layers_beside
from anabranch.nn.linear import Added

__all__ = ["can_take_in", "give_back", "take_in"]


def can_take_in(layer: Any) -> bool:
    """Whether a matrix can compute what this layer does beside it."""
    if isinstance(layer, GatedLowRank):
        return False
    if isinstance(layer, Holder):
        return layer.numbers().merges
    return isinstance(layer, ScaleShift) or (hasattr(layer, "delta") and not isinstance(layer, RoutedLowRank))


@torch.no_grad()
def take_in(model: nn.Module) -> dict[str, list[Tensor]]:
    """Add what layers learned to the matrices that they stand beside; the layers stay until they are taken off.

    Returns what the matrices were, and biases that changed, by part, for `give_back`.

    Raises ConfigError for a kind that no matrix can compute, a matrix that is stored in few bits, and one whose type cannot hold the sum;
    the model is as it was then.
    """
    layers = layers_of(model)
    odd = [part for part, layer in layers.items() if not can_take_in(layer)]
    if odd:
        kind = layers[odd[0]].config.owner.kind
        one = "merge_task leaves a plain one of one task" if kind == "multi_head_routed" else "leave it beside"
        raise ConfigError(f"no matrix computes what a layer of kind {kind!r} does beside it ({some(odd)}); {one}")
    found = [(part, layer, *_matrix(model, part)) for part, layer in layers.items()]
    # All of them before any is changed.
    for part, layer, weight_OC, bias_O in found:
        for made in _merged(layer, weight_OC, bias_O):
            if made is not None and not made.isfinite().all():
                kind = str(made.dtype).removeprefix("torch.")
                raise ConfigError(f"{part} with what was learned has numbers that {kind} cannot hold; leave it beside")
    before = {}
    for part, layer, weight_OC, bias_O in found:
        before[part] = [tensor.detach().clone() for tensor in (weight_OC, bias_O) if tensor is not None]
        made_OC, made_O = _merged(layer, weight_OC, bias_O)
        weight_OC.copy_(made_OC)
        if bias_O is not None and made_O is not None:
            bias_O.copy_(made_O)
    return before


@torch.no_grad()
def give_back(model: nn.Module, before: Mapping[str, list[Tensor]]) -> None:
    """Let matrices that layers stand beside be what they were before `take_in`, to the bit.

    Raises ConfigError where one is stored in few bits by now; the model is as it was then.
    """
    targets = {part: [tensor for tensor in _matrix(model, part) if tensor is not None] for part in before}
    for part, tensors in before.items():
        for target, tensor in zip(targets[part], tensors, strict=True):
            target.copy_(tensor)


def _merged(layer: Any, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a matrix and its bias are with what the layer beside it learned, in their types."""
    if isinstance(layer, Holder):
        return layer.numbers().merged(weight_OC, bias_O)
    if isinstance(layer, ScaleShift):
        return layer.merged(weight_OC, bias_O)
    wide = torch.promote_types(weight_OC.dtype, torch.float32)
    return (weight_OC.to(wide) + layer.delta().to(wide)).to(weight_OC.dtype), bias_O


def _matrix(model: nn.Module, part: str) -> tuple[Tensor, Tensor | None]:
    """The rows of a matrix that are a part, and of its bias. Raises ConfigError where it is stored in few bits, or another part is too."""
    if not isinstance(model, Decoder):
        return _of_module(model, part)
    owner, _, word = part.rpartition(".")
    for name, module in ((name.replace(LADDERED, "."), module) for name, module in model.named_modules()):
        if isinstance(module, Added) and name.rpartition(".")[0] == owner and word in module.rows:
            weight, bias = (getattr(module.matrix, kind, None) for kind in ("weight", "bias"))
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                raise ConfigError(f"{name} is stored in few bits, which cannot be added to; dequantise the model first")
            own = _rows(module.rows, word)
            return weight[own], None if bias is None else bias[own]
        layers = layers_beside(module)
        if layers is not None and owner.startswith(f"{name}."):
            number = int(owner.removeprefix(f"{name}."))
            if not isinstance(module, ExpertPool):
                raise ConfigError(f"{name} is stored in few bits, which cannot be added to; dequantise the model first")
            if word == "down":
                return _stack(module.w2)[number], None
            return _stack(module.w13)[number][_rows(layers.rows[0], word)], None
    raise ConfigError(f"the model has no matrix {part}")


def _of_module(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """A matrix of a model that is not ours, as ``[O, C]``, and its bias."""
    place: Any = model.get_submodule(name)
    matrix, own = place.matrix, f"{name}.matrix.weight"
    weight = matrix.weight
    if not weight.is_floating_point():
        raise ConfigError(f"{name} is stored in few bits, which cannot be added to; dequantise the model first")
    if not is_plain_product(matrix):
        raise ConfigError(
            f"{name} is a {type(matrix).__name__} that does more than multiply by its matrix (a forward of its own, hooks, or a matrix "
            "that is made anew), so that what is added to the matrix would come out otherwise; leave it beside"
        )
    same = [other for other, one in _named_tensors(model) if other != own and _overlap(one, weight)]
    if same:
        raise ConfigError(f"{name} is {same[0]} of the model too, which would change with it; leave it beside")
    return weight if isinstance(matrix, nn.Linear) else weight.T, matrix.bias


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, one that is at several places at each of them."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may lie in the same memory, by where each begins and ends."""
    if one is other:
        return True
    if one.device != other.device or one.device.type == "meta" or not (one.numel() and other.numel()):
        return False
    (begin, end), (first, last) = _extent(one), _extent(other)
    return begin < last and first < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _rows(rows: Mapping[str, int], word: str) -> slice:
    """Where the rows of one part are."""
    first = 0
    for name, size in rows.items():
        if name == word:
            return slice(first, first + size)
        first += size
    raise KeyError(word)


def _stack(weights: Tensor | None) -> Tensor:
    assert weights is not None, "layers stand beside experts whose matrices are in one stack"
    return weights
