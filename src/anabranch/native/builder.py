"""Building the library: once for all processes that want it, in the cache folder; a failure is remembered."""

import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anabranch.errors import BackendError
from anabranch.files import atomic_file
from anabranch.locks import locked
from anabranch.native.compiler import Compiler, find_compiler
from anabranch.native.isa import NATIVE, Isa
from anabranch.native.sources import SOURCES, flags_for, library_name
from anabranch.native.stored import Failure, Library, opened, read_failure, read_library, record, record_failure
from anabranch.places import cache_folder, make_cache

__all__ = ["build", "compile_kernels"]

log = logging.getLogger(__name__)

_WAIT_S = 600.0  # for the other process, which may have been stopped or hang; compiling takes a minute or two
_STALE_S = 3600.0  # after which nobody works on a file any more
# What a compiler says when the machine, not the source, was the reason; the next process may have more luck.
_TRANSIENT = re.compile(
    r"killed|no space left|quota exceeded|cannot allocate|out of memory|memory exhausted|temporarily unavailable|too many open files"
    r"|\b(terminated|interrupt|hangup) signal|: (terminated|interrupt|hangup)\b",
    re.IGNORECASE,
)


def build(*, again: bool = False) -> Library:
    """The library for this very machine, compiled into the cache folder unless one that can be loaded lies there.

    Processes that ask at once wait for the first, up to ten minutes. What a compiler could not do is remembered until the compiler or
    the sources change.

    Args:
        again: try a compiler that is known to have failed.

    Raises BackendError if there is no compiler, it refuses the sources or makes what cannot be loaded, or the other process does not
    come to an end; DataError or CapacityError if the cache folder cannot be written.
    """
    folder = cache_folder() / "kernels"
    with _one_at_a_time(folder):
        found = read_library(folder, NATIVE)
        if found is not None and why_not_loaded(found) is None:
            return found
        compiler = find_compiler()
        failure = None if again else read_failure(folder, NATIVE)
        if failure is not None and failure.compiler == compiler.name:
            raise BackendError(f"{failure.reason} (before; `anabranch doctor --build` tries again)")
        log.warning("compiling the CPU kernels, once for this machine (under a minute on two cores), into %s", folder)
        try:
            return compile_kernels(NATIVE, folder, compiler)
        except BackendError as error:
            if not _TRANSIENT.search(str(error)):
                record_failure(folder, NATIVE, Failure(compiler.name, str(error)))
            raise


def compile_kernels(isa: Isa, folder: Path, compiler: Compiler) -> Library:
    """Compile the library for ``isa`` into ``folder``.

    Raises BackendError with the compiler's message, or where this machine cannot load what was made for it; nothing is put into the
    folder then.
    """
    begin = time.monotonic()
    path = folder / library_name(isa)
    with atomic_file(path) as temporary:
        compiler.make_library(SOURCES, flags_for(isa), temporary)
        reason = why_not_loaded(Library(temporary, isa.name, compiler.name, 0.0)) if isa == NATIVE else None
        if reason is not None:
            reason = reason.replace(str(temporary), path.name)
            raise BackendError(f"{compiler.name} made kernels that cannot be loaded: {reason}")
    return record(path, isa, compiler.name, time.monotonic() - begin)


def why_not_loaded(library: Library) -> str | None:
    """Why the system cannot load ``library``, or None if it can."""
    try:
        opened(library)
    except OSError as error:
        return str(error)
    return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock on building into ``folder``, which is made first. Raises BackendError if another process keeps it too long."""
    make_cache(folder)
    with locked(
        folder / f".{library_name(NATIVE)}.lock",
        wait_s=_WAIT_S,
        on_wait=lambda: log.warning("another process compiles the CPU kernels; waiting for it"),
    ) as alone:
        if not alone:
            raise BackendError(
                f"another process has been compiling the kernels into {folder} for over {_WAIT_S:.0f} s; end it if it hangs"
            )
        _clear(folder)
        yield


def _clear(folder: Path) -> None:
    """Remove what builders that were killed long ago have left."""
    for path in folder.glob(f".{library_name(NATIVE)}.*"):
        with suppress(OSError):  # another machine that shares the folder may have been quicker
            if path.suffix == ".lock" or time.time() - path.stat().st_mtime < _STALE_S:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
