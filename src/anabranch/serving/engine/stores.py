"""`Stores`: the memory of keys and values of each kind of a model's layers, and one step's view of all of it."""
# Shapes: P streams, G key-value heads, D head width, M prefix entries

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.cut import Cut, Told
from anabranch.serving.engine.cut_store import CutStore
from anabranch.serving.engine.kinds import Kinds, LayerKind
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import PagedPool, PagedStore, StoreByKind, ToldSlot, VisitSlots

__all__ = ["Stores", "check_visits"]


class Stores:
    """The pools of one model.

    Args:
        kinds: of its layers; the second one's blocks are `Chunk.local`.
        pools: the memory of each.
        use_kernel, is_steady: see `PagedStore`.
        cut: the ranks that hold a share of the blocks each; None for this process alone.
    """

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        pools: Sequence[PagedPool],
        *,
        use_kernel: bool = True,
        is_steady: bool = False,
        cut: Cut | None = None,
    ) -> None:
        self.cut = cut
        self.kinds, self.pools = kinds, pools
        self._options: Any = {"use_kernel": use_kernel, "is_steady": is_steady}
        self._kind_of = {layer: place for place, kind in enumerate(kinds) for layer in kind.layers}
        # Layers whose attention runs more than once in a pass of their own take what room there is behind the others.
        self._usual = [
            VisitSlots(pool.shape.layers, kind.layers) for kind, pool in zip(self.kinds, self.pools, strict=True)
        ]

    @classmethod
    def made(
        cls,
        kinds: Kinds,
        num_blocks: int,
        *,
        block_tokens: int,
        device: torch.device,
        host_blocks: int = 0,
        pool: PagedPool | None = None,
        use_kernel: bool = True,
        is_steady: bool = False,
        cut: Cut | None = None,
    ) -> "Stores":
        """New memory for a model's layers, see `PagedPool`; that of the first kind may have been made elsewhere (``pool``).

        With a ``cut`` there is this rank's share of it, and one block more, which no scheduler knows.
        """
        first, *others = [kind.shape for kind in kinds.kinds]
        count = kinds.second_blocks(num_blocks) or 0
        if cut is not None:
            num_blocks, count = cut.own(num_blocks) + 1, cut.own(count) + 1
        if pool is None:
            pool = PagedPool(first, num_blocks, block_tokens=block_tokens, device=device, host_blocks=host_blocks)
        local = [PagedPool(shape, count, block_tokens=block_tokens, device=device) for shape in others]
        return cls(kinds.kinds, [pool, *local], use_kernel=use_kernel, is_steady=is_steady, cut=cut)

    @property
    def num_tokens(self) -> int:
        """Positions that each pool has room for."""
        return min(pool.num_blocks * pool.block_tokens for pool in self.pools)

    def passing(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]
    ) -> AbstractContextManager[None]:
        """A pass of these: over ranks all of them run it."""
        return nullcontext() if self.cut is None else self.cut.passing(Told(chunks, tokens, rows))

    def view(
        self,
        layout: StepLayout,
        chunks: Sequence[Chunk],
        prefix: Sequence[tuple[Tensor, Tensor]],
        path: Sequence[int] | None,
        *,
        is_open: bool = False,
        told: ToldSlot | None = None,
    ) -> PagedStore | CutStore | StoreByKind:
        """What the layers of one step attend through.

        Args:
            layout: that of its first kind.
            chunks: of the step.
            prefix: in front of all sequences.
            path: of the chunks; None for the usual.
            is_open: the step finds their path.
            told: says where each visit is, of a model with one kind of layers.
        """
        stores: list[PagedStore | CutStore] = []
        for place, (kind, pool) in enumerate(zip(self.kinds, self.pools, strict=True)):
            own = layout if place == 0 else StepLayout(chunks, pool.block_tokens, layout.device, is_local=True)
            visits: VisitSlots | ToldSlot = self._usual[place]
            if told is not None:
                visits = told
            elif is_open:
                visits = VisitSlots(pool.shape.layers, kind.layers, is_open=True)
            elif path is not None:
                visits = self.visits(path, place)
            if self.cut is not None:
                stores.append(CutStore(pool, own, self.cut, visits))
            else:
                stores.append(PagedStore(pool, own, prefix, visits=visits, **self._options))
        return stores[0] if len(stores) == 1 else StoreByKind(stores, self._kind_of)

    def of_pool(self, pool: PagedPool) -> "Stores":
        """The same in other memory, of a model with one kind of layers."""
        return Stores(self.kinds, [pool], **self._options)

    def visits(self, path: Sequence[int], place: int = 0) -> VisitSlots:
        """Where visits along ``path`` of the layers of one kind are kept."""
        kind = self.kinds[place]
        own = [layer for layer in path if layer in kind.layers]
        return VisitSlots(self.pools[place].shape.layers, kind.layers, own)

    def open_visits(self) -> VisitSlots:
        """Where visits of layers of the first kind are kept along a path that is being found."""
        return VisitSlots(self.pools[0].shape.layers, self.kinds[0].layers, is_open=True)

    def check_path(self, path: Sequence[int]) -> None:
        """Raise ConfigError for a path with more visits of layers than there is room for."""
        for kind, pool, slots in zip(self.kinds, self.pools, self._usual, strict=True):
            visits, depth = slots.per_pass, pool.shape.layers
            needed = sum(visits[layer] for layer in path if layer in kind.layers)
            check_visits(needed, depth, is_of_kind=len(self.kinds) > 1)

    @contextmanager
    def lent(self, chunk: Chunk, id: str) -> Iterator[Chunk]:
        """A token of ``id`` in the last block of ``chunk``, which is as it was afterwards."""
        if self.cut is not None:
            # The block that nobody else has, as others would have to save theirs too.
            spare = [(pool.num_blocks - 1) * self.cut.world for pool in self.pools]
            yield Chunk(id=id, tokens=(0,), start=0, blocks=(spare[0],), local=tuple(spare[1:]), samples=True)
            return
        blocks = [table[-1] for table in (chunk.blocks, chunk.local)[: len(self.pools)]]
        parts = [
            part.unflatten(2, (-1, pool.block_tokens))[:, :, block]
            for pool, block in zip(self.pools, blocks, strict=True)
            for part in (pool.key, pool.value)
        ]
        saved = [part.clone() for part in parts]
        try:
            yield Chunk(id=id, tokens=(0,), start=0, blocks=(blocks[0],), local=tuple(blocks[1:]), samples=True)
        finally:
            for part, before in zip(parts, saved, strict=True):
                part.copy_(before)


def check_visits(needed: int, depth: int, *, is_of_kind: bool = False) -> None:
    """Raise ConfigError for a path with more visits of blocks than the ``depth`` of which keys and values are kept.

    ``is_of_kind``: these are of blocks that see equally far back, and there are others.
    """
    if needed > depth:
        raise ConfigError(
            f"path has {needed} visits of blocks{' that see equally far back' if is_of_kind else ''}; the engine keeps keys and values of "
            f"{depth} (engine.max_depth)"
        )
