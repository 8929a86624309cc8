"""Fitted embeddings in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.errors import DataError, InputError

if TYPE_CHECKING:
    from anabranch.graph import FastRP, GraphVite

MODEL = "A fitted model (anabranch graph embed GRAPH --save MODEL.anb)."


def open_model(path: str) -> FastRP | GraphVite:
    """A saved `FastRP` or `GraphVite`. Raises DataError for a file that is missing, damaged or something else."""
    from anabranch.cli.graph.inputs import is_own
    from anabranch.graph import FastRP, GraphVite
    from anabranch.graph.array_file import kind_of

    if not Path(path).is_file():
        raise DataError(f"there is no file {path}")
    kind = kind_of(path) if is_own(path) else None
    if kind == "fastrp":
        return FastRP.load(path)
    if kind == "graphvite" or (kind is None and Path(path).suffix == ".npz"):
        return GraphVite.load(path)
    what = f"holds a {kind}" if kind else "is no file of ours"
    raise DataError(f"{path} {what}; a fitted model is written by anabranch graph embed GRAPH --save MODEL.anb")


def check_saved(path: Path | None) -> None:
    """Before the work. Raises InputError for a name that a model is not saved under."""
    if path is not None and path.suffix != ".anb":
        raise InputError(f"--save is {str(path)!r}; its name must end in .anb")
