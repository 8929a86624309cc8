"""Saved embeddings: .npz, our array file, and word2vec text.

The first two hold all that it takes to predict and to go on training; the text, V alone, for other programs: a line ``N D``, then
per node its name and its numbers.
"""
# Shapes: N nodes, D dim

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.files import parse_json
from anabranch.graph.arguments import as_path
from anabranch.graph.array_file import MAGIC, read_arrays, write_arrays
from anabranch.graph.beside import new_file

KIND = "graphvite"
TEXT = (".txt", ".vec", ".emb", ".w2v")
_META = "meta"


@dataclass
class Saved:
    """What a file holds.

    Attributes:
        arrays: "vertex" [N, D]; "names" [N] where nodes have some; unless the file is text, "context" [N, D], "trained" bool [N], and
            moments "head1", "head2", "tail1", "tail2" of optimisers that have them.
        meta: parameters and counters; empty for text.
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)


def write(path: str | Path, saved: Saved) -> None:
    """Write a file of the form that the name ends in; other names get our array file. All or nothing."""
    path = as_path(path)
    if path.suffix == ".npz":
        import json

        meta = np.frombuffer(json.dumps(saved.meta).encode(), np.uint8)
        with new_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **saved.arrays, **{_META: meta})  # type: ignore[arg-type]
    elif path.suffix in TEXT:
        _write_text(path, saved.arrays["vertex"], saved.arrays.get("names"))
    else:
        write_arrays(path, KIND, saved.arrays, saved.meta)


def read(path: str | Path) -> Saved:
    """Read what `write` wrote, in whichever form. Raises DataError for a file that is missing, foreign, truncated or damaged."""
    path = as_path(path)
    try:
        with open(path, "rb") as file:
            first = file.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if first == MAGIC:
        found = read_arrays(path, KIND)
        saved = Saved(found.arrays, found.meta)
    elif first[:2] == b"PK":
        saved = _read_npz(path)
    else:
        return _read_text(path)
    missing = {"vertex", "context", "trained"} - saved.arrays.keys()
    if missing or not {"params", "counters"} <= saved.meta.keys():
        raise DataError(f"{path} is not a saved GraphVite: it has no {', '.join(sorted(missing)) or 'parameters'}")
    _check(path, saved.arrays)
    return saved


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises DataError unless the arrays are those of one model: kernels look at no bound."""
    shape = arrays["vertex"].shape
    if len(shape) != 2:
        raise DataError(f"{path} is not a saved GraphVite: its vectors have the shape {list(shape)}")
    wanted: tuple[int, ...]
    for name, array in arrays.items():
        if name == "names":
            wanted, kinds = shape[:1], "iuUOT"
        elif name == "trained":
            wanted, kinds = shape[:1], "b"
        else:
            wanted, kinds = shape, "f"
        if array.shape != wanted or array.dtype.kind not in kinds:
            raise DataError(
                f"{path} is not a saved GraphVite: {name} is {array.dtype} {list(array.shape)}, beside vectors {list(shape)}"
            )
        if kinds == "f" and not np.isfinite(array).all():
            raise DataError(f"{path} is damaged: {name} has numbers that are not finite")
    if "names" in arrays and len(set(arrays["names"].tolist())) != shape[0]:
        raise DataError(
            f"{path} is damaged: two nodes have one name (a release before wrote 1 and '1' alike; fit again)"
        )


def _read_npz(path: Path) -> Saved:

    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        meta = parse_json(arrays.pop(_META).tobytes())
    except (zipfile.BadZipFile, zipfile.error, KeyError, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is not a saved GraphVite, or is damaged: {error}") from error
    return Saved(arrays, meta)


def _write_text(path: Path, vertex_ND: np.ndarray, names: np.ndarray | None) -> None:
    words = [str(name) for name in (range(len(vertex_ND)) if names is None else names.tolist())]
    for word in words:
        if not word or any(letter.isspace() for letter in word):
            raise InputError(f"word2vec text cannot hold the name {word!r} (empty, or with a space); save as .npz")
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{len(vertex_ND)} {vertex_ND.shape[1]}\n")
        for word, row_D in zip(words, vertex_ND, strict=True):
            # The shortest text that reads back equal.
            file.write(word + " " + " ".join(map(str, row_D)) + "\n")


def _read_text(path: Path) -> Saved:
    words: list[str] = []
    try:
        with open(path, encoding="utf-8") as file:
            head = file.readline().split()
            if len(head) != 2 or not all(part.isdigit() for part in head):
                raise DataError(f"{path}, line 1: word2vec text begins with the counts of vectors and numbers")
            count, dim = map(int, head)
            rows: list[np.ndarray] = []
            for line, text in enumerate(file, start=2):
                word, *numbers = text.split()
                if len(numbers) != dim:
                    raise DataError(f"{path}, line {line}: {len(numbers)} numbers where {dim} are to be")
                words.append(word)
                rows.append(np.array(numbers, np.float32))
                if not np.isfinite(rows[-1]).all():
                    raise DataError(f"{path}, line {line}: a number is not finite")
    except ValueError as error:
        # No number, no text at all.
        raise DataError(f"{path} is not a saved GraphVite in any form it is saved in: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if len(rows) != count:
        raise DataError(f"{path} has {len(rows):,} vectors where its first line says {count:,}; is it truncated?")
    if len(set(words)) != count:
        raise DataError(f"{path} has a name twice")
    vertex_ND = np.array(rows, np.float32).reshape(count, dim)
    if words == list(map(str, range(count))):
        return Saved({"vertex": vertex_ND})
    return Saved({"vertex": vertex_ND, "names": np.array(words, object)})
