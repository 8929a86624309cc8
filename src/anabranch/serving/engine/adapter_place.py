"""Where an adapter or a pool of them lies, and how large it is, before any of its numbers is read."""

import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from anabranch.adapters.glider.folder import CARD, GATES
from anabranch.adapters.glider.pool_file import POOL, PoolKind, pool_file
from anabranch.adapters.own_folder import NUMBERS, OWN
from anabranch.adapters.peft_file import INNER, PICKLE, PREFIX
from anabranch.adapters.peft_folder import CONFIG, WEIGHTS
from anabranch.bounds import shown
from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.lm.tensors import read_header

__all__ = [
    "MOST_CONFIG",
    "MOST_EXPERTS",
    "MOST_HEADER",
    "Folder",
    "check_small",
    "files_of",
    "folder_of",
    "root_untold",
    "size_of",
]

_HEAD = f"{PREFIX}lm_head{INNER}.weight"
# Bytes that are read as one table, which no other thread of the engine's process can interrupt: those of the largest adapters of attention
# and dense layers are a third of it.
MOST_CONFIG, MOST_HEADER = 256 << 10, 1 << 20
# Adapters of a pool, and entries of its folder that are looked at.
MOST_EXPERTS, MOST_ENTRIES = 1000, 10_000
_FILES = (CONFIG, WEIGHTS, PICKLE, OWN, NUMBERS, CARD, GATES, POOL)


@dataclass(frozen=True)
class Folder:
    """A folder that holds what can be served.

    Attributes:
        path: of it.
        kind: how a pool routes, where that was said.
        experts: of a pool, the folders of its adapters by name; nothing for a single adapter.
    """

    path: Path
    kind: PoolKind | None = None
    experts: Mapping[str, Path] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether it is an adapter in our own form."""
        return (self.path / OWN).is_file()

    @property
    def settings(self) -> Path | None:
        """The file that says how a pool chooses; None without one."""
        return pool_file(self.path) if self.experts else None

    @property
    def places(self) -> tuple[Path, ...]:
        """Each folder whose files are read."""
        return tuple(self.experts.values()) or (self.path,)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that are read in each of its places, where they are there."""
        return (OWN,) if self.is_own else (CONFIG, CARD) if self.experts else (CONFIG,)

    def numbers_in(self, place: Path) -> tuple[str, ...]:
        """Names of the files of numbers that are read in one of its places, where they are there; of what lies beside them nothing is."""
        weights = NUMBERS if self.is_own else WEIGHTS
        if not self.is_own and not (place / WEIGHTS).is_file() and (place / PICKLE).is_file():
            weights = PICKLE
        return (weights, GATES) if self.experts else (weights,)


def folder_of(said: str, root: str | None) -> Folder:
    """What ``said`` is: a path, of a pool also with its kind in front (``arrow:adapters/all``).

    It lies below ``root`` whatever links there are, as do the files that are read; anywhere where that is None. Nothing is listed but the
    folder of a pool. Raises CheckpointError for one that is not there, or is not below; ConfigError for a kind in front of what is no pool.
    """
    kind, sign, rest = said.partition(":")
    given: PoolKind | None = None
    if sign and rest and kind in get_args(PoolKind):
        given, said = kind, rest  # type: ignore[assignment]
    place = _place_of(said, root)
    if (place / CONFIG).is_file() or (place / OWN).is_file():
        if given is not None:
            raise ConfigError(
                f"{said} is one adapter, and {given} routes among several; give the folder of their folders"
            )
        return Folder(place)
    return Folder(place, given, _experts_in(place, root))


def files_of(folders: Iterable[str]) -> list[Path]:
    """Each file that is read of these folders where it is there: of a pool those of all its adapters. Raises as `folder_of`."""
    paths = []
    for found in (folder_of(said, None) for said in folders):
        paths += [found.path / POOL] if found.experts else []
        paths += [place / name for place in found.places for name in (*found.tables, *found.numbers_in(place))]
    return paths


@contextmanager
def root_untold(root: str | None) -> Iterator[None]:
    """Errors tell of what lies below ``root`` by its path from there: they go to whoever asked, whom the server's folders are no
    concern of. With None they stay as they are."""
    try:
        yield
    except AnabranchError as error:
        if root is not None:
            tops = {f"{Path(top)}{os.sep}" for top in (root, os.path.abspath(root), os.path.realpath(root))}
            # The longest first, and of the top of all there is nothing to hide.
            for top in sorted(tops - {os.sep * 2}, key=len, reverse=True):
                error.args = tuple(arg.replace(top, "") if isinstance(arg, str) else arg for arg in error.args)
        raise


