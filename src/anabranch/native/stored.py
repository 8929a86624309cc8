"""Compiled libraries on disk: found, checked against what was written down about them, and opened.

Beside ``NAME.so`` lies ``NAME.json``: the digest of the library, which compiler made it and when. A library without one, or
with other bytes (cut off, flipped), is as good as none. Where the compiler failed there is only ``NAME.failed.json``.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from anabranch.errors import AnabranchError
from anabranch.files import atomic_write_json, parse_json, sha256_of
from anabranch.native.isa import NATIVE, Isa, best_level
from anabranch.native.sources import library_name
from anabranch.places import cache_folder, cache_places

__all__ = [
    "SHIPPED",
    "Failure",
    "Library",
    "find",
    "opened",
    "read_failure",
    "read_library",
    "record",
    "record_failure",
]

SHIPPED = Path(__file__).parent / "lib"  # of a wheel that carries kernels


@dataclass(frozen=True)
class Library:
    """A compiled library that is whole.

    Attributes:
        path: where it lies.
        isa: name of the instruction set it was compiled for.
        compiler: command and version.
        seconds: that compiling it took.
    """

    path: Path
    isa: str
    compiler: str
    seconds: float

    @property
    def is_shipped(self) -> bool:
        """Whether it came with the package."""
        return self.path.parent == SHIPPED


@dataclass(frozen=True)
class Failure:
    """That ``compiler`` could not compile these sources, and what it said."""

    compiler: str
    reason: str


def find() -> Library | None:
    """The best library for this processor: one that was built here, else one that came with the package; None if there is neither."""
    for folder in _folders():
        found = read_library(folder, NATIVE)
        if found is not None:
            return found
    level = best_level()
    return None if level is None else read_library(SHIPPED, level)


def _folders() -> Iterator[Path]:
    """Where libraries that were built may lie; also where nothing can be written, as in an image that was made with them."""
    for place in cache_places():
        yield place / "kernels"
    try:
        yield cache_folder() / "kernels"
    except AnabranchError:  # nothing can be written anywhere; then nothing lies there either
        return


def record(library: Path, isa: Isa, compiler: str, seconds: float) -> Library:
    """Write down what is known of the new ``library``; from then on it counts as whole."""
    facts = {"isa": isa.name, "compiler": compiler, "seconds": round(seconds, 1)}
    atomic_write_json(library.with_suffix(".json"), {"sha256": sha256_of(library), **facts})
    library.with_suffix(".failed.json").unlink(missing_ok=True)
    return Library(library, isa.name, compiler, round(seconds, 1))


def read_library(folder: Path, isa: Isa) -> Library | None:
    """The library of these sources for ``isa`` in ``folder``; None if it is absent or not what was written down about it."""
    path = folder / library_name(isa)
    try:
        facts = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["sha256"] != sha256_of(path):
            return None
        return Library(path, str(facts["isa"]), str(facts["compiler"]), float(facts["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record_failure(folder: Path, isa: Isa, failure: Failure) -> None:
    """Remember ``failure`` for these sources."""
    atomic_write_json((folder / library_name(isa)).with_suffix(".failed.json"), asdict(failure))


def read_failure(folder: Path, isa: Isa) -> Failure | None:
    """The failure that is remembered for these sources; None if there is none."""
    try:
        facts = parse_json((folder / library_name(isa)).with_suffix(".failed.json").read_text(encoding="utf-8"))
        return Failure(str(facts["compiler"]), str(facts["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def opened(library: Library) -> ctypes.CDLL:
    """``library`` in this process. Raises OSError where the system cannot load it."""
    try:
        return ctypes.CDLL(str(library.path))
    except OSError as error:
        if "libgomp" not in str(error):
            raise
        if not _load_openmp_of_torch():
            raise OSError(f"{error}; install it (apt-get install libgomp1)") from error
        return ctypes.CDLL(str(library.path))


def _load_openmp_of_torch() -> bool:
    """Load the OpenMP runtime that torch brings, for systems without their own. Torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    for path in sorted((Path(spec.origin).parent / "lib").glob("libgomp*.so*")):
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False
