"""Batches in micro-batches: tensors, and tuples, lists and dictionaries of them, cut along dimension 0 and put together again."""
# Shapes: N items of a batch, M micro-batches

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import InputError

__all__ = ["join", "map_tensors", "num_items", "sizes_of", "split", "tensors_of"]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested value with ``change`` of each tensor, called in order; everything else stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((name, map_tensors(item, change)) for name, item in value.items())
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def num_items(value: Any, what: str = "x") -> int:
    """N of a nested value. Raises InputError if it has no tensor with items, or tensors of several N."""
    found = {tensor.shape[0] for tensor in tensors_of(value) if tensor.ndim}
    if len(found) != 1:
        said = (
            "no tensor with dimension 0" if not found else f"tensors of {' and '.join(map(str, sorted(found)))} items"
        )
        raise InputError(f"{what} has {said}; a batch is cut along dimension 0, which all its tensors must have alike")
    count = found.pop()
    if not count:
        raise InputError(f"{what} has no items; give at least one")
    return count


def sizes_of(items: int, micro_batches: int) -> list[int]:
    """Items of each micro-batch, as ``torch.chunk``: equal but the last, and fewer where M does not go into N."""
    size = -(-items // micro_batches)
    return [min(size, items - start) for start in range(0, items, size)]


def split(value: Any, sizes: list[int]) -> list[Any]:
    """One nested value per micro-batch; tensors without dimensions, and what is no tensor, are in each."""
    pieces = [tensor.split(sizes) if tensor.ndim else (tensor,) * len(sizes) for tensor in tensors_of(value)]
    return [_filled(value, [piece[number] for piece in pieces]) for number in range(len(sizes))]


def join(values: list[Any]) -> Any:
    """The inverse of `split`: what is no tensor, or has no dimensions, is the first micro-batch's."""
    columns = [
        torch.cat(column) if column[0].ndim else column[0]
        for column in zip(*(list(tensors_of(value)) for value in values), strict=True)
    ]
    return _filled(values[0], columns)


def _filled(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with these tensors in place of its own."""
    left = iter(tensors)
    return map_tensors(value, lambda _: next(left))
