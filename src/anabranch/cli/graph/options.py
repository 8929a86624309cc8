"""Arguments and options of ``anabranch graph`` that several commands have."""

from typing import Annotated

import typer

from anabranch.cli.options import FLAG
from anabranch.errors import BackendError

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
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads. Default: one per core.")]
Top = Annotated[int, typer.Option("--top", "-k", metavar="K", min=1, help="How many results.")]


def check_extra() -> None:
    """Raises BackendError if what the extra ``graph`` brings is not installed."""
    for name in ("scipy", "numba"):
        try:
            __import__(name)
        except ImportError:
            raise BackendError(f"anabranch graph needs {name}; pip install 'anabranch[graph]'") from None
