"""The compiled attention behind tensors: causal, float32, forward and backward."""
# Shapes: B sequences, H query heads, G key heads, L queries, M entries in front, S = M + L keys, D head width

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.kernels.expert_mlp import STEP

__all__ = ["backward", "can", "forward"]

MOST_KEYS = 4096  # scores of a block of queries on all keys must stay in a core's cache
MOST_WIDTH = 256


def can(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> bool:
    """Whether the kernels take this: float32 on a CPU, heads of a multiple of 16, not too long."""
    tensors = (query_BHLD, key_BGSD, value_BGSD)
    if any(part.device.type != "cpu" or part.dtype != torch.float32 for part in tensors):
        return False
    width, keys = query_BHLD.shape[-1], key_BGSD.shape[2]
    return width % STEP == 0 and width <= MOST_WIDTH and 0 < keys <= MOST_KEYS and load() is not None


def forward(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
    """y_BHLD, laid out as the query, and the logarithm of each softmax's sum, [B, H, L]."""
    tensors = [_rows(part) for part in (query_BHLD, key_BGSD, value_BGSD)]
    tensors.append(torch.empty_like(tensors[0]))
    log_sum_BHL = query_BHLD.new_empty(query_BHLD.shape[:3])
    _call("anabranch_attention_forward", tensors, log_sum_BHL)
    return tensors[3], log_sum_BHL


def backward(
    dy_BHLD: Tensor, query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, y_BHLD: Tensor, log_sum_BHL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each laid out as what it is the gradient of."""
    tensors = [_rows(part) for part in (query_BHLD, key_BGSD, value_BGSD, y_BHLD, dy_BHLD)]
    tensors += [torch.empty_like(part) for part in tensors[:3]]
    _call("anabranch_attention_backward", tensors, log_sum_BHL)
    return tensors[5], tensors[6], tensors[7]


def _rows(part: Tensor) -> Tensor:
    """The tensor, its last dimension in one piece and no two elements in one place."""
    return part if part.stride(-1) == 1 and 0 not in part.stride() else part.contiguous()


def _call(name: str, tensors: Sequence[Tensor], log_sum_BHL: Tensor) -> None:
    library = load()
    assert library is not None, "callers ask can first"
    query, key = tensors[0], tensors[1]
    strides = [stride for part in tensors for stride in part.stride()[:3]]
    pointers = (ctypes.c_void_p(part.data_ptr()) for part in (*tensors, log_sum_BHL))
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3])
    getattr(library, name)(
        *pointers,
        (ctypes.c_int64 * len(strides))(*strides),
        *map(ctypes.c_int64, sizes),
        ctypes.c_float(query.shape[3] ** -0.5),
        torch.get_num_threads(),
    )
