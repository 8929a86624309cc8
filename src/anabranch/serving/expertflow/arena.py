"""`Arena`: the slots, one pair of stacked tensors for each kind of expert, so that the grouped expert kernels run on slots as on a pool."""
# Shapes: S slots, F hidden, D width

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.nn.activation import activation_of
from anabranch.nn.kernels.packed import advise
from anabranch.nn.parts import Form, Matrices, empty_of, form_of
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
        forms: of the two matrices of experts that are in slots as they are computed with, see `anabranch.nn.parts`; None in floating point.
        out_dim: O of adapters, whose A ``[F, D]`` and B ``[O, F]`` have one rank F; None for experts of a feed-forward layer.
        parts: of the first matrix: a gate and up, or up alone.
    """

    dim: int
    hidden_dim: int
    dtype: torch.dtype
    forms: tuple[Form, Form] | None = None
    out_dim: int | None = None
    parts: int = 2

    @classmethod
    def of(cls, pool: ExpertPool | QuantizedPool) -> "Kind":
        """Of the experts of a pool."""
        parts = len(activation_of(pool.activation).parts)
        if isinstance(pool, ExpertPool):
            return cls(pool.dim, pool.hidden_dim, pool.stacks[0].dtype, parts=parts)
        w13, w2 = pool.packed
        return cls(pool.dim, pool.hidden_dim, torch.uint8, (form_of(w13), form_of(w2)), parts=parts)

    def packed(self, num: int) -> tuple[Matrices, Matrices]:
        """(w13, w2) of so many experts without their weights, with ``forms``."""
        assert self.forms is not None, "floating-point experts are not packed"
        first, second = self.forms
        return empty_of(num, self.dim, first, device="meta"), empty_of(num, self.hidden_dim, second, device="meta")

    def shapes(self, num: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two stacks of slots: ``[S, 2F, D]`` and ``[S, D, F]``, ``[S, F, D]`` and ``[S, O, F]``, or ``[S, P, bytes]`` twice.

        Of rows in several kinds it is ``[S, bytes]``.
        """
        if self.out_dim is not None:
            return (num, self.hidden_dim, self.dim), (num, self.out_dim, self.hidden_dim)
        if self.forms is None:
            return (num, self.parts * self.hidden_dim, self.dim), (num, self.dim, self.hidden_dim)
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
    def packed(self) -> tuple[Matrices, Matrices] | None:
        """Both, of experts in few bits; None of others."""
        kind = self.arena.kinds[self.kind]
        if kind.forms is None:
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
