"""The compiled CPU kernels: built on first use by the system's C++ compiler, kept in the user's cache folder, never required.

They lie in `anabranch.files.cache_folder`. A library's name there is a hash of its source, compiler, flags and this machine's
instruction set, so an upgrade or another machine builds its own. Processes that race each build and rename a whole file.
Where there is no compiler, or with ANABRANCH_NO_KERNELS=1, `load` returns None, says so once in the log, and everything runs
in plain PyTorch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from anabranch.errors import AnabranchError, BackendError
from anabranch.files import atomic_file, cache_folder

__all__ = ["load"]

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = tuple(
    HERE / f"{name}.cpp"
    for name in (
        *("expert_mlp", "attention", "paged_attention", "packed", "decode", "read", "rows", "transfers"),
        *("path_step", "regroup"),
    )
)
HEADERS = tuple(HERE / f"{name}.h" for name in ("matmul", "packed", "step", "step_attention", "step_work"))
# -O3 without -ffast-math: sums keep their order, NaN and infinities their meaning.
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had; the log says why."""
    if os.environ.get("ANABRANCH_NO_KERNELS", "0") not in ("", "0"):
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (AnabranchError, OSError) as error:
        log.warning("no compiled kernels, running in plain PyTorch: %s", error)
        return None
    for name in ("anabranch_expert_forward", "anabranch_expert_backward"):
        getattr(library, name).restype = ctypes.c_int
    for name in (
        "anabranch_read_direct",
        "anabranch_decode_bytes",
        "anabranch_transfers_wait",
        "anabranch_transfers_take",
    ):
        getattr(library, name).restype = ctypes.c_int64
    library.anabranch_transfers_new.restype = ctypes.c_void_p
    return library


def build() -> Path:
    """Compile the kernels unless this very build exists, and return the library's path.

    Raises BackendError if there is no compiler or it refuses the source, DataError or CapacityError if the cache folder
    cannot be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BackendError("no C++ compiler found; install g++ or set CXX")
    command = [*compiler.split(), *FLAGS]
    path = cache_folder() / "kernels" / f"kernels-{_fingerprint(command)}.so"
    if not path.exists():
        log.info("compiling the kernels into %s", path)
        with atomic_file(path) as temporary:
            done = subprocess.run(
                [*command, *map(str, SOURCES), "-o", str(temporary)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BackendError(f"{compiler} could not compile the kernels: {done.stderr.strip()[-800:]}")
    return path


def _fingerprint(command: list[str]) -> str:
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise BackendError(
            f"cannot run the C++ compiler {command[0]!r}: {error.strerror}; install g++ or set CXX"
        ) from error
    cpu = platform.machine() + platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        cpu += next(
            (line for line in information.read_text().splitlines() if line.startswith(("flags", "Features"))), ""
        )
    texts = [path.read_text() for path in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\0".join([*texts, *command, version, cpu]).encode()).hexdigest()[:24]
