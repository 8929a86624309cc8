"""``anabranch adapters``: one module per command."""

import typer

from anabranch.cli.adapters.card import card
from anabranch.cli.adapters.catalogue import estimate, list_methods, recommend
from anabranch.cli.adapters.cluster import cluster
from anabranch.cli.adapters.describe import describe
from anabranch.cli.adapters.eval import evaluate
from anabranch.cli.adapters.export import export
from anabranch.cli.adapters.fuse import fuse
from anabranch.cli.adapters.gates import gates
from anabranch.cli.adapters.merge import merge
from anabranch.cli.adapters.report import report
from anabranch.cli.adapters.route import route

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Inspect, combine, export and measure adapters in peft's format (peft need not be installed), and choose a method.

    To measure a model with an adapter: anabranch eval MODEL --adapter FOLDER on text, anabranch adapters eval on rows of tasks.""",
)

app.command("list")(list_methods)
app.command("card")(card)
app.command("estimate")(estimate)
app.command("recommend")(recommend)
app.command("merge")(merge)
app.command("export")(export)
app.command("fuse")(fuse)
app.command("eval")(evaluate)
app.command("route")(route)
app.command("cluster")(cluster)
app.command("describe")(describe)
app.command("gates")(gates)
app.command("report")(report)
