"""Steady numerics: a row's result does not depend on how many rows go through the model with it, to the bit.

Three things do otherwise. A matrix product of few rows sums in another order than one of many; the compiled experts do so for up to eight
rows; and PyTorch's element-wise functions treat the last few numbers of a tensor by other code than the rest. The differences are those of
rounding, but greedy decoding turns a tie into another text. Inside `steady` each of these is done on `TILE` rows at a time, the last ones
filled up with zeros. Attention over the paged store is steady by itself where it is compiled, and otherwise goes by
`anabranch.serving.engine.steady_attention`.
"""
# Shapes: N rows, D width

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anabranch.nn.pool import ExpertPool

# Rows: with it a tensor of any width is a whole number of vectors.
TILE = 32

_FIRST = {  # functions of rows, and of other things that all rows share
    F.linear,
    torch.sigmoid,
    Tensor.sigmoid,
    F.sigmoid,
    F.silu,
    torch.tanh,
    Tensor.tanh,
    F.gelu,
    F.softplus,
    torch.exp,
    Tensor.exp,
    torch.log,
    Tensor.log,
}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_CELLS = {torch.gru_cell, torch.lstm_cell, torch.rnn_tanh_cell}


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Compute steadily in this thread, with the experts of ``model``."""
    pools = [module for module in model.modules() if isinstance(module, ExpertPool)]
    before = [pool.backend for pool in pools]
    try:
        for pool in pools:
            # A product per expert, which is then made of tiles.
            pool.backend = "reference"
        with _Tiled():
            yield
    finally:
        for pool, backend in zip(pools, before, strict=True):
            pool.backend = backend


class _Tiled(TorchFunctionMode):
    """Takes the functions whose results depend on how many rows there are."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = _in_order(func, args, dict(kwargs or {}))
        if func in _FIRST or (func in _PRODUCTS and args[1].dim() == 2):
            if args[0].dim() > 1:
                flat_ND = args[0].reshape(-1, args[0].shape[-1])
                y_ND = _by_tiles(lambda x_ND: func(x_ND, *args[1:], **kwargs), [flat_ND])
                return y_ND.reshape(*args[0].shape[:-1], y_ND.shape[-1])
        elif func in _CELLS:
            state = [args[1]] if isinstance(args[1], Tensor) else [*args[1]]

            def cell(x_ND: Tensor, *state: Tensor) -> Any:
                return func(x_ND, state[0] if isinstance(args[1], Tensor) else state, *args[2:], **kwargs)

            return _by_tiles(cell, [args[0], *state])
        elif func is torch.einsum and args[0] == "nkd,nk->nd":
            # The sum over an item's places.
            return _by_tiles(lambda *rows: func(args[0], *rows), args[1:])
        elif func is torch.einsum and len(args) == 3 and _has_rows(args[0]):
            return _product(lambda x: func(args[0], x, args[2]), args[1], args[0].index("l"))
        return func(*args, **kwargs)


def _in_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call whose first arguments, by which rows are told, stand at their places however they were given."""
    names = ("input", "hx") if func in _CELLS else ("input", "other" if func is not torch.mm else "mat2")
    for name in names[len(args) :] if func in _FIRST or func in _PRODUCTS or func in _CELLS else ():
        if name not in kwargs:
            break
        args = (*args, kwargs.pop(name))
    return args, kwargs


def _has_rows(equation: str) -> bool:
    """Whether a product of two has rows, of the letter l, in its first operand and at the same place of what it makes."""
    first, second, made = equation.replace("->", ",").split(",")
    return "l" in first and "l" not in second and first.index("l") == made.find("l")


def _product(func: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    """``func`` of a tensor with rows in ``dim``, which stay there, TILE rows at a time."""
    y = _by_tiles(lambda rows: func(rows.movedim(0, dim).contiguous()).movedim(dim, 0), [x.movedim(dim, 0)])
    return y.movedim(0, dim)


def _by_tiles(func: Callable[..., Any], rows: Sequence[Tensor]) -> Any:
    """``func`` of tensors of N rows each, TILE rows at a time."""
    num_rows = len(rows[0])
    if not num_rows:
        return func(*rows)
    parts = [func(*(_tile(part, start) for part in rows)) for start in range(0, num_rows, TILE)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[:num_rows]
    return tuple(torch.cat(each)[:num_rows] for each in zip(*parts, strict=True))


def _tile(rows: Tensor, start: int) -> Tensor:
    tile = rows[start : start + TILE]
    if len(tile) == TILE:
        # Half of a wider tensor is not, and its rows would each be vectors with a rest.
        return tile.contiguous()
    return torch.cat((tile, tile.new_zeros(TILE - len(tile), *tile.shape[1:])))
