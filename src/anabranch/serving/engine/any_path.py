"""`AnyPath`: steps of requests that run blocks in an order of their own, side by side, and of one whose order is being chosen."""
# Shapes: T tokens of a step, R rows of it, D width

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.module_paths import ModulePaths
from anabranch.serving.engine.stores import Stores
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.engine.ways import Ways
from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.fast.paths import CompiledPaths, CompiledStep, Visits, schedule_of

__all__ = ["AnyPath", "RunBlock"]

# What runs a block once more: (layer, what goes in, rows) to what comes out.
RunBlock = Callable[[int, Tensor, Sequence[int]], Tensor]

# The pass of requests that run side by side, whatever their paths.
_ANY_PATH = "any path"


class AnyPath:
    """Runs steps over any blocks, where a model's blocks can be told apart; where they cannot, requests of different paths take turns.

    Args:
        num_blocks: of the model.
        fast: its compiled form; None where there is none, or its blocks run together.
        modules: the same by modules.
        stores: keys and values, and where each visit's are.
        requests: that the runner has.
        ways: how they run the model.
    """

    def __init__(
        self,
        num_blocks: int,
        fast: FastDecoder | None,
        modules: ModulePaths | None,
        stores: Stores,
        requests: UnderWay,
        ways: Ways,
    ) -> None:
        self.num_blocks = num_blocks
        self._requests, self._ways = requests, ways
        self._fast = fast if fast is not None and CompiledPaths.supports(fast) else None
        # Where layers of several kinds keep keys and values apart, the visits of each kind are counted by themselves.
        self._modules = modules if len(stores.kinds) == 1 else None
        self._pool, self._stores = stores.pools[0], stores
        self._visits = lru_cache(maxsize=256)(self._made_visits)

    @cached_property
    def _paths(self) -> CompiledPaths:
        assert self._fast is not None, "who asks has asked `takes`"
        return CompiledPaths(self._fast, self._pool.key[:, 0], self._pool.value[:, 0])

    def takes(self, *, is_compiled: bool) -> bool:
        """Whether requests of different paths run together: by the compiled step, or by modules."""
        return (self._fast if is_compiled else self._modules) is not None

    def takes_request(self, chunk: Chunk) -> bool:
        """Whether a request runs beside others with other blocks."""
        adapters, ways = self._requests.adapters, self._ways
        if chunk.id in self._requests.recorded or (adapters is not None and adapters.is_of(chunk.id)):
            return False
        variant = ways.of(chunk)
        if variant.chooser is not None or variant.is_pruned or ways.watch.is_watched:
            return False
        return self.takes(is_compiled=ways.compiled() is not None)

    def pass_of(self, chunks: Sequence[Chunk]) -> Callable[[Chunk], Hashable]:
        """What chunks go through the model together by: how they run it, or only that their paths do not matter."""
        if all(self._ways.of(chunk).path is None for chunk in chunks):
            return self._ways.of
        return lambda chunk: _ANY_PATH if self.takes_request(chunk) else self._ways.of(chunk)

    def paths(self, chunks: Sequence[Chunk]) -> list[tuple[int, ...] | None] | None:
        """Those of chunks of one pass, None for all blocks; None where they do not run side by side, or all run all blocks."""
        if not all(map(self.takes_request, chunks)):
            return None
        found = [self._ways.of(chunk).path for chunk in chunks]
        return found if any(path is not None for path in found) else None

    def hidden(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        paths: Sequence[tuple[int, ...] | None],
    ) -> Tensor:
        """x_RD of ``rows``, after the last norm: each chunk along its path (None: all blocks); those that share a block run it together."""
        visits_N = tuple(self._visits(path) for path in paths)
        if self._ways.compiled() is None:
            assert self._modules is not None, "who asks has asked `takes`"
            return self._modules.hidden(chunks, tokens, rows, visits_N)
        step = self._begin(chunks, tokens)
        for visits, numbers in schedule_of(visits_N):
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
        """The same of one chunk, compiled, along the path that ``choose(x_1TD, run)`` takes, which calls ``run`` for each block that is to
        run."""
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
