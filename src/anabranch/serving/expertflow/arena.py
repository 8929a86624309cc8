"""`Arena`: the slots, one pair of stacked tensors for each kind of expert, so that the grouped expert kernels run on slots as on a pool."""
# Shapes: S slots, F hidden, D width

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.nn.kernels.packed import advise
from anabranch.nn.packed import Kind as PackedKind
from anabranch.nn.packed import Packed
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedPool
from anabranch.serving.expertflow.direct import BLOCK


@dataclass(frozen=True)
class Kind:
    """Shape and type of an expert.

    Attributes:
        dim: D.
        hidden_dim: F.
        dtype: of its weights in a slot; uint8 of those in few bits.
        schemes: of the two matrices of experts that are in slots as they are computed with, kinds of `anabranch.nn.packed`.
        groups: with ``schemes``, weights that share a scale in each of the two.
    """

    dim: int
    hidden_dim: int
    dtype: torch.dtype
    schemes: tuple[PackedKind, PackedKind] | None = None
    groups: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, pool: ExpertPool | QuantizedPool) -> "Kind":
        """Of the experts of a pool."""
        if isinstance(pool, ExpertPool):
            return cls(pool.dim, pool.hidden_dim, pool.stacks[0].dtype)
        w13, w2 = pool.packed
        return cls(pool.dim, pool.hidden_dim, torch.uint8, (w13.kind, w2.kind), (w13.group, w2.group))

    def packed(self, num: int) -> tuple[Packed, Packed]:
        """(w13, w2) of so many experts without their weights, with ``schemes``."""
        assert self.schemes is not None, "floating-point experts are not packed"
        sizes = ((2 * self.hidden_dim, self.dim), (self.dim, self.hidden_dim))
        w13, w2 = (
            Packed.empty(num, *size, scheme, group, device="meta")
            for size, scheme, group in zip(sizes, self.schemes, self.groups, strict=True)
        )
        return w13, w2

    def shapes(self, num: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two stacks of slots: ``[S, 2F, D]`` and ``[S, D, F]``, or ``[S, P, bytes]`` twice."""
        if self.schemes is None:
            return (num, 2 * self.hidden_dim, self.dim), (num, self.dim, self.hidden_dim)
        w13, w2 = self.packed(num)
        return tuple(w13.data.shape), tuple(w2.data.shape)

    @property
    def bytes(self) -> int:
        """Size in a slot."""
        return sum(math.prod(shape) for shape in self.shapes(1)) * self.dtype.itemsize


class Arena:
    """``w13_SFD`` [S, 2F, D] and ``w2_SDF`` [S, D, F] of each kind, or panels of experts in few bits, allocated once.

    On a GPU kernels may still read a slot when the host says that it is free; `mark_used` and `wait_unused` put the copy behind them.
    """

    def __init__(self, kinds: Sequence[Kind], slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.kinds, self.slots, self.device = list(kinds), list(slots), torch.device(device)
        self.w13_SFD: list[Tensor] = []
        self.w2_SDF: list[Tensor] = []
        # Other threads write into them outside of it.
        with torch.inference_mode(False):
            for kind, count in zip(kinds, slots, strict=True):
                w13, w2 = kind.shapes(count)
                self.w13_SFD.append(_zeros(w13, kind.dtype, self.device))
                self.w2_SDF.append(_zeros(w2, kind.dtype, self.device))
            # Made once, as whoever loads asks often.
            both = zip(self.w13_SFD, self.w2_SDF, strict=True)
            self._places = [list(zip(w13.unbind(), w2.unbind(), strict=True)) for w13, w2 in both]
        for weight in (*self.w13_SFD, *self.w2_SDF) if self.device.type == "cpu" else ():
            advise(weight)
        self._used: dict[tuple[int, int], torch.cuda.Event] = {}

    @property
    def bytes(self) -> int:
        """Of all slots."""
        return sum(weight.nbytes for weight in (*self.w13_SFD, *self.w2_SDF))

    def slot(self, kind: int, number: int) -> tuple[Tensor, Tensor]:
        """(w13_FD, w2_DF) of a slot, to write into."""
        return self._places[kind][number]

    def mark_used(self, kind: int, numbers: Sequence[int]) -> None:
        """Kernels that read these slots have been launched."""
        if self.device.type == "cuda":
            event = torch.cuda.current_stream(self.device).record_event()
            self._used.update({(kind, number): event for number in numbers})

    def of(self, kind: int) -> "SlotsOfKind":
        """The slots of one kind, for the pools whose experts are of it."""
        return SlotsOfKind(self, kind)

    def wait_unused(self, kind: int, number: int) -> None:
        """Until they have run."""
        event = self._used.pop((kind, number), None)
        if event is not None:
            event.synchronize()


@dataclass(frozen=True, slots=True)
class SlotsOfKind:
    """Those of an arena that hold experts of one kind, as `anabranch.nn.offloaded.ExpertSlots`.

    Attributes:
        arena: whose they are.
        kind: number of the kind.
    """

    arena: Arena
    kind: int

    @property
    def w13_SFD(self) -> Tensor:
        """See `Arena`."""
        return self.arena.w13_SFD[self.kind]

    @property
    def w2_SDF(self) -> Tensor:
        """See `Arena`."""
        return self.arena.w2_SDF[self.kind]

    @property
    def packed(self) -> tuple[Packed, Packed] | None:
        """Both, of experts in few bits; None of others."""
        kind = self.arena.kinds[self.kind]
        if kind.schemes is None:
            return None
        w13, w2 = kind.packed(0)
        return w13.with_data(self.w13_SFD), w2.with_data(self.w2_SDF)

    def mark_used(self, numbers: Sequence[int]) -> None:
        """Kernels that read these slots have been launched."""
        self.arena.mark_used(self.kind, numbers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU they begin at a page, so that whole blocks of a file can be read straight to their place."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.zeros(size + BLOCK, dtype=torch.uint8)
    start = -memory.data_ptr() % BLOCK
    return memory[start : start + size].view(dtype).view(shape)
