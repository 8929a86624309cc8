"""The structures that `nn/kernels/decode.cpp` reads, see `step.h`."""

import ctypes

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.operands import address
from anabranch.nn.kernels.packed import Matrix
from anabranch.nn.packed import Kind

__all__ = [
    "BYTES",
    "EXPERTS",
    "KIND_OF",
    "STEP",
    "CAdapter",
    "CBlock",
    "CExperts",
    "CGroup",
    "CHeads",
    "CLoops",
    "CModel",
    "CPart",
    "CRecurrence",
    "CStep",
    "check_sizes",
    "floats",
]

KIND_OF: dict[torch.dtype, Kind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CRecurrence(ctypes.Structure):
    """`Recurrence` of step.h."""

    _fields_ = (
        ("projector", Matrix),
        ("input", Matrix),
        ("hidden", Matrix),
        ("input_bias", _pointer),
        ("hidden_bias", _pointer),
        ("hands_on", _int),
    )


class CExperts(ctypes.Structure):
    """`Experts` of step.h."""

    _fields_ = (
        ("router", _pointer),
        ("bias", _pointer),
        ("gate", _pointer),
        ("shift", _pointer),
        ("recurrence", CRecurrence),
        ("w13", Matrix),
        ("w2", Matrix),
        ("shared13", Matrix),
        ("shared2", Matrix),
        ("count", _int),
        ("top_k", _int),
        ("activation", _int),
        ("normalize", _int),
        ("scale", _float),
        ("number", ctypes.c_int32),
    )


class CLoops(ctypes.Structure):
    """`Loops` of step.h."""

    _fields_ = (("gate", _pointer), ("first", _pointer), ("most", _int), ("width", _int), ("threshold", _float))


class CHeads(ctypes.Structure):
    """`Heads` of step.h."""

    _fields_ = (
        ("routed", _pointer),
        ("bias", _pointer),
        ("pair", _pointer),
        ("shared", _pointer),
        ("count", _int),
        ("top_k", _int),
        ("floor", _float),
        ("cap", _float),
        ("most_pair", _float),
        ("factor", _float),
    )


class CBlock(ctypes.Structure):
    """`Block` of step.h."""

    _fields_ = (
        ("attention_norm", _pointer),
        ("feed_forward_norm", _pointer),
        ("qkv_bias", _pointer),
        ("out_bias", _pointer),
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("key", _pointer),
        ("value", _pointer),
        ("qkv", Matrix),
        ("out", Matrix),
        ("w13", Matrix),
        ("w2", Matrix),
        ("experts", CExperts),
        ("loops", CLoops),
        ("heads", CHeads),
    )


class CModel(ctypes.Structure):
    """`Model` of step.h."""

    _fields_ = (
        *((name, _int) for name in ("layers", "dim", "heads", "kv_heads", "width", "hidden", "block_tokens", "slots")),
        ("most_experts", _int),
        ("most_top_k", _int),
        ("state", _int),
        ("rows", _int),
        ("most_loops", _int),
        ("norm_eps", _float),
        ("qk_eps", _float),
        ("clip", _float),
        ("qk_norm", ctypes.c_int32),
        ("half_store", ctypes.c_int32),
        ("last_norm", _pointer),
        ("blocks", ctypes.POINTER(CBlock)),
    )


class CStep(ctypes.Structure):
    """`Step` of step.h."""

    _fields_ = (
        ("tokens", _int),
        ("sequence", _pointer),
        ("sequences", _int),
        ("table", _pointer),
        ("table_length", _int),
        ("cos", _pointer),
        ("sin", _pointer),
        ("x", _pointer),
        ("routes", _pointer),
        ("memory", _pointer),
        ("group", _pointer),
        ("groups", _int),
        ("lows", _int),
    )


class CPart(ctypes.Structure):
    """`Part` of step.h."""

    _fields_ = (
        ("a", _pointer),
        ("b", _pointer),
        ("rank", _int),
        ("start", _int),
        ("size", _int),
        ("scale", _float),
        ("half", ctypes.c_int32),
    )


class CAdapter(ctypes.Structure):
    """`Adapter` of step.h."""

    _fields_ = (("parts", ctypes.POINTER(CPart)), ("first", _pointer))


class CGroup(ctypes.Structure):
    """`Group` of step.h."""

    _fields_ = (("adapter", _pointer), ("token", _pointer), ("weight", _pointer), ("count", _int), ("lows", _int))


_STRUCTURES = {"CModel": CModel, "CStep": CStep}
BYTES = Kernel(
    "anabranch_decode_bytes", "model: CModel, tokens: int64, lows: int64", structures=_STRUCTURES, result="int64"
)
STEP = Kernel(
    "anabranch_decode",
    "model: CModel, step: CStep, first: int64, last: int64, threads",
    structures=_STRUCTURES,
    result="status",
)
EXPERTS = Kernel(
    "anabranch_decode_experts",
    "model: CModel, step: CStep, block: int64, slot_of: int32[E] array, E, slots: int64, threads",
    structures=_STRUCTURES,
    result="status",
)


def floats(value: Tensor | None, keep: list[Tensor], *sizes: int) -> int | None:
    """Where a contiguous float32 copy of ``value``, which must be of this shape, stands; ``keep`` owns it."""
    if value is None:
        return None
    keep.append(value.detach().float().contiguous())
    return address(keep[-1], "float32", *sizes)


def check_sizes(model: CModel) -> None:
    """Raise ConfigError for a matrix that is not of the size that its place in the model asks for."""
    for number in range(model.layers):
        block = model.blocks[number]
        dim, query = model.dim, model.heads * model.width
        wanted: list[tuple[str, Matrix, int, int]] = []
        if block.qkv.rows:
            wanted += [
                ("qkv", block.qkv, query + 2 * model.kv_heads * model.width, dim),
                ("out", block.out, dim, query),
            ]
        experts = block.experts
        pairs = (("w13", block.w13, block.w2), ("experts", experts.w13, experts.w2))
        for name, first, second in (*pairs, ("shared experts", experts.shared13, experts.shared2)):
            if first.rows or second.rows:
                wanted += [(name, first, 2 * second.depth, dim), (name, second, dim, min(second.depth, model.hidden))]
        recurrence = experts.recurrence
        if recurrence.projector.rows:
            state = model.state
            wanted.append(("the router's projector", recurrence.projector, state, dim))
            wanted += [("the router's cell", part, 3 * state, state) for part in (recurrence.input, recurrence.hidden)]
        for name, matrix, rows, depth in wanted:
            if (matrix.rows, matrix.depth) != (rows, depth):
                raise ConfigError(
                    f"a matrix of {name} in part {number} is [{matrix.rows}, {matrix.depth}]; the model needs [{rows}, {depth}]"
                )
