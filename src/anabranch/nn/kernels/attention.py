"""The compiled attention behind tensors: causal, float32 or bfloat16, forward and backward."""
# Shapes: B sequences, H query heads, G key heads, L queries, M entries in front, S = M + L keys, D head width

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.expert_mlp import STEP
from anabranch.nn.kernels.operands import takes

__all__ = ["backward", "can", "forward"]

# Scores of a block of queries on all keys must stay in a core's cache.
MOST_KEYS = 4096
MOST_WIDTH = 256
_WHERE = (f"0 < D <= {MOST_WIDTH}", f"D % {STEP} == 0", f"L <= S <= {MOST_KEYS}", "G > 0", "H % G == 0")


def _kernels(name: str, dtype: str) -> tuple[Kernel, Kernel]:
    """Forward and backward for tensors of one dtype."""
    inputs = f"query: {dtype}[B, H, L, D] rows, key: {dtype}[B, G, S, D] rows, value: {dtype}[B, G, S, D] rows"
    forward = Kernel(
        f"{name}_forward",
        f"""{inputs}, y: {dtype}[B, H, L, D] rows out,
        log_sum: float32[B, H, L] out, strides(query, key, value, y), B, H, G, L, S, D, scale: float, threads""",
        where=_WHERE,
        result="status",
    )
    backward = Kernel(
        f"{name}_backward",
        f"""{inputs}, y: {dtype}[B, H, L, D] rows,
        dy: {dtype}[B, H, L, D] rows, dquery: {dtype}[B, H, L, D] rows out, dkey: {dtype}[B, G, S, D] rows out,
        dvalue: {dtype}[B, G, S, D] rows out, log_sum: float32[B, H, L], strides(query, key, value, y, dy, dquery, dkey, dvalue),
        B, H, G, L, S, D, scale: float, threads""",
        where=_WHERE,
        result="status",
    )
    return forward, backward


KERNELS = {
    torch.float32: _kernels("anabranch_attention", "float32"),
    torch.bfloat16: _kernels("anabranch_attention_half", "bfloat16"),
}


def can(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> bool:
    """Whether the kernels take this: all float32 or all bfloat16 on a CPU, heads of a multiple of 16, not too long."""
    tensors = (query_BHLD, key_BGSD, value_BGSD)
    dtype = query_BHLD.dtype
    if dtype not in KERNELS or any(part.dtype != dtype for part in tensors) or not takes(*tensors):
        return False
    if any(part.dim() != 4 or part.numel() == 0 for part in tensors) or key_BGSD.shape != value_BGSD.shape:
        return False
    (batch, heads, queries, width), (key_batch, key_heads, keys, key_width) = query_BHLD.shape, key_BGSD.shape
    if batch != key_batch or width != key_width:
        return False
    if width == 0 or width % STEP or width > MOST_WIDTH or key_heads == 0 or heads % key_heads:
        return False
    return 0 < keys <= MOST_KEYS and queries <= keys and load() is not None


def forward(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
    """y_BHLD, laid out as the query, and the logarithm of each softmax's sum, [B, H, L]."""
    tensors = [_rows(part) for part in (query_BHLD, key_BGSD, value_BGSD)]
    tensors.append(torch.empty_like(tensors[0]))
    log_sum_BHL = query_BHLD.new_empty(query_BHLD.shape[:3], dtype=torch.float32)
    KERNELS[query_BHLD.dtype][0](*tensors, log_sum_BHL, query_BHLD.shape[3] ** -0.5)
    return tensors[3], log_sum_BHL


def backward(
    dy_BHLD: Tensor, query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, y_BHLD: Tensor, log_sum_BHL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each laid out as what it is the gradient of."""
    tensors = [_rows(part) for part in (query_BHLD, key_BGSD, value_BGSD, y_BHLD, dy_BHLD)]
    tensors += [torch.empty_like(part) for part in tensors[:3]]
    KERNELS[query_BHLD.dtype][1](*tensors, log_sum_BHL, query_BHLD.shape[3] ** -0.5)
    return tensors[5], tensors[6], tensors[7]


def _rows(part: Tensor) -> Tensor:
    """The tensor, its last dimension in one piece and no two elements in one place."""
    if part.stride(-1) == 1 and 0 not in part.stride():
        return part
    # `contiguous` would leave strides of 0 where a tensor is contiguous by its sizes alone.
    return part.clone(memory_format=torch.contiguous_format)
