"""What each row of a batch is told, in passes of a model that others call: through a cache, whose rows leave and repeat.

`telling` reaches whoever calls the model. Who makes a pass of its parts (`Decoder.context`, `Decoder.hidden`) asks for `told_state`.
"""
# Shapes: B rows

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError, InputError

__all__ = ["check_one_told", "telling", "told_state"]


@contextmanager
def telling(
    model: nn.Module,
    name: str,
    value_B: Tensor,
    state: Callable[[Tensor, int], dict[str, Any]],
    *,
    what: str,
    for_all: bool = False,
) -> Iterator[None]:
    """Every pass of ``model`` in this block has ``state(values of its rows, length)``.

    Args:
        model: a `Decoder`.
        name: under which a cache knows of its rows.
        value_B: ``[B, ...]``, of each row. Rows that leave a batch (a sequence that stopped), or are repeated in it (beams), keep theirs:
            a cache knows them, from the block's first pass with it on. Without a cache, and in that pass, a batch may have each row several
            times in a row. What another block told a cache is nothing to this one.
        state: of a pass, from the values ``[rows, ...]`` and L.
        what: the values are, for messages.
        for_all: there is one, for all rows of any batch.

    Raises InputError in a pass whose rows are neither these nor a multiple of them.
    """

    def of_pass(block: "_Block", token_BL: Tensor, cache: Any) -> dict[str, Any]:
        batch, length = token_BL.shape
        if for_all:
            own_B = value_B.expand(batch, *value_B.shape[1:])
        elif cache is None:
            own_B = _spread(value_B, batch, what)
        else:
            # With the cache, which knows which of its rows left, or were repeated. An empty one may take another batch than before.
            rows = cache.state.setdefault(name, _Rows())
            if cache.length == 0 or block not in rows.of:
                rows.of[block] = _spread(value_B, batch, what)
            own_B = rows.of[block]
        return state(own_B.to(token_BL.device), length)

    block = _Block(of_pass, what, 1 if for_all else len(value_B))

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token_BL = args[0] if args else kwargs["token_BL"]
        kwargs["state"] = {**(kwargs.get("state") or {}), **block.of_pass(block, token_BL, kwargs.get("cache"))}
        return args, kwargs

    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    blocks = _BLOCKS.setdefault(model, [])
    blocks.append(block)
    try:
        yield
    finally:
        blocks.remove(block)
        handle.remove()


def told_state(model: nn.Module, token_BL: Tensor, cache: Any = None) -> dict[str, Any]:
    """The ``state`` that a pass of the model would have by the blocks of `telling` that it is made in; empty outside of any.

    Raises InputError as `telling`.
    """
    told: dict[str, Any] = {}
    for block in _BLOCKS.get(model, ()):
        told |= block.of_pass(block, token_BL, cache)
    return told


def check_one_told(model: nn.Module, who: str) -> None:
    """Raise ConfigError where rows are told different things, for ``who`` makes passes whose rows are its own."""
    for block in _BLOCKS.get(model, ()):
        if block.count != 1:
            raise ConfigError(
                f"{block.count} {block.what} are told to the rows of the model, and {who} has passes of other rows; tell one at a time"
            )


@dataclass(frozen=True, eq=False)
class _Block:
    """One use of `telling`, as long as it lasts: the state of a pass, what is told, and how many of it."""

    of_pass: Callable[["_Block", Tensor, Any], dict[str, Any]]
    what: str
    count: int


# Of each model, outermost first.
_BLOCKS: WeakKeyDictionary[nn.Module, list[_Block]] = WeakKeyDictionary()


class _Rows:
    """The values of the rows of a cache, of each block that it is used in. What a block told goes when the block ends."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[_Block, Tensor] = WeakKeyDictionary()

    def keep_rows(self, row_B: Tensor) -> None:
        """As the cache's."""
        for block, value_B in self.of.items():
            self.of[block] = value_B[row_B.to(value_B.device)]


def _spread(value_B: Tensor, batch: int, what: str) -> Tensor:
    """The values for a batch that has each row once, or each equally often in a row."""
    times, rest = divmod(batch, len(value_B)) if len(value_B) else (0, batch)
    if rest or not times:
        raise InputError(f"a pass has {batch} rows, and {len(value_B)} {what} are told; tell one for each row")
    return torch.repeat_interleave(value_B, times, 0)
