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
    typer.Option(
        "--directed/--undirected", metavar=FLAG, help="Whether edges have a direction. Default: as the file says."
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="S,T,W", help="Columns of source, target and perhaps weight, by name or number from 0."),
]
Ids = Annotated[str, typer.Option(metavar="KIND", help="How the file names nodes: numbers, names, text, or auto.")]
Relation = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Column of GRAPH (.csv, .tsv, .parquet) with the kind of each edge."),
]
WeightOf = Annotated[
    list[str] | None,
    typer.Option(
        "--weight-of",
        metavar="KIND=W",
        help="With --relation: weight of the edges of a kind. Default: 1. May be repeated.",
    ),
]
Share = Annotated[
    str,
    typer.Option(
        metavar="HOW", help="With --relation: weigh each edge (edges), or let a walk choose the kind first (relations)."
    ),
]
# The second name is the former one.
Workers = Annotated[
    int | None,
    typer.Option("--workers", "--threads", metavar="N", min=1, help="Number of threads. Default: one per core."),
]
Top = Annotated[int, typer.Option("--top", "-k", metavar="K", min=1, help="Number of results.")]


def check_extra() -> None:
    """Raises MissingExtraError if what the extra ``graph`` brings is not installed."""
    require("graph", by="anabranch graph")


def check_picture(path: Path | None) -> None:
    """Before the work. Raises InputError for a name that is not that of a picture, MissingExtraError where none can be drawn."""
    if path is None:
        return
    if path.suffix not in PICTURES:
        raise InputError(f"{str(path)!r} is not a picture file; its name must end in .png or .svg")
    require("plots", by=f"drawing {path}")
