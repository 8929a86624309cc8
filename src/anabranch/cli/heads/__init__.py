"""``anabranch heads``: one module per command."""

import typer

from anabranch.cli.heads.report import report
from anabranch.cli.heads.train import train

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Route the heads of a model's attention: each token has some of them on (PVChat's ReMoH, MoH).

    What is made is a model as any other: anabranch eval, generate and serve run it.""",
)

app.command("train")(train)
app.command("report")(report)
