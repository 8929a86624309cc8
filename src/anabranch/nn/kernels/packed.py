"""The compiled products of packed weights behind tensors."""
# Shapes: C rows of activations, N rows (outputs), K depth

import ctypes

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.packed import KINDS, WIDE, Packed

__all__ = ["Matrix", "advise", "can", "linear", "matrix", "matrix_of_rows"]

ROWS_OF = {torch.float32: 4, torch.bfloat16: 5}  # kinds of packed.h whose rows lie as they are


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
    )


def matrix(packed: Packed) -> Matrix:
    """What the kernels are told; ``packed`` must outlive it."""
    experts, panels, panel_bytes = packed.data.shape
    assert packed.data.is_contiguous() or experts == 1
    kind = KINDS.index(packed.kind)
    return Matrix(
        packed.data.data_ptr(), packed.rows, packed.depth, packed.group, panel_bytes, kind, panels * panel_bytes
    )


def matrix_of_rows(weight_ENK: Tensor) -> Matrix:
    """What the kernels are told of a stack of plain matrices, float32 or bfloat16, N a multiple of 16; it must stay where it is."""
    _, rows, depth = weight_ENK.shape
    assert weight_ENK.is_contiguous()
    assert rows % WIDE == 0
    row_bytes = depth * weight_ENK.dtype.itemsize
    kind = ROWS_OF[weight_ENK.dtype]
    return Matrix(weight_ENK.data_ptr(), rows, depth, depth, WIDE * row_bytes, kind, rows * row_bytes)


def can(packed: Packed, x_CK: Tensor) -> bool:
    """Whether the kernels take this: on a CPU, without a gradient."""
    if x_CK.device.type != "cpu" or packed.data.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if x_CK.dtype not in (torch.float32, torch.bfloat16) or (torch.is_grad_enabled() and x_CK.requires_grad):
        return False
    return load() is not None


def linear(packed: Packed, x_CK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y_CN in the dtype of x."""
    library = load()
    assert library is not None, "callers ask can first"
    x = x_CK.float().contiguous()
    bias = None if bias_N is None else bias_N.detach().float().contiguous()
    y_CN = torch.empty(x.shape[0], packed.rows)
    library.anabranch_packed_linear(
        ctypes.byref(matrix(packed)),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_void_p(y_CN.data_ptr()),
        torch.get_num_threads(),
    )
    return y_CN.to(x_CK.dtype)


def advise(data: Tensor) -> None:
    """Ask for large pages for memory that is not written yet."""
    library = load()
    if library is not None:
        library.anabranch_advise(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.nbytes))
