"""A decoder's blocks as the structures that `nn/kernels/decode.cpp` reads (see `step.h`), and why a model cannot be told that way."""
# Shapes: D width, F hidden, E experts, W head width

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.lm.decoder import Block, Decoder
from anabranch.nn import MoE, RMSNorm, SwiGLU
from anabranch.nn.attention import Attention
from anabranch.nn.feed_forward import FeedForward
from anabranch.nn.kernels import load
from anabranch.nn.kernels.packed import Matrix
from anabranch.nn.packed import SHARE, Kind
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool
from anabranch.routing.router import Router
from anabranch.routing.score import LinearScore
from anabranch.routing.select import TopK

__all__ = ["CBlock", "CExperts", "CModel", "CStep", "products", "why_not"]

KIND_OF: dict[torch.dtype, Kind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
STEP, MOST_GROUP, MOST_WIDTH = 16, 16, 256  # of step.h; heads are whole vectors of floats

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CExperts(ctypes.Structure):
    """`Experts` of step.h."""

    _fields_ = (
        ("router", _pointer), ("bias", _pointer), ("gate", _pointer),
        ("w13", Matrix), ("w2", Matrix), ("shared13", Matrix), ("shared2", Matrix),
        ("count", _int), ("top_k", _int), ("activation", _int), ("normalize", _int),
        ("scale", _float), ("number", ctypes.c_int32),
    )  # fmt: skip


class CBlock(ctypes.Structure):
    """`Block` of step.h."""

    _fields_ = (
        ("attention_norm", _pointer), ("feed_forward_norm", _pointer),
        ("qkv_bias", _pointer), ("out_bias", _pointer), ("q_norm", _pointer), ("k_norm", _pointer),
        ("key", _pointer), ("value", _pointer),
        ("qkv", Matrix), ("out", Matrix), ("w13", Matrix), ("w2", Matrix), ("experts", CExperts),
    )  # fmt: skip


class CModel(ctypes.Structure):
    """`Model` of step.h."""

    _fields_ = (
        *((name, _int) for name in ("layers", "dim", "heads", "kv_heads", "width", "hidden", "block_tokens")),
        ("most_experts", _int), ("most_top_k", _int),
        ("norm_eps", _float), ("qk_eps", _float), ("clip", _float), ("qk_norm", ctypes.c_int32), ("half_store", ctypes.c_int32),
        ("last_norm", _pointer), ("blocks", ctypes.POINTER(CBlock)),
    )  # fmt: skip


class CStep(ctypes.Structure):
    """`Step` of step.h."""

    _fields_ = (
        ("tokens", _int), ("sequence", _pointer), ("sequences", _int), ("table", _pointer),
        ("cos", _pointer), ("sin", _pointer), ("x", _pointer), ("routes", _pointer),
    )  # fmt: skip


def why_not(model: Decoder) -> str | None:
    """Why the compiled step cannot run this model, or None if it can."""
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return "the model is not on the CPU"
    if model.streams is not None:
        return "the model runs as parallel streams"
    if type(model).hidden is not Decoder.hidden:
        return f"{type(model).__name__} runs its layers its own way"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} is watched by hooks"
    for number, block in enumerate(model.blocks):
        reason = _of_block(block)
        if reason:
            return f"layer {number}: {reason}"
    if load() is None:
        return "the compiled kernels could not be built here, or ANABRANCH_NO_KERNELS is set"
    return None


def products(block: Any) -> Iterator[nn.Module]:
    """The modules of a supported block that multiply by large matrices: linear layers and pools."""
    yield from (block.attention.qkv, block.attention.out)
    layer = block.feed_forward
    if not isinstance(layer, MoE):
        yield from (layer.w13, layer.w2)
        return
    yield layer.experts
    if layer.shared is not None:
        yield from (layer.shared.w13, layer.shared.w2)


def _of_block(block: nn.Module) -> str | None:
    if type(block) is not Block:
        return f"a {type(block).__name__} is not a plain block"
    if type(block.attention) is not Attention:
        return f"attention is a {type(block.attention).__name__}"
    attention: Any = block.attention
    norms = [block.attention_norm, block.feed_forward_norm]
    if attention.config.qk_norm != "none":
        norms += [attention.q_norm, attention.k_norm]
    if any(type(norm) is not RMSNorm for norm in norms):
        return "a norm is not an RMSNorm"
    if attention.head_dim % STEP or attention.head_dim > MOST_WIDTH:
        return f"heads are {attention.head_dim} wide; the kernels take multiples of {STEP} up to {MOST_WIDTH}"
    if attention.num_heads // attention.num_kv_heads > MOST_GROUP:
        return f"more than {MOST_GROUP} query heads share a key head"
    reason = _of_feed_forward(block.feed_forward)
    return reason or next((why for module in products(block) if (why := _of_product(module))), None)


def _of_feed_forward(layer: nn.Module) -> str | None:
    if type(layer) is SwiGLU:
        return None
    kind: Any = type(layer)
    if not isinstance(layer, MoE) or any(
        getattr(kind, name) is not getattr(plain, name)
        for name, plain in (("forward", MoE), ("run", MoE), ("add_to", FeedForward))
    ):
        return f"the feed-forward is a {kind.__name__}"
    router: Any = layer.router
    if type(router) is not Router or type(router.score) is not LinearScore or type(router.select) is not TopK:
        return "the router is not a plain linear top-k"
    if router.candidates is not None:
        return "the router's candidates change"
    if layer.config.weight_on != "output":
        return "routing weights act on the experts' inputs"
    if type(layer.shared) not in (SwiGLU, type(None)) or type(layer.shared_gate) not in (nn.Linear, type(None)):
        return "the shared experts were replaced"
    return None


def _of_product(module: Any) -> str | None:
    if type(module) in (QuantizedLinear, QuantizedPool):
        return None
    if type(module) not in (nn.Linear, ExpertPool):
        return f"a {type(module).__name__} stands where a linear layer or a pool should"
    weights = (module.weight,) if type(module) is nn.Linear else (module.w13, module.w2)
    for weight in weights:
        if weight.dtype not in KIND_OF:
            return f"weights are {weight.dtype}"
        if weight.shape[-1] % SHARE:
            return f"a matrix has {weight.shape[-1]} inputs; the kernels take multiples of {SHARE}"
    return None


def floats(value: Tensor | None, keep: list[Tensor]) -> int | None:
    """Where a contiguous float32 copy of ``value`` stands; ``keep`` owns it."""
    if value is None:
        return None
    keep.append(value.detach().float().contiguous())
    return keep[-1].data_ptr()
