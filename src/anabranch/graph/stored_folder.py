"""Folders of Parquet files that runs on Spark write: results that may be larger than this machine.

FOLDER/part-*.parquet      the result
FOLDER/_anabranch.json     what it is and how it was made; written last, so that a folder without it is not whole
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anabranch.errors import DataError, InputError, first_line
from anabranch.files import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

# Readers of Parquet pass over names with an underscore.
FACTS = "_anabranch.json"
# What a result may hold, and another one take the place of.
OURS = re.compile(rf"part-.*\.parquet|_SUCCESS|{re.escape(FACTS)}|\..*\.crc")

# Kinds of results, and what they are called.
SCORES, VECTORS, WALKS = "scores", "vectors", "powerwalk-index-parquet"
CALLED = {SCORES: "scores", VECTORS: "vectors", WALKS: "index of walks"}


def read_facts(folder: Path, kind: str) -> dict[str, Any]:
    """What lies beside the files of a result. Raises DataError for a folder that is not whole, or holds another kind."""
    try:
        found = parse_json((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the {CALLED[kind]} in {folder}, which is not whole: {error}") from error
    if (held := _kind_of(found)) != kind:
        raise DataError(f"cannot read the {CALLED[kind]} in {folder}, which holds {_called(held)}")
    return found


def _kind_of(facts: Any) -> str | None:
    """Which kind of result facts are of; None for what is none of ours."""
    if not isinstance(facts, dict):
        return None
    if "kind" in facts:
        return facts["kind"]
    # Releases before this one did not say.
    return VECTORS if "dim" in facts else SCORES if "is_all" in facts else None


def _called(kind: Any) -> str:
    return f"the {CALLED[kind]} of another run" if kind in CALLED else "what this release cannot read"


def read_table(folder: Path) -> "pa.Table":
    """All rows of a result. Raises DataError for files that are missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pa.concat_tables([pq.ParquetFile(file).read() for file in sorted(folder.rglob("*.parquet"))])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read the files in {folder}: {first_line(error)}") from error


def check_place(
    out: str | Path, names: Iterable[str], read: Callable[[str], str], kind: str, *, is_publishing: bool = False
) -> None:
    """Before a result takes the place of what a folder holds.

    Args:
        out: the folder.
        names: what it holds.
        read: gives the text of the file of a name.
        kind: of the result.
        is_publishing: whether this run was putting its own result there, file by file.

    Raises DataError unless it holds nothing, or a result of the same kind that is whole.
    """
    names = sorted(names)
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if names and not foreign and FACTS not in names and not is_publishing:
        # Other programs of Spark's call their files the same.
        foreign = [name for name in names if not name.startswith((".", "_"))] or names
    if foreign:
        raise DataError(f"{out} holds {foreign[0]}, which would be lost if it were replaced; choose a new folder")
    if FACTS not in names:
        return
    try:
        held = _kind_of(json.loads(read(FACTS)))
    except (OSError, ValueError, RecursionError):
        held = None
    if held != kind:
        raise DataError(
            f"{out} holds {_called(held)}, not {CALLED[kind]}, and would be lost; choose a new folder, or remove it"
        )


class StoredFolder:
    """A result in a folder. Nothing is read before it is asked for.

    Args:
        path: the folder, with or without ``file:``; others than local ones are read by Spark.
        known: what lies beside its files, where that is known; None to read it.

    Attributes:
        path: as Spark knows it.
    """

    kind: ClassVar[str]

    def __init__(self, path: str | Path, known: dict[str, Any] | None = None) -> None:
        self.path = str(path)
        self._known = known

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @property
    def folder(self) -> Path:
        """The local folder. Raises InputError where it lies elsewhere."""
        text = self.path.removeprefix("file://").removeprefix("file:")
        if "://" in text:
            raise InputError(f"{self.path} is not on this machine; read it with spark.read.parquet, or copy it here")
        return Path(text)

    @cached_property
    def _whole(self) -> dict[str, Any]:
        return read_facts(self.folder, self.kind) if self._known is None else self._known
