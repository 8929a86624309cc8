"""Which models the compiled step knows: `why_not` says what stands in the way."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from anabranch.lm.decoder import Decoder
from anabranch.nn import RMSNorm
from anabranch.nn.attention import SelfAttention
from anabranch.nn.block import PreNorm
from anabranch.nn.description import Passes
from anabranch.nn.kernels import load
from anabranch.nn.kernels.operands import takes, why_refused
from anabranch.nn.linear import is_plain, takes_context
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.packed import SHARE
from anabranch.nn.parted import PartedLinear
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool
from anabranch.serving.fast.heads import plain_of, why_not_weigh
from anabranch.serving.fast.layout import KIND_OF
from anabranch.serving.fast.routed import form_of, why_not_run

__all__ = ["products", "why_not"]

# Of step.h; heads are whole vectors of floats.
STEP, MOST_GROUP, MOST_WIDTH = 16, 16, 256


def why_not(model: Decoder) -> str | None:
    """Why the compiled step cannot run this model, or None if it can."""
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return "the model is not on the CPU"
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not takes(tensor):
            return why_refused(**{name: tensor})
    if model.streams is not None:
        return "the model runs as parallel streams"
    if model.config.norm_offset or model.config.embedding_scale != 1.0:
        return "norms or embeddings are scaled"
    if model.config.rotary.fraction != 1.0:
        return "a part of each head is not rotated"
    if type(model).hidden is not Decoder.hidden:
        return f"{type(model).__name__} runs its layers its own way"
    for name, module in model.named_modules():
        # Steps do not call the model itself.
        if name and (module._forward_hooks or module._forward_pre_hooks):
            return f"{name} is watched by hooks"
    for number, block in enumerate(model.blocks):
        reason = _of_block(block)
        if reason:
            return f"layer {number}: {reason}"
    if takes_context(model.head):
        return f"the head is a {type(model.head).__name__}"
    if load() is None:
        return "the compiled kernels could not be built here, or ANABRANCH_NO_KERNELS is set"
    return None


def products(block: Any) -> Iterator[nn.Module]:
    """The modules of a supported block that multiply by large matrices of their own: linear layers and pools."""
    attention = plain_of(block.attention)
    yield from (attention.qkv, attention.out)
    form = form_of(block.feed_forward)
    if not isinstance(form, Passes):
        yield from (form.w13, form.w2)
        return
    if not isinstance(form.experts, OffloadedPool):
        yield form.experts
    if form.shared is not None:
        yield from (form.shared.w13, form.shared.w2)


def _of_block(block: nn.Module) -> str | None:
    if type(block) is not PreNorm:
        return f"a {type(block).__name__} is not a plain block"
    reason = why_not_weigh(block.attention)
    if reason is not None:
        return reason
    attention: Any = plain_of(block.attention)
    if type(attention) is not SelfAttention:
        return f"attention is a {type(attention).__name__}"
    if not attention.config.is_plain:
        return "attention has a window, sinks, a scale or a temperature"
    if attention.rotary is not None:
        return "attention has rotary positions of its own"
    norms: list[Any] = [block.attention_norm, block.feed_forward_norm]
    if attention.config.qk_norm != "none":
        norms += [attention.q_norm, attention.k_norm]
    if any(type(norm) is not RMSNorm for norm in norms):
        return "a norm is not an RMSNorm"
    if attention.head_dim % STEP or attention.head_dim > MOST_WIDTH:
        return f"heads are {attention.head_dim} wide; the kernels take multiples of {STEP} up to {MOST_WIDTH}"
    if attention.num_heads // attention.num_kv_heads > MOST_GROUP:
        return f"more than {MOST_GROUP} query heads share a key head"
    reason = why_not_run(block.feed_forward) or _of_slots(block.feed_forward)
    return reason or next((why for module in products(block) if (why := _of_product(module))), None)


def _of_slots(layer: Any) -> str | None:
    form = form_of(layer)
    if not isinstance(form, Passes) or not isinstance(form.experts, OffloadedPool):
        return None
    pool = form.experts
    if not pool.is_plain:
        return "experts are not plain SwiGLUs"
    if pool.packed is not None:
        return None
    return next((why for weight in (pool.w13_SFD, pool.w2_SDF) if (why := _of_weight(weight))), None)


def _of_product(module: Any) -> str | None:
    if type(module) in (QuantizedLinear, PartedLinear):
        return None
    if isinstance(module, QuantizedPool):
        return None if module.is_plain else "experts are not plain SwiGLUs"
    if not isinstance(module, ExpertPool) and not is_plain(module):
        return f"a {type(module).__name__} stands where a linear layer or a pool should"
    if isinstance(module, ExpertPool) and not module.is_plain:
        return "experts are not plain SwiGLUs"
    weights = module.stacks if isinstance(module, ExpertPool) else (module.weight,)
    return next((why for weight in weights if (why := _of_weight(weight))), None)


def _of_weight(weight: Tensor) -> str | None:
    if weight.dtype not in KIND_OF:
        return f"weights are {weight.dtype}"
    if weight.shape[-1] % SHARE:
        return f"a matrix has {weight.shape[-1]} inputs; the kernels take multiples of {SHARE}"
    return None
