"""`AnyPath`: the compiled step for requests that run blocks in an order of their own, side by side, and for one whose order is being chosen."""
# Shapes: T tokens of a step, R rows of it, D width

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import PagedPool
from anabranch.serving.engine.stores import Stores
from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.fast.paths import CompiledPaths, CompiledStep, Visits, schedule_of

__all__ = ["AnyPath"]

# What runs a block once more: (layer, what goes in, rows) to what comes out.
RunBlock = Callable[[int, Tensor, Sequence[int]], Tensor]


class AnyPath:
    """Runs steps over any blocks, of a model whose compiled blocks can be told apart.

    Args:
        fast: the compiled model.
        pool: keys and values.
        stores: which says where each visit's are.
    """

    def __init__(self, fast: FastDecoder, pool: PagedPool, stores: Stores) -> None:
        self._fast, self._pool, self._stores = fast, pool, stores
        self.num_blocks = len(fast.model.blocks)
        self._visits = lru_cache(maxsize=256)(self._made_visits)

    @cached_property
    def _paths(self) -> CompiledPaths:
        return CompiledPaths(self._fast, self._pool.key[:, 0], self._pool.value[:, 0])

    def hidden(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        paths: Sequence[tuple[int, ...] | None],
    ) -> Tensor:
        """x_RD of ``rows``, after the last norm: each chunk along its path (None: all blocks); those that share a block run it together."""
        step = self._begin(chunks, tokens)
        for visits, numbers in schedule_of(tuple(self._visits(path) for path in paths)):
            step.run(visits, numbers)
        x_TD = step.normed()
        return x_TD if list(rows) == list(range(len(tokens))) else x_TD[list(rows)]

    def chosen(
        self,
        chunk: Chunk,
        tokens: Sequence[int],
        rows: Sequence[int],
        choose: Callable[[Tensor, RunBlock], object],
    ) -> Tensor:
        """The same of one chunk along the path that ``choose(x_1TD, run)`` takes, which calls ``run`` for each block that is to run."""
        step, slots, seen = self._begin([chunk], tokens), self._stores.open_visits(), Counter[int]()

        def run(layer: int, _x_1TD: Tensor, _rows: Sequence[int]) -> Tensor:
            step.run(((layer, slots.of(layer, seen[layer])),))
            seen[layer] += 1
            return step.x_TD[None]

        choose(step.x_TD[None], run)
        return step.normed()[list(rows)]

    def _begin(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> CompiledStep:
        layout = StepLayout(chunks, self._pool.block_tokens)
        token_T, position_T = torch.tensor(tokens, dtype=torch.int64), torch.from_numpy(layout.position_T)
        return self._paths.begin(token_T, position_T, layout.sequence_N4, layout.table_U)

    def _made_visits(self, path: tuple[int, ...] | None) -> Visits:
        """The blocks of a path, and where keys and values of each visit are kept."""
        path = tuple(range(self.num_blocks)) if path is None else path
        slots, seen, made = self._stores.visits(path), Counter[int](), []
        for layer in path:
            made.append((layer, slots.of(layer, seen[layer])))
            seen[layer] += 1
        return tuple(made)
