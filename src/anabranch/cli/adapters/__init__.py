"""``anabranch adapters``: one module per command."""

import typer

from anabranch.cli.adapters.card import card
from anabranch.cli.adapters.merge import merge

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Work on low-rank adapters in the folders of the package peft, which need not be installed.

    anabranch eval MODEL --adapter FOLDER measures a model with one.""",
)

app.command("card")(card)
app.command("merge")(merge)
