"""`Parts`: matrices whose rows are stored in several kinds of integers, each part of them in its own.

Files of mixed types have them: in llama.cpp's Q4_K_M the rows that make queries and keys are Q4_K and those of values Q6_K, and all are one
matrix here; so are an expert's gate and up. A linear layer of such rows is an `anabranch.nn.parted.PartedLinear`, which keeps each part in
memory of its own; the experts of a pool, which come and go one by one, have their parts one behind the other.
"""
# Shapes: E matrices, N rows (outputs), K depth (inputs), C rows of activations, P panels of 16 rows

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.nn.packed import WIDE, Kind, Packed
from anabranch.nn.remade import linear_remade

__all__ = ["Form", "Matrices", "Parts", "can_be_parts", "empty_of", "form_of", "linear_of", "parts_of", "weights_of"]

# (rows, kind, group) of each part.
Form = tuple[tuple[int, Kind, int], ...]


@dataclass(frozen=True, eq=False)
class Parts:
    """E matrices, as `anabranch.nn.packed.Packed`, of rows in several kinds.

    Attributes:
        data: uint8 ``[E, bytes]``: of each matrix the panels of its first part, then those of the next.
        likes: what tells the sizes of the parts.
    """

    data: Tensor
    likes: tuple[Packed, ...]

    @classmethod
    def of(cls, parts: Sequence[Packed]) -> "Parts":
        """The matrices whose rows are those of ``parts``, for which `can_be_parts` holds."""
        likes = tuple(part.with_data(part.data.to("meta")) for part in parts)
        return cls(torch.cat([part.data.flatten(1) for part in parts], dim=1), likes)

    @property
    def parts(self) -> tuple[Packed, ...]:
        """Each part of all matrices, which lie apart."""
        ends = [0, *itertools.accumulate(like.data[0].numel() for like in self.likes)]
        return tuple(
            like.with_data(self.data[:, begin:end].unflatten(1, like.data.shape[1:]))
            for like, (begin, end) in zip(self.likes, itertools.pairwise(ends), strict=True)
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.data.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return sum(like.rows for like in self.likes)

    @property
    def depth(self) -> int:
        """K."""
        return self.likes[0].depth

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.data.numel()

    def with_data(self, data: Tensor) -> "Parts":
        """The same matrices stored in ``data``."""
        return Parts(data, self.likes)

    def expert(self, index: int) -> "Parts":
        """One matrix of the stack."""
        return self.with_data(self.data[index : index + 1])

    def linear(self, x_CK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """y_CN = x W^T + bias in the dtype of x, of a stack of one."""
        return linear_of(self.parts, x_CK, bias_N)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weights ``[N, K]`` of a stack of one, as they count."""
        return self.unpack(dtype)[0]

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as they count, ``[E, N, K]``."""
        return weights_of(self.parts, dtype)


Matrices = Packed | Parts


def linear_of(parts: Sequence[Packed], x_CK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y_CN = x W^T + bias in the dtype of x, where the rows of W are those of ``parts``, each a stack of one."""
    # The kernels know these classes.
    from anabranch.nn.kernels import packed as native

    if all(native.can(part, x_CK, bias_N) for part in parts):
        return native.linear_of_parts(parts, x_CK, bias_N)
    return linear_remade(x_CK, lambda dtype: weights_of(parts, dtype)[0], bias_N)


def weights_of(parts: Sequence[Packed], dtype: torch.dtype) -> Tensor:
    """The weights ``[E, N, K]`` of matrices whose rows are those of ``parts``, as they count."""
    return torch.cat([part.unpack(dtype) for part in parts], dim=1)


def can_be_parts(parts: Sequence[Packed]) -> bool:
    """Whether matrices can be of the rows of these: of integers, and whole panels."""
    return len(parts) > 1 and all(
        part.num_experts == parts[0].num_experts
        and part.rows % WIDE == 0
        and part.depth == parts[0].depth
        and part.kind not in ("float32", "bfloat16")
        for part in parts
    )


def parts_of(matrices: Matrices) -> tuple[Packed, ...]:
    """Those of one kind each."""
    return matrices.parts if isinstance(matrices, Parts) else (matrices,)


def form_of(matrices: Matrices) -> Form:
    """How rows are stored."""
    likes = matrices.likes if isinstance(matrices, Parts) else (matrices,)
    return tuple((like.rows, like.kind, like.group) for like in likes)


def empty_of(num: int, depth: int, form: Form, *, device: torch.device | str | None = None) -> Matrices:
    """``num`` matrices of a form, still to be filled; on the device ``meta`` they only tell their sizes."""
    if len(form) == 1:
        [(rows, kind, group)] = form
        return Packed.empty(num, rows, depth, kind, group, device=device)
    likes = tuple(Packed.empty(1, rows, depth, kind, group, device="meta") for rows, kind, group in form)
    size = sum(like.data.numel() for like in likes)
    return Parts(torch.empty(num, size, dtype=torch.uint8, device=device), likes)
