"""``anabranch graph``: one module per command. What several of them need: `options`, `inputs`, `vectors`, `tables`, `pictures`."""

from collections.abc import Callable

import typer

from anabranch.cli.graph.change import remove, update
from anabranch.cli.graph.embed import embed
from anabranch.cli.graph.index import index
from anabranch.cli.graph.info import info
from anabranch.cli.graph.peer import peer
from anabranch.cli.graph.ppr import ppr
from anabranch.cli.graph.predict import predict
from anabranch.cli.graph.rank import rank
from anabranch.cli.graph.resume import resume
from anabranch.cli.graph.rewalk import rewalk
from anabranch.cli.graph.search import search
from anabranch.cli.graph.serve import serve
from anabranch.cli.graph.transform import transform
from anabranch.cli.graph.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Rank, embed and search graphs and vectors.

    A graph is a file of edges (CSV, Parquet, MatrixMarket, METIS, .npz, .mat, our own .anb) or the name of a data set, e.g. karate.""",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "info": info,
    "ppr": ppr,
    "embed": embed,
    "tune": tune,
    "resume": resume,
    "transform": transform,
    "predict": predict,
    "index": index,
    "rewalk": rewalk,
    "search": search,
    "remove": remove,
    "update": update,
    "rank": rank,
    "peer": peer,
    "serve": serve,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
