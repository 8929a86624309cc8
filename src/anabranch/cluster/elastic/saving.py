"""Checkpoints of slices: each rank writes its own, a manifest makes them one. They are read into any layout.

    folder/step-0000000120/rank-0-1f9a30c2.slices, rank-2-77b0e1d4.slices, ...
                           manifest.json        # written last: without it nothing there is a checkpoint

A file is a line of JSON and the bytes of a snapshot, with the same checksum. No file is written twice: a step that is saved again, by other
ranks in another layout, is the old checkpoint until there is a new manifest, and the new one from then on. A rank that was held up for so
long that others saved the step without it takes nothing of theirs.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from anabranch.cluster.elastic.state import Slice, Snapshot, snapshot_of
from anabranch.errors import CheckpointError, InputError
from anabranch.files import atomic_write

__all__ = ["newest", "read_slices", "remove_others", "write_manifest", "write_slices"]

MANIFEST = "manifest.json"
SCHEMA = 1
_STEP = re.compile(r"step-(\d{10})")


def write_slices(folder: str | Path, rank: int, slices: Mapping[int, Slice], version: int) -> str:
    """Write a rank's slices, all or nothing. Returns the file's name. Raises OSError and CapacityError where the disk does not take it."""
    snapshot = snapshot_of(slices, version)
    place = _place(folder, version)
    place.mkdir(parents=True, exist_ok=True)
    head = {"version": version, "layers": snapshot.layers, "digest": snapshot.digest}
    name = f"rank-{rank}-{secrets.token_hex(4)}.slices"

    def write(path: Path) -> None:
        path.write_bytes(json.dumps(head).encode() + b"\n" + snapshot.body)

    atomic_write(place / name, write)
    return name


def write_manifest(folder: str | Path, version: int, files: Sequence[str], sizes: Sequence[int]) -> Path:
    """Make the files of a step, which are all written, a checkpoint.

    Raises CheckpointError where one of them is not here: ranks have disks of their own, or others have saved this step anew while this
    one was held up. What is here stays then.
    """
    path = _place(folder, version) / MANIFEST
    told = {"schema": SCHEMA, "version": version, "files": list(files), "sizes": list(sizes)}

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(told, file, indent=2)
            file.flush()
            # A disk may take its time over this; looked after it, right before the manifest takes its place.
            os.fsync(file.fileno())
        if missing := [name for name in files if not (path.parent / name).is_file()]:
            raise CheckpointError(
                f"{path.parent} does not hold {missing[0]}, which a rank has written; let all ranks write into one folder of one disk"
            )

    atomic_write(path, write)
    return path


def remove_others(folder: str | Path, version: int, files: Sequence[str]) -> None:
    """What else was written for a step, by ranks that were lost or before it was saved again, once all know of its manifest."""
    for other in _place(folder, version).glob("rank-*.slices"):
        if other.name not in files:
            other.unlink(missing_ok=True)


def newest(folder: str | Path) -> Path | None:
    """The folder of the newest checkpoint that is whole; None where there is none."""
    found = [(int(match[1]), path) for path in Path(folder).glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if (path / MANIFEST).is_file()), None)


def read_slices(folder: str | Path, sizes: Sequence[int]) -> tuple[int, dict[int, Slice]]:
    """(committed steps, each layer whole) of the newest checkpoint. Raises CheckpointError where it is damaged or of another model."""
    place = newest(folder)
    if place is None:
        raise CheckpointError(f"{folder} holds no checkpoint that is whole")
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        version, files, told = int(manifest["version"]), list(manifest["files"]), list(manifest["sizes"])
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(f"{place} has the schema {manifest['schema']}, and this version reads {SCHEMA}")
        if told != list(sizes):
            raise CheckpointError(f"{place} is of layers with {told} parameters, and these have {list(sizes)}")
        pieces: dict[int, list[Slice]] = {}
        for name in files:
            if Path(name).name != name:
                raise CheckpointError(f"{place / MANIFEST} names {name!r}, which is no file beside it")
            for layer, piece in _read(place / name, version).items():
                pieces.setdefault(layer, []).append(piece)
        whole = {layer: Slice.joined(0, size, pieces.get(layer, [])) for layer, size in enumerate(sizes) if size}
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{place} is damaged: {type(error).__name__}: {error}") from None
    return version, whole


def _read(path: Path, version: int) -> dict[int, Slice]:
    head, _, body = path.read_bytes().partition(b"\n")
    told = json.loads(head)
    layers = tuple((int(layer), names, spec) for layer, names, spec in told["layers"])
    if told["version"] != version:
        raise InputError(f"{path} is of step {told['version']}, and its manifest of {version}")
    return Snapshot(version, layers, body, str(told["digest"])).slices()


def _place(folder: str | Path, version: int) -> Path:
    return Path(folder) / f"step-{version:010d}"
