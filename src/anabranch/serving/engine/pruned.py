"""`PrunedPasses`: steps of requests whose blocks pass over tokens: each block runs its own rows, and stores them one behind the other.

A block that keeps fewer tokens than there are has them in the first places of the request's blocks of memory, in order; so what it attends
to is a sequence without gaps, to any kernel, and positions are in queries and keys already. A window is counted in positions, which layers
that have one are told.

A block that keeps keys and values of all tokens has them at their own places; those of tokens that it passes over are made and stored
first. Then what it computes are runs of tokens that follow each other, each a sequence of its own in the same blocks of memory, behind all
that stands before it.
"""
# Shapes: T tokens of a step, R rows of it that a block computes, I blocks, N tokens of a prompt, D width, G key heads, S keys

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.context import ForwardContext
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import PagedPool, ToldSlot
from anabranch.serving.engine.skips import Choosing, Kept
from anabranch.serving.engine.stores import Stores
from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.fast.paths import CompiledPaths, CompiledStep

__all__ = ["Ahead", "PrunedPasses"]


class ContextOf(Protocol):
    """What the runner tells a pass through the modules."""

    def __call__(
        self, layout: StepLayout, token_1T: Tensor, chunks: Sequence[Chunk], told: ToldSlot, stores: Stores, /
    ) -> ForwardContext:
        """The context of these chunks, which keep keys and values in ``stores``."""


@dataclass(frozen=True)
class _Part:
    """The rows of a step that one block computes.

    Attributes:
        row_R: which; None for all.
        chunks: those with rows among them, with as many tokens, once for each run of rows where the block stores all; which ones, nobody
            asks.
        layout: where they stand, and what is stored before them.
    """

    row_R: NDArray[np.int64] | None
    chunks: list[Chunk]
    layout: StepLayout


@dataclass(frozen=True)
class Ahead:
    """A whole prompt that ran before its first piece was due.

    Attributes:
        kept: what blocks computed.
        pool: keys and values, from the first slot on.
        x_ND: after the last norm.
    """

    kept: Kept
    pool: PagedPool
    x_ND: Tensor


class _Looked(Exception):  # noqa: N818
    """Ends a block when its queries, keys and values are known; ``looks`` is how queries and keys meet."""

    def __init__(self, query_1HRD: Tensor, key_1GRD: Tensor, value_1GRD: Tensor, looks: Any) -> None:
        super().__init__("queries, keys and values")
        self.query_1HRD, self.key_1GRD, self.value_1GRD, self.looks = query_1HRD, key_1GRD, value_1GRD, looks


