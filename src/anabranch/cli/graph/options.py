"""Arguments and options of ``anabranch graph`` that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.options import FLAG
from anabranch.errors import InputError
from anabranch.extras import require

PICTURES = (".png", ".svg")

GraphSource = Annotated[
    str, typer.Argument(metavar="GRAPH", help="A file of edges, a graph of ours (.anb), or the name of a data set.")
]
Directed = Annotated[
    bool | None,
    typer.Option("--directed/--undirected", metavar=FLAG, help="Whether edges have a direction. Default: what the file says."),
]  # fmt: skip
Columns = Annotated[
    str | None,
    typer.Option(metavar="S,T,W", help="Columns of source, target and perhaps weight, by name or number from 0."),
]
Ids = Annotated[
    str, typer.Option(metavar="KIND", help="What nodes are called in the file: numbers, names, text, or auto.")
]
Relation = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Edges are of several kinds, which this column of GRAPH (.csv, .tsv, .parquet) tells."),
]  # fmt: skip
WeightOf = Annotated[
    list[str] | None,
    typer.Option("--weight-of", metavar="KIND=W", help="With --relation: what edges of a kind count; 1 unless told. May be repeated."),
]  # fmt: skip
Share = Annotated[
    str,
    typer.Option(metavar="HOW", help="With --relation: edges count by their kind (edges), or a walk draws the kind first (relations)."),
]  # fmt: skip
# The second name is the former one.
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", "--threads", metavar="N", min=1, help="Threads that work side by side. Default: one per core."
    ),
]
Top = Annotated[int, typer.Option("--top", "-k", metavar="K", min=1, help="How many results.")]


def check_extra() -> None:
    """Raises MissingExtraError if what the extra ``graph`` brings is not installed."""
    require("graph", by="anabranch graph")


def check_picture(path: Path | None) -> None:
    """Before the work. Raises InputError for a name that is not that of a picture, MissingExtraError where none can be drawn."""
    if path is None:
        return
    if path.suffix not in PICTURES:
        raise InputError(f"{str(path)!r} is no picture that can be drawn; its name must end in .png or .svg")
    require("plots", by=f"drawing {path}")
