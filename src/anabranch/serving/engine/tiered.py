"""The place behind the device's key-value blocks: host memory, then a file, with whole blocks in one piece each.

A block is scattered over layers in the pool, ``[layers, P, S, G, D]``. Saving gathers blocks into one contiguous buffer with one
operation per side (keys, values) and writes that; reloading reads one contiguous piece and scatters it into its pages. Copying
page by page instead is 7 to 10 times slower in the paper, since every page is a small transfer of its own.

`TieredPool` is a `PagedPool` whose swap slots are logical: the ``host_blocks`` most recently used ones are in memory, the others in a file.
"""
# Shapes: L layers, P streams, G key-value heads, D head width, N blocks, S tokens per block

import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import CapacityError, InputError
from anabranch.files import is_full
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.offload import LruTier
from anabranch.serving.engine.paged import PagedPool, PagedShape, Pairs
from anabranch.sizes import parse_bytes


class TieredPool(PagedPool):
    """A pool that swaps to host memory and from there to disk.

    Args:
        shape, num_blocks: see `PagedPool`.
        host_blocks: blocks kept in host memory.
        disk_blocks: blocks kept in a file besides.
        folder: where the file is made; it has no name and goes with the process. None for the system's place.
        options: of `PagedPool`.
    """

    def __init__(
        self,
        shape: PagedShape,
        num_blocks: int,
        *,
        host_blocks: int,
        disk_blocks: int = 0,
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(shape, num_blocks, host_blocks=host_blocks, **options)
        if host_blocks < 1:
            raise InputError(f"host_blocks is {host_blocks}; it must be at least 1, as blocks pass through host memory")
        self.num_slots = host_blocks + disk_blocks
        block = (2, shape.layers, shape.streams, self.block_tokens, shape.heads, shape.width)
        pinned = self.device.type == "cuda"
        self._memory = torch.empty((host_blocks, *block), dtype=shape.dtype, pin_memory=pinned)
        # Slot -> place in memory, the least recently used first.
        self._places: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(host_blocks - 1, -1, -1))
        self._file = _BlockFile(self._memory[0].nbytes, folder) if disk_blocks else None
        self._on_disk: set[int] = set()
        self.spilled = self.fetched = 0

    def swap_out(self, pairs: Pairs) -> None:
        """Save blocks: (block, slot). As many at once as host memory holds."""
        for some in _portions(pairs, self.host_blocks):
            places = [self._place(slot, keep=[slot for _, slot in some]) for _, slot in some]
            self._memory[places] = self._gather([block for block, _ in some]).to(self._memory.device)
            # What the file has of them is old.
            self._on_disk.difference_update(slot for _, slot in some)

    def swap_in(self, pairs: Pairs) -> None:
        """Bring blocks back: (slot, block). One contiguous piece, then scattered to its pages."""
        for some in _portions(pairs, self.host_blocks):
            places = [self._fetch(slot, keep=[slot for slot, _ in some]) for slot, _ in some]
            piece = self._memory[places]
            self._scatter(piece.to(self.device, non_blocking=True), [block for _, block in some])

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()

    def _gather(self, blocks: Sequence[int]) -> Tensor:
        """piece_N2LPSGD: blocks in one piece each."""
        index = torch.tensor(blocks, device=self.device)
        parts = [part.index_select(2, index) for part in self._blocks()]  # [L, P, N, S, G, D]
        return torch.stack(parts).permute(3, 0, 1, 2, 4, 5, 6)

    def _scatter(self, piece_N2LPSGD: Tensor, blocks: Sequence[int]) -> None:
        index = torch.tensor(blocks, device=self.device)
        for part, new in zip(self._blocks(), piece_N2LPSGD.permute(1, 2, 3, 0, 4, 5, 6), strict=True):
            part.index_copy_(2, index, new)

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise InputError(f"slot {slot} is outside the tier's {self.num_slots}")

    def _place(self, slot: int, keep: Sequence[int]) -> int:
        """A place in memory for ``slot``, from the least recently used one that is not to be kept."""
        self._check(slot)
        if slot in self._places:
            self._places.move_to_end(slot)
            return self._places[slot]
        if not self._free:
            oldest = next(other for other in self._places if other not in keep)
            self._spill(oldest)
        place = self._places[slot] = self._free.pop()
        return place

    def _spill(self, slot: int) -> None:
        """Move a slot's block from memory to the file, unless it is there as well."""
        place = self._places.pop(slot)
        self._free.append(place)
        if slot in self._on_disk:
            return
        if self._file is None:
            raise CapacityError(
                f"{self.host_blocks} host blocks are full and there is no disk behind them; set disk_blocks"
            )
        self._file.write(slot, self._memory[place])
        self._on_disk.add(slot)
        self.spilled += 1

    def _fetch(self, slot: int, keep: Sequence[int]) -> int:
        """The place in memory of ``slot``, read from the file if need be."""
        if slot in self._places or slot not in self._on_disk:
            self._check(slot)
            if slot not in self._places:
                raise InputError(f"slot {slot} was never saved")
            self._places.move_to_end(slot)
            return self._places[slot]
        place = self._place(slot, keep)
        assert self._file is not None
        self._file.read(slot, self._memory[place])
        self.fetched += 1
        return place


def second_place(shape: PagedShape, config: ServingConfig, device: torch.device) -> tuple[TieredPool, LruTier]:
    """The pool and the policy that ``config.host_kv`` and ``config.disk_kv`` mean.

    Raises CapacityError if not even one block fits where it is to go.
    """
    assert config.host_kv is not None
    host, disk = (
        0 if size is None else shape.blocks_in(parse_bytes(size, name), config.block_tokens)
        for name, size in (("host_kv", config.host_kv), ("disk_kv", config.disk_kv))
    )
    num_blocks = config.blocks_for(shape.bytes_per_token)
    pool = TieredPool(
        shape, num_blocks, host_blocks=host, disk_blocks=disk, block_tokens=config.block_tokens, device=device
    )
    return pool, LruTier(pool.num_slots)


class _BlockFile:
    """A file without a name, a block per slot; gone with this object."""

    def __init__(self, block_bytes: int, folder: str | Path | None) -> None:
        self.block_bytes = block_bytes
        self.handle, path = tempfile.mkstemp(prefix="anabranch-kv-", dir=folder)
        os.unlink(path)
        self.close = weakref.finalize(self, os.close, self.handle)

    def write(self, slot: int, block: Tensor) -> None:
        try:
            os.pwrite(self.handle, _bytes(block), slot * self.block_bytes)
        except OSError as error:
            if not is_full(error):
                raise
            raise CapacityError(
                "no room left on disk for keys and values; use fewer disk_blocks or another folder"
            ) from error

    def read(self, slot: int, block: Tensor) -> None:
        view = _bytes(block)
        count = os.preadv(self.handle, [view], slot * self.block_bytes)
        if count != self.block_bytes:
            raise CapacityError(f"the file of keys and values gave {count} of {self.block_bytes} bytes of slot {slot}")


def _bytes(block: Tensor) -> memoryview:
    """A contiguous block's memory."""
    raw: Any = block.view(torch.uint8).reshape(-1).numpy()
    return memoryview(raw)


def _portions(pairs: Pairs, size: int) -> list[Pairs]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
