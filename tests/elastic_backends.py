"""The backends that tests of elastic serving run over, and how to write and see bytes of any of them."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from anabranch.serving.elasticmoe.backend import Backend, Pages, Range
from anabranch.serving.elasticmoe.dlpack import tensor_over

SOURCE = Path(__file__).parent / "serving/elasticmoe/standin_cuda.c"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
BACKENDS = [
    "cpu",
    pytest.param("standin", id="standin"),
    pytest.param("standin-2", id="standin-2"),  # of two GPUs
    pytest.param("cuda", marks=NEEDS_GPU),
]


def compile_standin(folder: Path) -> Path | None:
    """The stand-in for the driver's library; None where there is no C compiler or no Linux."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not hasattr(os, "memfd_create"):
        return None
    library = folder / "standin_cuda.so"
    subprocess.run(
        [*compiler.split(), "-O1", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library)], check=True
    )
    return library


class Standin:
    """What only a stand-in can tell: see the functions ``standin_...`` of its source."""

    KINDS = ("handles", "mappings", "reservations", "pinned", "streams", "contexts", "bytes")

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def held(self) -> dict[str, int]:
        """What this process has not given back."""
        found = (ctypes.c_longlong * len(self.KINDS))()
        self._library.standin_held(found)
        return {kind: count for kind, count in zip(self.KINDS, found, strict=True) if count}

    def fail(self, name: str, after: int = 1) -> None:
        """Let the n-th call of this name from now on fail, once, for lack of memory."""
        self._library.standin_fail(name.encode(), after)


def write(pages: Pages, offset: int, data: bytes) -> None:
    """Through a file, the way that weights come."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        assert pages.read(offset, file.fileno(), 0, len(data)) == len(data)


def seen(part: Range, size: int) -> bytes:
    """The first bytes of a range, through a tensor over it."""
    return tensor_over(part.address, size, part.place).cpu().numpy().tobytes()


def bytes_of(backend: Backend, pages: Pages, offset: int, block: int, size: int) -> bytes:
    """The first bytes of a block."""
    part = backend.range(0, 1, block)
    part.remap(pages, [offset])
    found = seen(part, size)
    part.close()
    return found
