"""What each row of a batch is told, in passes of a model that others call: through a cache, whose rows leave and repeat."""
# Shapes: B rows

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anabranch.errors import InputError

__all__ = ["telling"]


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

    block = _Block()

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token_BL = args[0] if args else kwargs["token_BL"]
        batch, length = token_BL.shape
        cache = kwargs.get("cache")
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
        kwargs["state"] = {**(kwargs.get("state") or {}), **state(own_B.to(token_BL.device), length)}
        return args, kwargs

    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Block:
    """Stands for one use of `telling`, as long as it lasts."""


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
