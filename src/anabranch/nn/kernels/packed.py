"""The compiled products of packed weights behind tensors."""
# Shapes: C rows of activations, N rows (outputs), K depth

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.errors import InputError
from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.operands import address, takes
from anabranch.nn.packed import KINDS, SHARE, WIDE, Packed, panel_bytes
from anabranch.nn.parts import Parts
from anabranch.nn.superblocks import BITS_OF, BLOCK

__all__ = [
    "Matrix",
    "advise",
    "can",
    "learns",
    "linear",
    "linear_of_parts",
    "matrix",
    "matrix_of_parts",
    "matrix_of_rows",
]

# Kinds of packed.h whose rows lie as they are.
ROWS_OF = {torch.float32: 4, torch.bfloat16: 5}
# And those that are packed.
CODE_OF = {**{kind: code for code, kind in enumerate(KINDS)}, "q4_k": 6, "q5_k": 7, "q6_k": 8, "fp4": 9}


class Matrix(ctypes.Structure):
    """`Matrix` of packed.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("panel_bytes", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("expert_bytes", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        ("beyond", ctypes.c_int64),
    )


LINEAR = Kernel(
    "anabranch_packed_linear",
    """data: uint8[E, P, Z], N: int64, K: int64, group: int64, Z: int64, kind: int64, given P, x: float32[C, K], bias: float32[N]?,
    y: float32[C, N] out, C, threads""",
    where=("E > 0",),
    result="status",
)
PARTS = Kernel(
    "anabranch_packed_parts",
    "w: Matrix, x: float32[C, K], bias: float32[N]?, y: float32[C, N] out, C, N, K, threads",
    structures={"Matrix": Matrix},
    result="status",
)
ADVISE = Kernel("anabranch_advise", "data: uint8[B], B")


def matrix(packed: Packed) -> Matrix:
    """What the kernels are told; ``packed`` must outlive it. Raises InputError where its memory is not what its sizes say."""
    kind, rows, depth, group = CODE_OF[packed.kind], packed.rows, packed.depth, packed.group
    panel_bytes, panels = _panel_bytes(packed), -(-rows // WIDE)
    start = address(packed.data, "uint8", None, panels, panel_bytes)
    return Matrix(start, rows, depth, group, panel_bytes, kind, panels * panel_bytes)


def matrix_of_parts(parts: Sequence[Packed] | Parts) -> tuple[Matrix, ctypes.Array[Matrix]]:
    """What the kernels are told of matrices whose rows are those of ``parts``, all of integers; and what must outlive it beside them.

    Of a sequence the matrix is one; of `Parts` there may be several.

    Raises InputError as `matrix`, and for parts that are not of whole panels, or of other columns than the first.
    """
    if isinstance(parts, Parts):
        made, parts = _apart(parts), parts.likes
    else:
        made = (Matrix * len(parts))(*map(matrix, parts))
    for before, part in itertools.pairwise(made):
        before.next = ctypes.addressof(part)
        part.first = before.first + before.rows // WIDE
    for packed in parts:
        is_whole = packed.rows % WIDE == 0 or packed is parts[-1]
        if not is_whole or packed.depth != parts[0].depth or packed.kind in ("float32", "bfloat16"):
            raise InputError(
                f"a part is [{packed.rows}, {packed.depth}] of {packed.kind}; parts have integers, as many columns, and multiples of "
                f"{WIDE} rows"
            )
    made[0].rows = sum(packed.rows for packed in parts)
    return made[0], made


def _apart(parts: Parts) -> ctypes.Array[Matrix]:
    """Each of the parts, not chained yet."""
    whole, made = sum(like.data[0].numel() for like in parts.likes), []
    start = address(parts.data, "uint8", None, whole)
    for like in parts.likes:
        kind, panel_bytes = CODE_OF[like.kind], _panel_bytes(like)
        made.append(Matrix(start, like.rows, like.depth, like.group, panel_bytes, kind, whole))
        start += -(-like.rows // WIDE) * panel_bytes
    return (Matrix * len(made))(*made)


def _panel_bytes(packed: Packed) -> int:
    """Of 16 rows, see packed.h."""
    is_whole = packed.group >= SHARE and packed.group % SHARE == 0 and packed.depth % packed.group == 0
    if packed.kind in ("int8", "int4", "fp4") and not is_whole:
        raise InputError(
            f"a matrix has groups of {packed.group}; they must be multiples of {SHARE} that divide {packed.depth}"
        )
    if packed.kind in BITS_OF and packed.depth % BLOCK:
        raise InputError(f"a matrix of {packed.kind} has {packed.depth} columns; they must be a multiple of {BLOCK}")
    return panel_bytes(packed.kind, packed.depth, packed.group)


def matrix_of_rows(weight_ENK: Tensor) -> Matrix:
    """What the kernels are told of a stack of plain matrices, float32 or bfloat16, N a multiple of 16; it must stay where it is."""
    start = address(weight_ENK, ("float32", "bfloat16"), None, None, None)
    _, rows, depth = weight_ENK.shape
    if rows % WIDE or depth % WIDE:
        raise InputError(f"matrices are [{rows}, {depth}]; the kernels take multiples of {WIDE}")
    row_bytes = depth * weight_ENK.dtype.itemsize
    kind = ROWS_OF[weight_ENK.dtype]
    return Matrix(start, rows, depth, depth, WIDE * row_bytes, kind, rows * row_bytes)


def can(packed: Packed, x_CK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether the kernels take this: on a CPU, without a gradient, also of the bias alone."""
    if not takes(packed.data, x_CK) or (bias_N is not None and not takes(bias_N)):
        return False
    if x_CK.dtype not in (torch.float32, torch.bfloat16) or learns(x_CK, bias_N):
        return False
    return load() is not None


def learns(x_CK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether a product has a gradient to give: to what goes in, or to a bias."""
    return torch.is_grad_enabled() and (x_CK.requires_grad or (bias_N is not None and bias_N.requires_grad))


def linear(packed: Packed, x_CK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y_CN in the dtype of x."""
    x = x_CK.float().contiguous()
    bias = None if bias_N is None else bias_N.detach().float().contiguous()
    y_CN = torch.empty(x.shape[0], packed.rows)
    rows, kind = packed.rows, CODE_OF[packed.kind]
    LINEAR(packed.data, rows, packed.depth, packed.group, _panel_bytes(packed), kind, -(-rows // WIDE), x, bias, y_CN)
    return y_CN.to(x_CK.dtype)


def linear_of_parts(parts: Sequence[Packed], x_CK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y_CN in the dtype of x, of a matrix whose rows are those of ``parts``. Raises InputError as `matrix_of_parts`."""
    whole, _parts = matrix_of_parts(parts)
    x = x_CK.float().contiguous()
    bias = None if bias_N is None else bias_N.detach().float().contiguous()
    y_CN = torch.empty(x.shape[0], whole.rows)
    PARTS(whole, x, bias, y_CN)
    return y_CN.to(x_CK.dtype)


def advise(data: Tensor) -> None:
    """Ask for large pages for memory that is not written yet."""
    if load() is not None:
        ADVISE(data.view(-1).view(torch.uint8))
