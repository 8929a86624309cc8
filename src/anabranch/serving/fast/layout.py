"""The structures that `nn/kernels/decode.cpp` reads, see `step.h`."""

import ctypes

import torch
from torch import Tensor

from anabranch.nn.kernels.packed import Matrix
from anabranch.nn.packed import Kind

__all__ = ["KIND_OF", "CBlock", "CExperts", "CLoops", "CModel", "CRecurrence", "CStep", "floats"]

KIND_OF: dict[torch.dtype, Kind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CRecurrence(ctypes.Structure):
    """`Recurrence` of step.h."""

    _fields_ = (
        ("projector", Matrix), ("input", Matrix), ("hidden", Matrix),
        ("input_bias", _pointer), ("hidden_bias", _pointer), ("hands_on", _int),
    )  # fmt: skip


class CExperts(ctypes.Structure):
    """`Experts` of step.h."""

    _fields_ = (
        ("router", _pointer), ("bias", _pointer), ("gate", _pointer), ("shift", _pointer), ("recurrence", CRecurrence),
        ("w13", Matrix), ("w2", Matrix), ("shared13", Matrix), ("shared2", Matrix),
        ("count", _int), ("top_k", _int), ("activation", _int), ("normalize", _int),
        ("scale", _float), ("number", ctypes.c_int32),
    )  # fmt: skip


class CLoops(ctypes.Structure):
    """`Loops` of step.h."""

    _fields_ = (("gate", _pointer), ("first", _pointer), ("most", _int), ("width", _int), ("threshold", _float))


class CBlock(ctypes.Structure):
    """`Block` of step.h."""

    _fields_ = (
        ("attention_norm", _pointer), ("feed_forward_norm", _pointer),
        ("qkv_bias", _pointer), ("out_bias", _pointer), ("q_norm", _pointer), ("k_norm", _pointer),
        ("key", _pointer), ("value", _pointer),
        ("qkv", Matrix), ("out", Matrix), ("w13", Matrix), ("w2", Matrix), ("experts", CExperts), ("loops", CLoops),
    )  # fmt: skip


class CModel(ctypes.Structure):
    """`Model` of step.h."""

    _fields_ = (
        *((name, _int) for name in ("layers", "dim", "heads", "kv_heads", "width", "hidden", "block_tokens")),
        ("most_experts", _int), ("most_top_k", _int), ("state", _int), ("rows", _int), ("most_loops", _int),
        ("norm_eps", _float), ("qk_eps", _float), ("clip", _float), ("qk_norm", ctypes.c_int32), ("half_store", ctypes.c_int32),
        ("last_norm", _pointer), ("blocks", ctypes.POINTER(CBlock)),
    )  # fmt: skip


class CStep(ctypes.Structure):
    """`Step` of step.h."""

    _fields_ = (
        ("tokens", _int), ("sequence", _pointer), ("sequences", _int), ("table", _pointer),
        ("cos", _pointer), ("sin", _pointer), ("x", _pointer), ("routes", _pointer), ("memory", _pointer),
    )  # fmt: skip


def floats(value: Tensor | None, keep: list[Tensor]) -> int | None:
    """Where a contiguous float32 copy of ``value`` stands; ``keep`` owns it."""
    if value is None:
        return None
    keep.append(value.detach().float().contiguous())
    return keep[-1].data_ptr()
