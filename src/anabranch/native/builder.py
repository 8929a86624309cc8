"""Building the library: once for all processes that want it, in the cache folder; a failure is remembered."""

import fcntl
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.errors import BackendError, DataError
from anabranch.files import atomic_file, cache_folder
from anabranch.native.compiler import Compiler, find_compiler
from anabranch.native.isa import NATIVE, Isa
from anabranch.native.sources import SOURCES, flags_for, library_name
from anabranch.native.stored import Failure, Library, read_failure, read_library, record, record_failure

__all__ = ["build", "compile_kernels"]

log = logging.getLogger(__name__)

# What a compiler says when the machine, not the source, was the reason; the next process may have more luck.
_PASSING = re.compile(
    r"killed|no space left|quota exceeded|cannot allocate|out of memory|memory exhausted|temporarily unavailable|too many open files",
    re.IGNORECASE,
)


def build(*, again: bool = False) -> Library:
    """The library for this very machine, compiled into the cache folder unless it lies there.

    Processes that ask at once wait for the first. What a compiler could not do is remembered until the compiler or the
    sources change.

    Args:
        again: try a compiler that is known to have failed.

    Raises BackendError if there is no compiler or it refuses the sources, DataError or CapacityError if the cache folder
    cannot be written.
    """
    folder = cache_folder() / "kernels"
    with _one_at_a_time(folder / f".{library_name(NATIVE)}.lock"):
        found = read_library(folder, NATIVE)
        if found is not None:
            return found
        compiler = find_compiler()
        failure = None if again else read_failure(folder, NATIVE)
        if failure is not None and failure.compiler == compiler.name:
            raise BackendError(f"{failure.reason} (before; `anabranch doctor --build` tries again)")
        log.warning("compiling the CPU kernels, once for this machine (under a minute on two cores), into %s", folder)
        try:
            return compile_kernels(NATIVE, folder, compiler)
        except BackendError as error:
            if not _PASSING.search(str(error)):
                record_failure(folder, NATIVE, Failure(compiler.name, str(error)))
            raise


def compile_kernels(isa: Isa, folder: Path, compiler: Compiler) -> Library:
    """Compile the library for ``isa`` into ``folder``. Raises BackendError with the compiler's message."""
    begin = time.monotonic()
    path = folder / library_name(isa)
    with atomic_file(path) as temporary:
        compiler.make_library(SOURCES, flags_for(isa), temporary)
    return record(path, isa, compiler.name, time.monotonic() - begin)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise DataError(
            f"cannot write the cache {lock.parent}: {error.strerror}; set ANABRANCH_CACHE to a folder of yours"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process compiles the CPU kernels; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: each builds its own, and the last one's stays
            log.info("no lock on %s: %s", lock, error)
        yield