class PrunedPasses:
    """Runs them, by the compiled step where its blocks can be told apart, else by modules.

    Args:
        model: of plain blocks and one stream.
        fast: its compiled form; None for none.
        pool: keys and values.
        stores: the same.
        context_of: see `ContextOf`.
        running: how a pass of such chunks through the modules runs, given its context.
    """

    def __init__(
        self,
        model: Decoder,
        fast: FastDecoder | None,
        pool: PagedPool,
        stores: Stores,
        context_of: ContextOf,
        running: Callable[[Sequence[Chunk], ForwardContext], AbstractContextManager[None]],
    ) -> None:
        self.model, self.pool, self.stores = model, pool, stores
        self._fast = fast if fast is not None and CompiledPaths.supports(fast) else None
        self._paths = None if self._fast is None else CompiledPaths(self._fast, pool.key[:, 0], pool.value[:, 0])
        self.context_of, self.running = context_of, running
        self._has_window = [
            getattr(model.config.attention_of(layer), "window", None) is not None for layer in range(len(model.blocks))
        ]

    def hidden(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        kept: Sequence[Kept],
        *,
        is_compiled: bool,
    ) -> Tensor:
        """x_RD of ``rows``, after the last norm, of chunks that are decided about."""
        step = self._begin(chunks, tokens, self.pool, self.stores, self._paths, is_compiled)
        if isinstance(step, _Compiled) and all(
            chunk.start >= one.num_prompt for chunk, one in zip(chunks, kept, strict=True)
        ):
            step.run_behind(chunks, kept)
        else:
            for layer in range(len(self.model.blocks)):
                if (passed := self._passed(layer, chunks, kept)) is not None:
                    step.modules.keep(layer, step.rows_of(passed), passed)
                step.run(layer, self._part(layer, chunks, kept))
        return step.normed(rows)

    def chosen(
        self, chunk: Chunk, tokens: Sequence[int], rows: Sequence[int], choosing: Choosing, *, is_compiled: bool
    ) -> tuple[Tensor, Kept]:
        """The same of a whole prompt, which is decided about on the way; and what was decided."""
        step = self._begin([chunk], tokens, self.pool, self.stores, self._paths, is_compiled)
        kept = self._choose(step, chunk, choosing)
        return step.normed(rows), kept

    def ahead(self, chunk: Chunk, choosing: Choosing, *, is_compiled: bool) -> Ahead:
        """Run the whole prompt that is ``chunk``, into memory of its own."""
        size = self.pool.block_tokens
        blocks = tuple(range(-(-len(chunk.tokens) // size)))
        # Of each block once: what paths visit beside them is not theirs.
        shape = replace(self.pool.shape, layers=len(self.model.blocks))
        pool = PagedPool(shape, len(blocks), block_tokens=size, device=self.pool.device)
        own, paths = replace(chunk, blocks=blocks, local=()), None
        if is_compiled and self._fast is not None:
            paths = CompiledPaths(self._fast, pool.key[:, 0], pool.value[:, 0])
        step = self._begin([own], own.tokens, pool, self.stores.of_pool(pool), paths, is_compiled)
        kept = self._choose(step, own, choosing)
        return Ahead(kept, pool, step.normed(range(len(own.tokens))))

    def take(self, chunk: Chunk, rows: Sequence[int], ahead: Ahead) -> Tensor:
        """x_RD of ``rows`` of a piece of a prompt that ran ahead; its keys and values are copied to where they belong."""
        end = chunk.start + len(chunk.tokens)
        slot_S = torch.from_numpy(StepLayout([chunk], self.pool.block_tokens).slots(0)).to(self.pool.device)
        for layer in range(len(self.model.blocks)):
            part = slice(ahead.kept.stored(layer, chunk.start), ahead.kept.stored(layer, end))
            for ours, theirs in ((self.pool.key, ahead.pool.key), (self.pool.value, ahead.pool.value)):
                ours[layer, 0].index_copy_(0, slot_S[part], theirs[layer, 0, part])
        row_R = torch.tensor(rows, dtype=torch.int64, device=ahead.x_ND.device)
        return ahead.x_ND[row_R + chunk.start]

    def _choose(self, step: "_Compiled | _Modules", chunk: Chunk, choosing: Choosing) -> Kept:
        """Run a whole prompt, each block on what is decided as it is come to."""

        def part_of(place_R: NDArray[np.int64], *, stores: bool, has_window: bool) -> _Part:
            # The whole prompt, so places in it are positions, and all that is stored where not all is.
            seen_NS = [place_R] if has_window and not stores else None
            return _part_of(
                [chunk], [place_R], [None if stores else 0], seen_NS, self.pool.block_tokens, self.pool.device
            )

        for layer in range(len(self.model.blocks)):
            place_R = choosing.decide(layer, step.x_1TD)
            how = {"stores": choosing.stores(layer), "has_window": self._has_window[layer]}
            passed_R, key_1GSD = choosing.passed(layer), None
            if len(passed_R):
                passed = part_of(passed_R, **how)
                key_1GSD = step.modules.keep(layer, step.rows_of(passed), passed)
            part = part_of(place_R, **how)
            # Before it runs: the compiled step works in place.
            looked = step.modules.look(layer, step.rows_of(part), part) if choosing.wants_scores(layer) else None
            step.run(layer, part)
            if looked is not None:
                choosing.looked(layer, looked.query_1HRD, looked.key_1GRD, looked.looks, key_1GSD)
        return choosing.kept()

    def _begin(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        pool: PagedPool,
        stores: Stores,
        paths: CompiledPaths | None,
        is_compiled: bool,
    ) -> "_Compiled | _Modules":
        token_1T = torch.tensor([tokens], dtype=torch.int64, device=pool.device)
        modules = _Modules(self, token_1T, stores)
        if not is_compiled or paths is None:
            return modules.begin()
        layout = StepLayout(chunks, pool.block_tokens)
        position_T = torch.from_numpy(layout.position_T)
        return _Compiled(modules, paths.begin(token_1T[0], position_T, layout.sequence_N4, layout.table_U), layout)

    def _part(self, layer: int, chunks: Sequence[Chunk], kept: Sequence[Kept]) -> _Part:
        places = [one.places(layer, chunk.start, len(chunk.tokens)) for one, chunk in zip(kept, chunks, strict=True)]
        # One skipper has decided about all of them.
        if kept[0].stores_I[layer]:
            return _part_of(chunks, places, [None] * len(chunks), None, self.pool.block_tokens, self.pool.device)
        stored = [one.stored(layer, chunk.start) for one, chunk in zip(kept, chunks, strict=True)]
        seen_NS = None
        if self._has_window[layer]:
            ends = [chunk.start + len(chunk.tokens) for chunk in chunks]
            seen_NS = [one.positions(layer, end) for one, end in zip(kept, ends, strict=True)]
        return _part_of(chunks, places, stored, seen_NS, self.pool.block_tokens, self.pool.device)

    def _passed(self, layer: int, chunks: Sequence[Chunk], kept: Sequence[Kept]) -> _Part | None:
        """The rows of which the block makes keys and values alone; None for none."""
        places = [one.passed(layer, chunk.start, len(chunk.tokens)) for one, chunk in zip(kept, chunks, strict=True)]
        if not any(map(len, places)):
            return None
        return _part_of(chunks, places, [None] * len(chunks), None, self.pool.block_tokens, self.pool.device)


def _part_of(
    chunks: Sequence[Chunk],
    places: Sequence[NDArray[np.int64]],
    stored: Sequence[int | None],
    seen_NS: Sequence[NDArray[np.int64]] | None,
    block_tokens: int,
    device: torch.device,
) -> _Part:
    """The rows at ``places`` of each chunk of a step.

    They stand behind so much that is ``stored`` of it, one behind the other; or, for None, each at its own position among all. ``seen_NS``
    are positions of what is stored of each chunk, its rows' last; None where no layer asks, or where they are places.
    """
    own, past, rows, positions, seen, first = [], [], [], [], [], 0
    for number, (chunk, place_R, before) in enumerate(zip(chunks, places, stored, strict=True)):
        for run_R in [place_R] if before is not None else _runs(place_R):
            if len(run_R):
                if seen_NS is not None:
                    seen.append(seen_NS[number])
                own.append(replace(chunk, tokens=(0,) * len(run_R)))
                past.append(chunk.start + int(run_R[0]) if before is None else before)
                rows.append(first + run_R)
                positions.append(chunk.start + run_R)
        first += len(chunk.tokens)
    row_R = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    position_R = np.concatenate(positions) if positions else np.zeros(0, np.int64)
    layout = StepLayout(
        own, block_tokens, device, stored=past, position_T=position_R, position_NS=None if seen_NS is None else seen
    )
    return _Part(None if len(row_R) == first else row_R, own, layout)


def _runs(place_R: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Ascending numbers, apart where one is left out."""
    return np.split(place_R, np.flatnonzero(np.diff(place_R) > 1) + 1)


class _Modules:
    """A step through the modules; ``x_1TD`` is what the next block gets."""

    def __init__(self, passes: PrunedPasses, token_1T: Tensor, stores: Stores) -> None:
        self._passes, self._token_1T, self._stores = passes, token_1T, stores
        self.modules = self

    def begin(self) -> "_Modules":
        """Embed its tokens."""
        self.x_1TD = self._passes.model.embed(self._token_1T)
        return self

    def rows_of(self, part: _Part) -> Tensor:
        """x_1RD of the part."""
        return _rows(self.x_1TD, part)

    def run(self, layer: int, part: _Part) -> None:
        """A block on its rows."""
        if not part.chunks:
            return
        x_1RD, told = self.rows_of(part), ToldSlot()
        told.tell(layer)
        context = self._context(part, told)
        with self._passes.running(part.chunks, context):
            x_1RD = self._passes.model.blocks[layer](x_1RD, context)
        if context.carry:
            raise ConfigError(
                f"block {layer} hands {next(iter(context.carry))!r} of its tokens on to later blocks, where other tokens are computed; "
                "such a design cannot skip tokens"
            )
        row_R = part.row_R
        at_R = None if row_R is None else torch.from_numpy(row_R).to(self.x_1TD.device)
        self.x_1TD = x_1RD if at_R is None else self.x_1TD.index_copy(1, at_R, x_1RD)

    def look(self, layer: int, x_1RD: Tensor, part: _Part) -> _Looked:
        """What a block's attention makes of its rows, which go no further into it."""
        from anabranch.depth.gathered import AttendedBy

        def stop(query: Tensor, key: Tensor, value: Tensor, weigh: Any, looks: Any) -> Tensor:
            raise _Looked(query, key, value, looks)

        context = replace(self._context(part, ToldSlot()), cache=AttendedBy(stop))
        model = self._passes.model
        try:
            with self._passes.running(part.chunks, context):
                model.blocks[layer](x_1RD.to(model.embedding.weight.dtype), context)
        except _Looked as found:
            return found
        raise ConfigError(f"block {layer} has no attention for the skipper of tokens to look at")

    def keep(self, layer: int, x_1RD: Tensor, part: _Part) -> Tensor:
        """Store keys and values of rows that a block passes over; key_1GSD, their keys."""
        found, pool = self.look(layer, x_1RD, part), self._stores.pools[0]
        for stored_SGD, made_1GSD in ((pool.key[layer, 0], found.key_1GRD), (pool.value[layer, 0], found.value_1GRD)):
            stored_SGD.index_copy_(0, part.layout.slot_T, made_1GSD[0].transpose(0, 1).to(stored_SGD.dtype))
        return found.key_1GRD

    def normed(self, rows: Sequence[int]) -> Tensor:
        """x_RD after the last norm."""
        row_R = torch.tensor(rows, dtype=torch.int64, device=self.x_1TD.device)
        return self._passes.model.norm(self.x_1TD[:, row_R])[0]

    def _context(self, part: _Part, told: ToldSlot) -> ForwardContext:
        row_R = part.row_R
        token_1R = (
            self._token_1T if row_R is None else self._token_1T[:, torch.from_numpy(row_R).to(self._token_1T.device)]
        )
        return self._passes.context_of(part.layout, token_1R, part.chunks, told, self._stores)


class _Compiled:
    """A step by the compiled blocks.

    Args:
        modules: of the same step, to look at attention.
        step: the compiled one.
        layout: of all its rows, as if all were stored.
    """

    def __init__(self, modules: _Modules, step: CompiledStep, layout: StepLayout) -> None:
        self.modules, self._step, self._layout = modules, step, layout

    @property
    def x_1TD(self) -> Tensor:
        """What the next block gets."""
        return self._step.x_TD[None]

    def rows_of(self, part: _Part) -> Tensor:
        """x_1RD of the part."""
        return _rows(self.x_1TD, part)

    def run(self, layer: int, part: _Part) -> None:
        """A block on its rows."""
        if part.chunks:
            layout = part.layout
            self._step.run_on(((layer, layer),), part.row_R, layout.sequence_N4, layout.table_U)

    def run_behind(self, chunks: Sequence[Chunk], kept: Sequence[Kept]) -> None:
        """All blocks on tokens behind their prompts, which all go through the same ones: only what is stored before them differs."""
        stored_NI = np.stack([one.stored_I(chunk.start) for one, chunk in zip(kept, chunks, strict=True)])
        for layer in kept[0].path:
            sequence_N4 = self._layout.sequence_N4.copy()
            sequence_N4[:, 2] = stored_NI[:, layer]
            self._step.run_on(((layer, layer),), None, sequence_N4, self._layout.table_U)

    def normed(self, rows: Sequence[int]) -> Tensor:
        """x_RD after the last norm."""
        x_TD = self._step.normed()
        return x_TD if list(rows) == list(range(len(x_TD))) else x_TD[list(rows)]


def _rows(x_1TD: Tensor, part: _Part) -> Tensor:
    return x_1TD if part.row_R is None else x_1TD[:, torch.from_numpy(part.row_R).to(x_1TD.device)]
