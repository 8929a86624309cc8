"""Where each tensor of a model lies on disk and in a device's memory: worked out once, then known to every process.

The dense part, what every device holds, lies in one run. The experts lie in another that has room for every expert of the model at an
offset of its own: pages exist only for those that a device holds, so nothing is ever moved to make room, and an expert has the same
offset on every device.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.tensors import read_header, weight_files
from anabranch.serving.elasticmoe.mapped import PAGE, padded

__all__ = ["Layout", "Matrix", "Tensor", "layout_of"]

# Bytes, so that vector loads of a tensor's start are aligned.
_ALIGN = 64


@dataclass(frozen=True)
class Tensor:
    """One tensor of the dense part: ``bytes`` at ``start`` of ``file`` on disk, at ``offset`` in memory."""

    name: str
    file: str
    start: int
    bytes: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """One matrix of all experts of a layer, stacked on disk.

    Attributes:
        name: of the stacked tensor.
        file, start: where on disk expert 0 begins.
        bytes: of one expert.
        block: bytes of the pages that one takes.
        offset: of expert 0 in memory; expert e is at ``offset + e * block``.
        dtype: name of the numbers' type.
        shape: of one expert.
        experts: how many.
    """

    name: str
    file: str
    start: int
    bytes: int
    block: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    experts: int


@dataclass(frozen=True)
class Layout:
    """A model's tensors.

    Attributes:
        folder: on disk.
        dense: what every device holds.
        dense_bytes: of its run of memory.
        layers: the matrices of each pool of experts.
        expert_run: bytes of addresses for all experts.
        page: bytes of a page, which blocks are rounded up to.
    """

    folder: str
    dense: tuple[Tensor, ...]
    dense_bytes: int
    layers: tuple[tuple[Matrix, ...], ...]
    expert_run: int
    page: int

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Of each layer."""
        return tuple(matrices[0].experts for matrices in self.layers)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the types of all numbers."""
        experts = {matrix.dtype for matrices in self.layers for matrix in matrices}
        return tuple(sorted({tensor.dtype for tensor in self.dense} | experts))

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Memory of one expert of each layer, padding included."""
        return tuple(sum(matrix.block for matrix in matrices) for matrices in self.layers)

    @property
    def expert_starts(self) -> tuple[int, ...]:
        """Where in memory each matrix of each expert begins, ascending."""
        found = (
            m.offset + expert * m.block for matrices in self.layers for m in matrices for expert in range(m.experts)
        )
        return tuple(sorted(found))

    @property
    def padding(self) -> int:
        """Bytes that rounding up to pages costs, over all experts of the model."""
        return sum((m.block - m.bytes) * m.experts for matrices in self.layers for m in matrices)

    @property
    def expert_total(self) -> int:
        """Memory of all experts together."""
        return sum(size * count for size, count in zip(self.expert_bytes, self.num_experts, strict=True))


def layout_of(folder: str | Path, page: int = PAGE) -> Layout:
    """The layout of a model folder in our own format.

    Raises CheckpointError where there is none, ConfigError for a model without experts.
    """
    # They need torch, which the memory manager does without.
    from anabranch.lm.checkpoint import (
        find_model,
        load_config,
        quantization_of,
    )
    from anabranch.lm.tensors import build_empty, state_once

    found = find_model(folder)
    if quantization_of(found) is not None:
        raise ConfigError(
            f"{found} is saved in fewer bits, and devices map experts in floating point; serve the model it was made from, "
            "or this one without --devices"
        )
    stored = _stored(found)
    model = build_empty(load_config(found))
    state = state_once(model)
    missing = [name for name in state if name not in stored]
    if missing:
        raise CheckpointError(
            f"{found} has no tensor {missing[0]}; elastic serving maps models of our own format: anabranch convert {found} NEW_FOLDER"
        )
    pools = pool_names(model)
    if not pools:
        raise ConfigError(f"{found} has no experts, so there is nothing to spread; serve it without --devices")
    stacked = {f"{pool}.{matrix}" for pool in pools for matrix in ("w13", "w2")}
    dense, offset = [], 0
    for name in state:
        if name not in stacked:
            file, start, size, dtype, shape = stored[name]
            dense.append(Tensor(name, file, start, size, offset, dtype, shape))
            offset = padded(offset + size, _ALIGN)
    layers, run = [], 0
    for pool in pools:
        matrices = []
        for matrix in ("w13", "w2"):
            file, start, size, dtype, shape = stored[f"{pool}.{matrix}"]
            each = size // shape[0]
            block = padded(each, page)
            matrices.append(Matrix(f"{pool}.{matrix}", file, start, each, block, run, dtype, shape[1:], shape[0]))
            run += block * shape[0]
        layers.append(tuple(matrices))
    return Layout(str(found), tuple(dense), padded(max(1, offset), page), tuple(layers), run, page)


def pool_names(model: Any) -> list[str]:
    """Names of the pools of experts, each once, in the order of the model.

    Raises ConfigError for one whose experts are not plain SwiGLUs.
    """
    from anabranch.nn.pool import ExpertPool

    pools = {name: module for name, module in model.named_modules() if isinstance(module, ExpertPool)}
    odd = [name for name, pool in pools.items() if not pool.is_plain]
    if odd:
        raise ConfigError(
            f"experts of {odd[0]} are not plain SwiGLUs (biases, another activation, or linears), so they cannot be spread"
        )
    return list(pools)


def _stored(folder: Path) -> dict[str, tuple[str, int, int, str, tuple[int, ...]]]:
    """{tensor: (file, first byte, bytes, dtype, shape)} of a folder's safetensors files."""
    files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
    if not files:
        raise CheckpointError(f"no safetensors files in {folder}; elastic serving reads parts of them")
    found = {}
    for path in files:
        first, entries = read_header(path)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            found[name] = (path.name, first + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found
