"""`SeenFiles`: what tells files from others that lie under their names at another time.

Whoever reads a model twice, or in two processes, has one model only as long as the files are the same: sizes, times of change and samples
of what is in them are compared, which takes no reading of all weights.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

__all__ = ["SeenFile", "SeenFiles"]

# A file of up to so many bytes is read whole.
WHOLE = 4 << 20
# Of a larger one so many, where headers and vocabularies are, and blocks from all over the rest.
HEAD, BLOCK, NUM_BLOCKS = 1 << 20, 4096, 16


@dataclass(frozen=True)
class SeenFile:
    """One file as it was.

    Attributes:
        path: its name.
        size: bytes; -1 where there was none, or none that could be read.
        mtime_ns: its time of change.
        sample: digest of what was read of it.
    """

    path: str
    size: int = -1
    mtime_ns: int = -1
    sample: str = ""

    @classmethod
    def of(cls, path: Path) -> Self:
        """The file at ``path`` now."""
        try:
            with path.open("rb") as file:
                found, digest = os.fstat(file.fileno()), hashlib.sha256()
                for at, length in _samples(found.st_size):
                    file.seek(at)
                    digest.update(file.read(length))
        except OSError:
            return cls(str(path))
        return cls(str(path), found.st_size, found.st_mtime_ns, digest.hexdigest())


@dataclass(frozen=True)
class SeenFiles:
    """Several files as they were; of equal ones, what was read of one is what was read of the other.

    Attributes:
        files: of each path one, by name.
    """

    files: tuple[SeenFile, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Self:
        """The files at ``paths`` now."""
        return cls(tuple(SeenFile.of(path) for path in sorted(set(paths))))

    @cached_property
    def content(self) -> str:
        """Digest of what was read, wherever and whenever; "" of no files."""
        told = [(Path(one.path).name, one.size, one.sample) for one in self.files]
        return hashlib.sha256(repr(told).encode()).hexdigest() if told else ""

    def difference(self, later: "SeenFiles") -> str:
        """The first file that is not the same ``later``, or is there in one of the two alone; "" where there is none."""
        ours, theirs = ({one.path: one for one in each.files} for each in (self, later))
        return next((path for path in sorted({*ours, *theirs}) if ours.get(path) != theirs.get(path)), "")


def _samples(size: int) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of what is read of a file."""
    if size <= WHOLE:
        return [(0, size)]
    step = (size - BLOCK - HEAD) / (NUM_BLOCKS - 1)
    return [(0, HEAD), *((HEAD + round(place * step), BLOCK) for place in range(NUM_BLOCKS))]
