"""Tiers: where experts lie while they are not in a slot, and how one gets into it.

    MemoryTier     tensors in memory (copied into the slot)
    FileTier       an offset table into files, read into the slot by whichever thread asks, past the page cache on demand
    SourceTier     tensors read through `anabranch.lm.tensors`, for files in whatever layout and type
    IntegerTier    int8 or int4 in files as plain integers, which quantised models of schema 2 are saved as, packed into the slot
    DequantTier    int8 or int4 in memory, dequantised into the slot
    ThrottledTier  any of them, slowed down to so many seconds per byte
    CudaTier       any of them through pinned memory, copied to the device on a stream of its own

A tier is used by several threads at once. ``load`` is a generator that yields after each piece, so that who drives it may stop between.
Tiers that only copy say what and where to (`copies`), for threads that need no interpreter.
"""
# Shapes: F hidden (2F: gate, then up), D width, G groups of a row

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from anabranch.errors import BackendError, CheckpointError, ConfigError, DataError
from anabranch.lm.quantized_form import packed_of
from anabranch.nn.kernels.operands import address
from anabranch.nn.kernels.transfers import MEMORY
from anabranch.nn.kernels.transfers import Piece as Copy
from anabranch.serving.expertflow.direct import DirectFile
from anabranch.serving.expertflow.layout import Expert

# (w13_FD, w2_DF) to write into.
Slot = tuple[Tensor, Tensor]
Where = tuple[int | slice, ...]


class Tier(Protocol):
    """Where experts lie."""

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """Write an expert into a slot, piece by piece. Raises OSError or an error of ours if it cannot."""

    def close(self) -> None:
        """Let go of files."""


@runtime_checkable
class CopiedTier(Tier, Protocol):
    """A tier whose experts come into a slot as they are.

    Attributes:
        seconds_per_byte: that a copy lasts at least; 0 where nothing slows it down.
    """

    seconds_per_byte: float

    def copies(self, expert: Expert, slot: Slot) -> list[Copy] | None:
        """What `load` does, as copies; None where it has to do more."""

    def check(self, expert: Expert) -> None:
        """After such copies: raise CheckpointError where they may be of other numbers than those that the tier was made with."""


def is_plain(stored: tuple[Sequence[int], torch.dtype], place: Tensor) -> bool:
    """Whether numbers of this shape and type can be copied to a place as they are, one after another."""
    return (
        place.shape == tuple(stored[0])
        and place.dtype == stored[1]
        and place.is_contiguous()
        and place.device.type == "cpu"
    )


