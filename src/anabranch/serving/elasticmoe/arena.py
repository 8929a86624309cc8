"""A device's weights in an executing process: tensors over the memory manager's pages, without a copy.

`ExpertArena` makes the experts of one layer on one device look like one ``[E_local, ...]`` tensor for each matrix, whatever pages they
are in: a run of addresses is reserved, and each expert's block is mapped into its slot. After a change of the placement `remap` changes
the mappings of what came and went; what stays keeps its pages, and nothing is copied (the paper's `vpage-remap`).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.serving.elasticmoe.backend import Backend, Mappable, Range
from anabranch.serving.elasticmoe.dlpack import tensor_over
from anabranch.serving.elasticmoe.layout import Matrix
from anabranch.serving.elasticmoe.mapped import HOST
from anabranch.serving.elasticmoe.memory import Attached

__all__ = ["DenseArena", "ExpertArena", "KvArena", "torch_dtype"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def torch_dtype(name: str) -> torch.dtype:
    """The type that a safetensors file calls ``name``."""
    return _DTYPES[name]


def _bytes(part: Range, size: int) -> Tensor:
    """The first ``size`` bytes of a range, where they are."""
    return tensor_over(part.address, size, part.place)


class ExpertArena:
    """The experts of one layer that a device holds.

    Args:
        matrices: of the layer; each gets a range of its own.
        copies: copy instead of mapping, see `anabranch.serving.elasticmoe.mapped.Range`.
        backend: whose memory it is.
        device: of this process.
    """

    def __init__(
        self, matrices: tuple[Matrix, ...], *, copies: bool | None = None, backend: Backend = HOST, device: int = 0
    ) -> None:
        self.matrices = matrices
        self.ranges = [
            backend.range(device, matrix.experts, matrix.block, copies=copies, huge=matrix.block >= 2 << 20)
            for matrix in matrices
        ]
        self.experts: tuple[int, ...] = ()

    def remap(self, pages: Mappable, experts: tuple[int, ...]) -> tuple[int, int]:
        """Let slot i hold ``experts[i]`` of the device's pages; gives how many blocks were mapped and how many stayed.

        Tensors of before show the new experts where their slots changed: do not run them meanwhile.
        """
        done = [
            part.remap(pages, [matrix.offset + expert * matrix.block for expert in experts])
            for matrix, part in zip(self.matrices, self.ranges, strict=True)
        ]
        self.experts = experts
        return sum(mapped for mapped, _ in done), sum(kept for _, kept in done)

    def tensors(self) -> tuple[Tensor, ...]:
        """``[E_local, *shape]`` of each matrix; contiguous where a block is whole pages, else with padding between experts."""
        return tuple(self._tensor(matrix, part) for matrix, part in zip(self.matrices, self.ranges, strict=True))

    def _tensor(self, matrix: Matrix, part: Range) -> Tensor:
        dtype, count = torch_dtype(matrix.dtype), len(self.experts)
        # Nothing is ever computed with it, so it may be anywhere.
        if not count:
            return torch.empty((0, *matrix.shape), dtype=dtype)
        flat = _bytes(part, count * matrix.block).view(dtype)
        inner = [math.prod(matrix.shape[axis + 1 :]) for axis in range(len(matrix.shape))]
        return flat.as_strided((count, *matrix.shape), (matrix.block // dtype.itemsize, *inner))

    def close(self) -> None:
        """Give the addresses back; no tensor of the arena may be used after."""
        for part in self.ranges:
            part.close()


class DenseArena:
    """The dense part: every tensor that all devices hold."""

    def __init__(self, attached: Attached, *, copies: bool | None = None) -> None:
        self.layout = attached.layout
        self.range = attached.backend.range(attached.device, 1, attached.layout.dense_bytes, copies=copies)
        self.range.remap(attached.dense, [0])

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        flat = _bytes(self.range, self.layout.dense_bytes)
        return {
            entry.name: flat[entry.offset : entry.offset + entry.bytes].view(torch_dtype(entry.dtype)).view(entry.shape)
            for entry in self.layout.dense
        }

    def give_to(self, model: nn.Module) -> None:
        """Make them the parameters and buffers of a model that was built empty; its experts stay empty.

        Buffers that are in no file go to where the weights are.
        """
        shared, names = self.state(), {}
        own: dict[str, Any] = model.state_dict(keep_vars=True)
        by_tensor = {id(own[name]): tensor for name, tensor in shared.items()}
        for name, tensor in own.items():
            if id(tensor) in by_tensor:
                value = by_tensor[id(tensor)]
                names[name] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        model.load_state_dict(names, strict=False, assign=True)
        device = next(iter(shared.values())).device
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def close(self) -> None:
        """Give the addresses back; no tensor of the arena may be used after."""
        self.range.close()


class KvArena:
    """A device's key-value cache, as two tensors that every process of the device shares."""

    def __init__(self, attached: Attached) -> None:
        self.range = attached.backend.range(attached.device, 1, attached.kv_bytes, is_writable=True, copies=False)
        self.range.remap(attached.kv, [0])
        self.bytes = attached.kv_bytes

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(key, value) of ``shape``: the two halves of the memory."""
        size = math.prod(shape) * dtype.itemsize
        flat = _bytes(self.range, self.bytes)
        halves = (flat[:size], flat[self.bytes // 2 : self.bytes // 2 + size])
        return halves[0].view(dtype).view(shape), halves[1].view(dtype).view(shape)

    def close(self) -> None:
        """Give the addresses back; no tensor of the arena may be used after."""
        self.range.close()
