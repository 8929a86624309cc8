"""Copies: tensors of the base that lie in an adapter's file though it did not learn them.

peft writes the head beside an adapter of it (``lm_head.base_layer.weight``), and head and embedding where it is told to save them. Where
they are what the model has they add nothing. Where not, the adapter is of another base, or its base was changed: alone it is put on as peft
puts it on, and wherever rows choose it is refused.
"""
# Shapes: N rows, K columns

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.names import Names, Stored
from anabranch.adapters.peft_folder import Adapter
from anabranch.adapters.whole import EMBEDDING, HEAD, tensor_of
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.packed import Packed

__all__ = ["common_copies", "same_numbers", "settled", "without_copies"]

# Rows of a panel of `Packed`, and numbers that are compared at once.
_PANEL, _AT_ONCE = 16, 1 << 22
# How far a matrix in few bits may be from what it was rounded from. Of integers: steps, with some room for the rounding of the scale; int4
# may have its zero in the middle, and cuts one end off by a step. Of the kinds of GGUF, whose steps somebody chose: the share of the norm.
_STEPS, _SHARE = {"int8": 0.6, "int4": 1.1}, 0.15


def settled(adapter: Adapter, names: Names, model: Decoder, folder: Any) -> Adapter:
    """The adapter as it is put onto ``model`` for all rows: copies of what the model has left out, others among what it brings whole.

    Raises ConfigError, which begins with ``folder``, for others of a matrix that the model stores in few bits.
    """
    other = {name: adapter.copies[name] for name in _unlike(adapter, names, model)}
    for name in other:
        if _packed(model, names.tensors[name]) is not None:
            raise ConfigError(
                f"{folder} holds other numbers for {name} than the model, which stores it in few bits; put it onto the model in floating "
                "point, or is it an adapter of another model?"
            )
    if HEAD in other and model.config.tie_embeddings and EMBEDDING not in adapter.saved:
        # One matrix in the base, which peft fills.
        other.setdefault(EMBEDDING, other[HEAD])
    return replace(adapter, saved={**adapter.saved, **other}, copies={})


def without_copies(adapter: Adapter, names: Names, model: Decoder, who: str, why: str) -> Adapter:
    """The adapter without its copies, for rows that choose it. Raises ConfigError, ``who ... why``, where one is not what the model has."""
    other = _unlike(adapter, names, model)
    if other:
        raise ConfigError(f"{who} brings {other[0]} whole, with other numbers than the model's, {why}")
    return replace(adapter, copies={})


def common_copies(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """The copies of all of them, for what is made of them without a model. Raises ConfigError where two hold other numbers."""
    found: dict[str, Tensor] = {}
    for number, adapter in enumerate(adapters):
        for name, copy in adapter.copies.items():
            if not same_numbers(found.setdefault(name, copy), copy):
                raise ConfigError(
                    f"adapter {number + 1} holds other numbers for {name} than one before it, so they are of different bases; they must be "
                    "of one model"
                )
    return found


def same_numbers(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same, where one may be rounded to a lesser type than the other."""
    if first.shape != second.shape:
        return False
    second = second.to(first.device)
    return torch.equal(first.to(second.dtype), second) or torch.equal(first, second.to(first.dtype))


@torch.no_grad()
def _unlike(adapter: Adapter, names: Names, model: Decoder) -> list[str]:
    """The copies that are not what ``model`` has, as near as it stores that."""
    return [name for name, copy in adapter.copies.items() if not _is_of(model, names.tensors[name], copy)]


def _is_of(model: Decoder, stored: Stored, copy: Tensor) -> bool:
    packed = _packed(model, stored)
    if packed is not None:
        return all(_is_near(part, copy[first : first + part.rows]) for first, part in _pieces(packed))
    module = _holder(model, stored)
    own = tensor_of(model, stored.tensor) if module is not model.embedding else model.embedding.weight
    return same_numbers(stored.piece.write(own), copy)


def _holder(model: Decoder, stored: Stored) -> Any:
    """The module whose matrix it is: a head that is the embedding has none of its own."""
    owner = stored.tensor.rpartition(".")[0]
    return model.embedding if owner == "head" and model.head is None else model.get_submodule(owner)


def _packed(model: Decoder, stored: Stored) -> Packed | None:
    """The matrix, where it is packed and whole."""
    found = getattr(_holder(model, stored), "packed", None)
    is_whole = stored.tensor.endswith(".weight") and not stored.piece.where and stored.piece.change is None
    return found if isinstance(found, Packed) and is_whole else None


def _pieces(packed: Packed) -> Iterator[tuple[int, Packed]]:
    """(first row, some rows) one after the other, so that never all of it is unpacked."""
    step = max(_AT_ONCE // packed.depth // _PANEL, 1)
    for panel in range(0, packed.data.shape[1], step):
        first = panel * _PANEL
        rows = min(packed.rows - first, step * _PANEL)
        yield first, replace(packed, data=packed.data[:, panel : panel + step].contiguous(), rows=rows)


def _is_near(packed: Packed, copy_NK: Tensor) -> bool:
    """Whether these rows may have been rounded from ``copy_NK``."""
    if packed.kind in ("float32", "bfloat16"):
        return same_numbers(packed.unpack(torch.float32 if packed.kind == "float32" else torch.bfloat16)[0], copy_NK)
    own_NK = packed.unpack(torch.float32)[0]
    miss_NK = own_NK - copy_NK.to(own_NK)
    if packed.kind in _STEPS:
        _, scale_ENG, _ = packed.integers()
        step_NK = scale_ENG[0].float().repeat_interleave(packed.group, dim=-1)
        # What was rounded may itself have been rounded to 16 bits.
        return bool((miss_NK.abs() <= _STEPS[packed.kind] * step_NK + own_NK.abs() / 128).all())
    return bool(miss_NK.norm() <= _SHARE * own_NK.norm())