class MemoryTier:
    """Pools in memory: ``pools[pool]`` is (w13_EFD, w2_EDF)."""

    seconds_per_byte = 0.0

    def __init__(self, pools: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pools = [(w13.detach(), w2.detach()) for w13, w2 in pools]

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """See `Tier`."""
        for stored, place in zip(self._pools[expert.pool], slot, strict=True):
            place.copy_(stored[expert.number])
            yield

    def copies(self, expert: Expert, slot: Slot) -> list[Copy] | None:
        """See `CopiedTier`."""
        made = []
        for stored, place in zip(self._pools[expert.pool], slot, strict=True):
            if (
                not is_plain((stored.shape[1:], stored.dtype), place)
                or not stored[expert.number].is_contiguous()
                or not stored.is_cpu
            ):
                return None
            made.append(Copy(MEMORY, 0, address(stored[expert.number]), place.nbytes, address(place)))
        return made

    def check(self, expert: Expert) -> None:
        """See `CopiedTier`; memory is ours."""

    def close(self) -> None:
        """See `Tier`."""


@dataclass(frozen=True)
class Piece:
    """A part of an expert in a file, its numbers in row-major order.

    Attributes:
        path: the file.
        offset: first byte.
        shape: of the part.
        dtype: of the numbers there.
        weight: 0 for w13, 1 for w2.
        where: which part of that weight, as an index expression; all of it by default.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: int
    where: Where = ()

    @property
    def bytes(self) -> int:
        """Length in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class FileTier:
    """An offset table: the pieces of each expert.

    Args:
        table: of every expert.
        drop_cache: keep nothing of what is read in the page cache (`DirectFile`), so that it holds no second copy and each load is a real
            one.

    Raises CheckpointError for a file that cannot be opened.
    """

    seconds_per_byte = 0.0

    def __init__(self, table: Mapping[Expert, Sequence[Piece]], *, drop_cache: bool = False) -> None:
        self.table = dict(table)
        self.drop_cache = drop_cache
        self._files: dict[Path, DirectFile] = {}
        for path in {piece.path for pieces in self.table.values() for piece in pieces}:
            try:
                self._files[path] = DirectFile(path)
            except OSError as error:
                self.close()
                raise CheckpointError(f"cannot read experts from {path}: {error}") from None
        self._finalizer = weakref.finalize(self, _close, self._files)

    def load(self, expert: Expert, slot: Slot | Mapping[int, Tensor]) -> Iterator[None]:
        """See `Tier`."""
        for piece in self.table[expert]:
            place = slot[piece.weight][piece.where]
            if place.shape != piece.shape:
                raise DataError(
                    f"{piece.path} holds {list(piece.shape)} for {expert}, the slot takes {list(place.shape)}"
                )
            if is_plain((piece.shape, piece.dtype), place):
                self._read(piece, _bytes_of(place))
            else:
                buffer = torch.empty(piece.shape, dtype=piece.dtype)
                self._read(piece, _bytes_of(buffer))
                place.copy_(buffer)
            yield

    def copies(self, expert: Expert, slot: Slot) -> list[Copy] | None:
        """See `CopiedTier`."""
        made = []
        for piece in self.table[expert]:
            place = slot[piece.weight][piece.where] if piece.where else slot[piece.weight]
            source = self._files[piece.path].source(past_cache=self.drop_cache)
            if source is None or not is_plain((piece.shape, piece.dtype), place):
                return None
            made.append(Copy(*source, piece.offset, piece.bytes, address(place)))
        return made

    def check(self, expert: Expert) -> None:
        """See `CopiedTier`."""
        for path in {piece.path for piece in self.table[expert]}:
            self._files[path].check()

    def _read(self, piece: Piece, into: memoryview) -> None:
        file = self._files[piece.path]
        count = file.read(piece.offset, into, past_cache=self.drop_cache)
        # Behind the read, which may have met what was being written.
        file.check()
        if count < len(into):
            raise DataError(f"{piece.path} ends before byte {piece.offset + piece.bytes}; it is truncated")

    def close(self) -> None:
        """See `Tier`."""
        _close(self._files)


def _close(files: dict[Path, DirectFile]) -> None:
    while files:
        files.popitem()[1].close()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stub


def write_experts(path: Path, pools: Iterable[tuple[Tensor, Tensor]]) -> FileTier:
    """Write pools (w13_EFD, w2_EDF) to a file, expert after expert, and open it; one pool is asked for when the one before is written."""
    table: dict[Expert, list[Piece]] = {}
    with path.open("wb") as file:
        for pool, (w13_EFD, w2_EDF) in enumerate(pools):
            for index in range(len(w13_EFD)):
                for number, weight in enumerate((w13_EFD[index], w2_EDF[index])):
                    piece = Piece(path, file.tell(), tuple(weight.shape), weight.dtype, number)
                    table.setdefault(Expert(pool, index), []).append(piece)
                    file.write(_bytes_of(weight.detach().cpu().contiguous()))
        file.flush()
        os.fsync(file.fileno())
    return FileTier(table)


class IntegerTier:
    """Experts of a folder that holds them as integers (`anabranch.lm.quantized_form`): read so, and packed into the slot.

    Args:
        files: pieces of each expert, whose ``weight`` is 0 to 2 for number, scale and least of w13, and 3 to 5 of w2; int8 has no least.
    """

    def __init__(self, files: FileTier) -> None:
        self._files = files

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """See `Tier`."""
        parts = {piece.weight: torch.empty(piece.shape, dtype=piece.dtype) for piece in self._files.table[expert]}
        yield from self._files.load(expert, parts)
        for first, place in zip((0, 3), slot, strict=True):
            place.copy_(packed_of(parts[first], parts[first + 1], parts.get(first + 2)).data[0])
            yield

    def close(self) -> None:
        """See `Tier`."""
        self._files.close()


class SourceTier:
    """Experts made of named tensors: ``parts[expert]`` is a list of (read, weight, where), ``read`` giving a tensor on the CPU."""

    def __init__(self, parts: Mapping[Expert, Sequence[tuple[Callable[[], Tensor], int, Where]]]) -> None:
        self._parts = dict(parts)
        # Sources are not made for several threads.
        self._lock = threading.Lock()

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """See `Tier`."""
        for read, weight, where in self._parts[expert]:
            with self._lock:
                slot[weight][where].copy_(read())
            yield

    def close(self) -> None:
        """See `Tier`."""


# Neighbours in a row that share a scale.
GROUP = 32
LEVELS = {8: 127, 4: 7}


class DequantTier:
    """Weights as int8 or int4 in memory, in groups of 32 along a row with a float16 scale each (symmetric, nearest).

    An expert then is what its integers say, so outputs are those of the quantised model, not of the original one.
    """

    def __init__(self, pools: Sequence[tuple[Tensor, Tensor]], bits: int = 8) -> None:
        if bits not in LEVELS:
            raise ConfigError(f"bits is {bits}; experts are kept in 8 or 4")
        self.bits = bits
        self._pools = [tuple(quantize(weight.detach(), bits) for weight in pool) for pool in pools]

    @property
    def bytes(self) -> int:
        """Memory of the integers and scales."""
        return sum(part.nbytes for pool in self._pools for weight in pool for part in weight)

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """See `Tier`."""
        for (code, scale), place in zip(self._pools[expert.pool], slot, strict=True):
            place.copy_(dequantize(code[expert.number], scale[expert.number], self.bits))
            yield

    def close(self) -> None:
        """See `Tier`."""


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(code, scale): int8 of the shape of ``weight``, or uint8 with two numbers a byte; float16 scale of each group of 32 in a row.

    Raises ConfigError for rows that are not whole groups.
    """
    if weight.shape[-1] % GROUP:
        raise ConfigError(
            f"a row of {weight.shape[-1]} weights is not a multiple of {GROUP}; these experts cannot be quantised"
        )
    group = weight.float().unflatten(-1, (-1, GROUP))
    scale = (group.abs().amax(-1, keepdim=True) / LEVELS[bits]).clamp_min(1e-7).half()
    code = (group / scale.float()).round().clamp(-LEVELS[bits], LEVELS[bits]).to(torch.int8).flatten(-2)
    if bits == 4:
        low, high = (code + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        code = low | (high << 4)
    return code, scale.squeeze(-1)


def dequantize(code: Tensor, scale: Tensor, bits: int) -> Tensor:
    """float32 weights, see `quantize`."""
    if bits == 4:
        code = torch.stack((code & 15, code >> 4), -1).flatten(-2).to(torch.int8) - 8
    return (code.unflatten(-1, (-1, GROUP)).float() * scale.float().unsqueeze(-1)).flatten(-2)


class ThrottledTier:
    """Another tier, whose loads last at least ``seconds_per_byte`` times their size; one at a time, as over a wire."""

    def __init__(
        self,
        tier: Tier,
        seconds_per_byte: float,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tier, self.seconds_per_byte = tier, seconds_per_byte
        self._sleep, self._clock, self._wire = sleep, clock, threading.Lock()

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """See `Tier`."""
        with self._wire:
            begin, whole_s = self._clock(), self.seconds_per_byte * sum(weight.nbytes for weight in slot)
            yield from self._tier.load(expert, slot)
            left_s = begin + whole_s - self._clock()
            if left_s > 0:
                self._sleep(left_s)

    def copies(self, expert: Expert, slot: Slot) -> list[Copy] | None:
        """See `CopiedTier`; they know no other clock than the system's."""
        is_timed = (self._sleep, self._clock) == (time.sleep, time.perf_counter)
        return self._tier.copies(expert, slot) if is_timed and isinstance(self._tier, CopiedTier) else None

    def check(self, expert: Expert) -> None:
        """See `CopiedTier`."""
        if isinstance(self._tier, CopiedTier):
            self._tier.check(expert)

    def close(self) -> None:
        """See `Tier`."""
        self._tier.close()


class CudaTier:
    """Another tier, whose experts go to a device: into pinned memory of the calling thread, then over on a stream of its own.

    Experts of a tier that is memory already could be pinned there for good; through a buffer any tier works, and pinned memory stays small.
    """

    def __init__(self, tier: Tier, device: torch.device | str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise BackendError("a CUDA tier was asked for, but there is no CUDA device")
        self._tier, self.device = tier, torch.device(device)
        self._local = threading.local()

    def load(self, expert: Expert, slot: Slot) -> Iterator[None]:
        """See `Tier`. When it has ended the bytes are there."""
        staging, stream = self._mine(slot)
        with torch.cuda.stream(stream):
            yield from self._tier.load(expert, staging)
            for place, part in zip(slot, staging, strict=True):
                place.copy_(part, non_blocking=True)
            done = stream.record_event()
        done.synchronize()

    def _mine(self, slot: Slot) -> tuple[Slot, torch.cuda.Stream]:
        local, key = self._local, tuple((weight.shape, weight.dtype) for weight in slot)
        if not hasattr(local, "stream"):
            local.stream, local.staging = torch.cuda.Stream(self.device), {}
        if key not in local.staging:
            w13, w2 = (torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True) for weight in slot)
            local.staging[key] = (w13, w2)
        return local.staging[key], local.stream

    def close(self) -> None:
        """See `Tier`."""
        self._tier.close()
