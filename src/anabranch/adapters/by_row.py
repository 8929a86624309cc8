"""What each row of a batch is told, in passes of a model that others call: through a cache, whose rows leave and repeat.

`telling` reaches whoever calls the model. Who makes a pass of its parts (`Decoder.context`, `Decoder.hidden`) knows its rows, and asks what
these are told: `told_rows`.
"""
# Shapes: B rows

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anabranch.adapters.beside import Told, told
from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder

__all__ = ["check_told", "telling", "told_keys", "told_rows"]


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
        model: a `Decoder`; or any module with layers beside its matrices (`anabranch.adapters.beside`), whose cache keeps rows where they
            are.
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

    if not isinstance(model, Decoder):

        def of_rows(batch: int, length: int, device: torch.device) -> dict[str, Any]:
            own_B = value_B.expand(batch, *value_B.shape[1:]) if for_all else _spread(value_B, batch, what)
            return state(own_B.to(device), length)

        with told(Told(model, of_rows, for_all)):
            yield
        return

    block = _Block(of_pass, what, value_B, state)

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


def told_rows(model: nn.Module, rows: Sequence[int], length: int) -> dict[str, Any]:
    """The ``state`` of a pass of L positions by the blocks of `telling` that it is made in; empty outside of any.

    Args:
        model: whose pass it is.
        rows: of each row of the pass, which of those that were told something it is; of a block that tells all the same, no matter which.
        length: L.
    """
    told: dict[str, Any] = {}
    for block in _BLOCKS.get(model, ()):
        value_B = block.value_B
        own_B = value_B.expand(len(rows), *value_B.shape[1:]) if block.count == 1 else value_B[torch.tensor(rows)]
        told |= block.state(own_B.to(next(model.parameters()).device), length)
    return told


def told_keys(model: nn.Module, count: int) -> list[Hashable]:
    """Of each of ``count`` rows a key; rows that are told the same have equal ones."""
    blocks = [block for block in _BLOCKS.get(model, ()) if block.count > 1]
    return [tuple(tuple(block.value_B[row].flatten().tolist()) for block in blocks) for row in range(count)]


def check_told(model: nn.Module, count: int, who: str) -> None:
    """Raise ConfigError where rows are told so many things that nobody knows which are of the ``count`` texts of ``who``."""
    for block in _BLOCKS.get(model, ()):
        if block.count not in (1, count):
            raise ConfigError(
                f"{block.count} {block.what} are told to the rows of the model, and {who} has {count} texts; "
                "tell one for each, or one for all"
            )


@dataclass(frozen=True, eq=False)
class _Block:
    """One use of `telling`, as long as it lasts: the state of a pass, what is told, and its arguments."""

    of_pass: Callable[["_Block", Tensor, Any], dict[str, Any]]
    what: str
    value_B: Tensor
    state: Callable[[Tensor, int], dict[str, Any]]

    @property
    def count(self) -> int:
        """Of the values; one is for all."""
        return len(self.value_B)


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
