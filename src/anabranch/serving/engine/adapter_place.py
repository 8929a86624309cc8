"""Where an adapter lies, and how large it is, before any of its numbers is read."""

import math
import os
import stat
import struct
from pathlib import Path

from anabranch.adapters.peft_file import INNER, PREFIX
from anabranch.adapters.peft_folder import CONFIG, WEIGHTS
from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.lm.tensors import read_header

__all__ = ["MOST_CONFIG", "MOST_HEADER", "check_small", "place_of", "size_of"]

PICKLE = "adapter_model.bin"
_HEAD = f"{PREFIX}lm_head{INNER}.weight"
# Bytes that are read as one table, which no other thread of the engine's process can interrupt: those of the largest adapters of attention
# and dense layers are a third of it.
MOST_CONFIG, MOST_HEADER = 256 << 10, 1 << 20


def place_of(folder: str, root: str | None) -> Path:
    """The folder of an adapter, below ``root`` whatever links there are, as are the files that are read; anywhere where that is None.

    Nothing is listed, however much lies in the folder. Raises CheckpointError for one that is not there, or is not below.
    """
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
        files = (CONFIG, WEIGHTS, PICKLE)
        stray = next((name for name in files if not (place / name).resolve().is_relative_to(top)), None)
    except (OSError, RuntimeError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(f"folder is {shown(folder)}, which cannot be read: {what or error}") from None
    if stray is not None:
        raise CheckpointError(f"folder has {stray!r}, which lies outside of the server's --adapter-root")
    return place


def check_small(place: Path) -> None:
    """Raise CheckpointError for an adapter_config.json or a header of tensors so large that to read it would hold all others up."""
    for path, size, most, what in (
        (place / CONFIG, _file_size(place / CONFIG), MOST_CONFIG, "it"),
        (place / WEIGHTS, _header_size(place / WEIGHTS), MOST_HEADER, "its header of tensors"),
    ):
        if size > most:
            raise CheckpointError(
                f"cannot read {path}: {what} has {size:,} bytes; an adapter is served with {most:,} at most"
            )


def size_of(place: Path, item_bytes: int = 4, head: tuple[int, int] | None = None) -> int:
    """Bytes of the adapter's numbers, ``item_bytes`` each, by the header of its file; of a pickled one what they take at least.

    A copy of the model's head, of shape ``head``, which peft writes beside an adapter of it, is looked at and not kept. 0 where there is no
    file. Raises CheckpointError for a damaged one.
    """
    if (place / WEIGHTS).is_file():
        entries = read_header(place / WEIGHTS)[1]
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        return item_bytes * sum(math.prod(shape) for name, shape in shapes.items() if (name, shape) != (_HEAD, head))
    # As if all were of float64.
    return _file_size(place / PICKLE) // 8 * item_bytes


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