def _place_of(folder: str, root: str | None) -> Path:
    if root is None:
        return Path(folder)
    try:
        top = Path(root).resolve()
        place = (top / folder).resolve()
        # What is told of a folder elsewhere would tell that it is there.
        if not place.is_relative_to(top) or place == top:
            raise CheckpointError(f"folder is {shown(folder)}; it must be below the server's --adapter-root")
        if not stat.S_ISDIR(place.stat().st_mode):
            raise CheckpointError(f"folder is {shown(folder)}, which cannot be read: it is no folder")
        _check_below(place, top)
    except (OSError, RuntimeError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(f"folder is {shown(folder)}, which cannot be read: {what or error}") from None
    return place


def _check_below(place: Path, top: Path) -> None:
    """Raise CheckpointError where a file that may be read lies elsewhere."""
    stray = next((name for name in _FILES if not (place / name).resolve().is_relative_to(top)), None)
    if stray is not None:
        raise CheckpointError(f"folder has {stray!r}, which lies outside of the server's --adapter-root")


def _experts_in(place: Path, root: str | None) -> dict[str, Path]:
    """The folders of adapters in that of a pool, by name, sorted; none where there are none."""
    names: list[str] = []
    try:
        if place.is_dir():
            with os.scandir(place) as entries:
                for number, entry in enumerate(entries):
                    if number == MOST_ENTRIES:
                        raise CheckpointError(
                            f"{place} has more than {MOST_ENTRIES:,} entries; a pool holds adapters alone"
                        )
                    if (place / entry.name / CONFIG).is_file():
                        names.append(entry.name)
        if len(names) > MOST_EXPERTS:
            raise CheckpointError(
                f"{place} has {len(names):,} adapters; a pool is served with {MOST_EXPERTS:,} at most"
            )
        found = {}
        for name in sorted(names):
            expert = place / name
            if root is not None:
                top = Path(root).resolve()
                if not expert.resolve().is_relative_to(top):
                    raise CheckpointError(f"folder has {name!r}, which lies outside of the server's --adapter-root")
                _check_below(expert, top)
            found[name] = expert
    except (OSError, RuntimeError) as error:
        what = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(f"cannot read {place}: {what or error}") from None
    return found


def check_small(folder: Folder) -> None:
    """Raise CheckpointError for a table or a header of tensors so large that to read it would hold all others up."""
    settings = folder.settings
    if settings is not None and (size := _file_size(settings)) > MOST_CONFIG:
        raise CheckpointError(
            f"cannot read {settings}: it has {size:,} bytes; a pool is served with {MOST_CONFIG:,} at most"
        )
    for place in folder.places:
        sizes = [(place / name, _file_size(place / name), MOST_CONFIG, "it") for name in folder.tables]
        tensors = [name for name in folder.numbers_in(place) if name != PICKLE]
        sizes += [(place / name, _header_size(place / name), MOST_HEADER, "its header of tensors") for name in tensors]
        for path, size, most, what in sizes:
            if size > most:
                raise CheckpointError(
                    f"cannot read {path}: {what} has {size:,} bytes; an adapter is served with {most:,} at most"
                )


def size_of(folder: Folder, item_bytes: int = 4, head: tuple[int, int] | None = None) -> int:
    """Bytes of the numbers by the headers of their files, ``item_bytes`` each, of layers four; of pickled ones what they take at least.

    Those of a pool are counted as they lie in its stacks, in which each adapter has the greatest rank of all at a matrix, beside the
    vectors that tokens choose by. A copy of the model's head, of shape ``head``, which peft writes beside an adapter of it, is looked at
    and not kept. 0 where there is no file. Raises CheckpointError for a damaged one.
    """
    if folder.experts:
        return _pool_size(folder)
    names = folder.numbers_in(folder.path)
    return _size_of(folder.path, names, 4 if folder.is_own else item_bytes, None if folder.is_own else head)


def _pool_size(folder: Folder) -> int:
    # Of each matrix: the greatest rank, its inputs and its outputs.
    rank, inputs, outputs = dict[str, int](), dict[str, int](), dict[str, int]()
    pickled = 0
    for place in folder.places:
        if not (place / WEIGHTS).is_file():
            pickled += _size_of(place, folder.numbers_in(place), 4, None)
            continue
        for name, entry in read_header(place / WEIGHTS)[1].items():
            module, sign, matrix = name.removeprefix(PREFIX).rpartition(".lora_")
            if sign and matrix in ("A.weight", "B.weight") and len(entry["shape"]) == 2:
                sizes, own = (inputs, entry["shape"][::-1]) if matrix[0] == "A" else (outputs, entry["shape"])
                sizes[module] = max(sizes.get(module, 0), own[0])
                rank[module] = max(rank.get(module, 0), own[1])
    item = 4
    stacks = sum(most * (inputs.get(module, 0) + outputs.get(module, 0)) for module, most in rank.items())
    # A vector for each adapter, and whether it has a sign.
    vectors = sum(item * size + 1 for size in inputs.values())
    return pickled + len(folder.places) * (item * stacks + vectors)


def _size_of(place: Path, names: Sequence[str], item_bytes: int, head: tuple[int, int] | None) -> int:
    found = [place / name for name in names if name != PICKLE and (place / name).is_file()]
    shapes = [(name, tuple(entry["shape"])) for path in found for name, entry in read_header(path)[1].items()]
    numbers = sum(math.prod(shape) for name, shape in shapes if (name, shape) != (_HEAD, head))
    # As if all were of float64.
    return item_bytes * (numbers + (_file_size(place / PICKLE) // 8 if PICKLE in names else 0))


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size if path.is_file() else 0
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _header_size(path: Path) -> int:
    """As the file says it, which a damaged one may say wrongly."""
    if _file_size(path) < 8:
        return 0
    try:
        with path.open("rb") as file:
            size: int = struct.unpack("<Q", file.read(8))[0]
    except (OSError, struct.error) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    # A number of no header: what reads it tells so.
    return size if size <= _file_size(path) else 0
