"""The C++ compiler: which one there is, and running it."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from anabranch import machine
from anabranch.errors import BackendError

__all__ = ["Compiler", "find_compiler"]

_NAMES = ("c++", "g++", "clang++")
_FILE_BYTES = 500_000_000  # memory that compiling one file takes
_LAST_WORDS = 800  # characters of a compiler's message that are kept


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, and the first line it says about its version."""

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        """Command and version, in one line: another one may do what this one could not."""
        return f"{shlex.join(self.command)} ({self.version})"

    def make_library(self, sources: Sequence[Path], flags: Sequence[str], target: Path) -> None:
        """Compile ``sources``, several at a time within the cores and memory of this process, and link them as ``target``.

        Raises BackendError with the compiler's last words.
        """
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            tasks: list[Callable[[], None]] = []
            objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
            # The largest first, or it would be alone at the end.
            for source, made in sorted(zip(sources, objects, strict=True), key=lambda pair: -pair[0].stat().st_size):
                arguments = [*flags, "-c", str(source), "-o", str(made)]
                tasks.append(lambda arguments=arguments: self._run(arguments))  # type: ignore[misc]
            pool = ThreadPoolExecutor(_at_once())
            try:
                for task in as_completed([pool.submit(task) for task in tasks]):
                    task.result()
            finally:
                pool.shutdown(cancel_futures=True)
            self._run([*flags, "-shared", *map(str, objects), "-o", str(target)])

    def _run(self, arguments: Sequence[str]) -> None:
        done = subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            said = done.stderr.strip()[-_LAST_WORDS:] or f"it ended with code {done.returncode}"
            raise BackendError(f"{shlex.join(self.command)} could not compile the kernels: {said}")


def find_compiler() -> Compiler:
    """The compiler that ``CXX`` names, else the first of c++, g++ and clang++. Raises BackendError if there is none that runs."""
    named = os.environ.get("CXX") or next(filter(None, map(shutil.which, _NAMES)), None)
    if named is None:
        raise BackendError("no C++ compiler found; install g++ or set CXX")
    try:
        command = tuple(shlex.split(named)) or (named,)
    except ValueError as error:
        raise BackendError(f"CXX is {named!r}, which is no command: {error}; set it to a C++ compiler") from None
    try:
        said = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", check=False
        ).stdout
    except OSError as error:
        raise BackendError(
            f"cannot run the C++ compiler {command[0]!r}: {error.strerror}; install g++ or set CXX"
        ) from error
    return Compiler(command, said.strip().partition("\n")[0] or "of unknown version")


def _at_once() -> int:
    """Files that are compiled at a time."""
    free = machine.memory().available_bytes
    return max(1, min(machine.usable_cores(), machine.usable_cores() if free is None else free // _FILE_BYTES))
