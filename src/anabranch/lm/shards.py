"""Writing named tensors in shards. Those that do not exist yet are made when their turn comes, so that no model need be in memory whole."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from anabranch.errors import CheckpointError
from anabranch.lm.tensors import BLOCK, DTYPE_NAMES, DTYPES

__all__ = ["MAX_SHARD_BYTES", "Later", "file_size", "write_file", "write_tensors"]

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, eq=False)
class Later:
    """A tensor that is made when it is written.

    Attributes:
        shape, dtype: of it.
        make: gives it under its name, and with it those that are made together: they have the same ``make``, which is called once a file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Mapping[str, Tensor | Later], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write ``model.safetensors`` into ``folder``, or shards of at most ``max_shard_bytes`` with an index.

    Tensors are copied one at a time, and only where they are not on the CPU or not contiguous.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: tensors[name] for name in names})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Tensor | Later]) -> None:
    """Write a safetensors file whose large tensors can be read past the page cache straight to where they are wanted.

    The format leaves the order of tensors to the writer, and allows spaces behind the header. The `safetensors` package orders by name, so
    that an expert begins anywhere; here the tensors that fill whole blocks come first, and begin at one.

    Raises OSError, CheckpointError for a type that the format has not.
    """
    text, start_of, _ = _header(tensors)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for name, start in start_of.items():
            tensor = tensors[name]
            if isinstance(tensor, Tensor):
                file.seek(begin + start)
                _write(file, tensor)
        for made in _together(tensors):
            for name, tensor in made.items():
                if name in start_of:
                    file.seek(begin + start_of[name])
                    _write(file, tensor)


def file_size(tensors: Mapping[str, Tensor | Later]) -> int:
    """Bytes of the file that `write_file` would write. Tensors need no numbers: those of the device ``meta`` will do.

    Raises CheckpointError for a type that the format has not.
    """
    text, _, end = _header(tensors)
    return 8 + len(text) + end


def _header(tensors: Mapping[str, Tensor | Later]) -> tuple[bytes, dict[str, int], int]:
    """(the header as it is written behind its length, where each tensor begins behind it, in the file's order, and bytes of all)."""
    names = sorted(tensors, key=lambda name: tensors[name].nbytes % BLOCK != 0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start_of: dict[str, int] = {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which cannot be saved; known: {', '.join(DTYPES)}")
        end += tensor.nbytes
        start_of[name] = start
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-(len(text) + 8) % BLOCK), start_of, end


def _together(tensors: Mapping[str, Tensor | Later]) -> Iterator[Mapping[str, Tensor]]:
    """What has to be made, a part at a time; nothing of it is kept."""
    makers = dict.fromkeys(tensor.make for tensor in tensors.values() if isinstance(tensor, Later))
    for make in makers:
        yield make()


def _write(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)


def _shards(tensors: Mapping[str, Tensor | Later], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names
