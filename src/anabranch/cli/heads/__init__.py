"""``anabranch heads``: one module per command."""

import typer

from anabranch.cli.heads.report import report
from anabranch.cli.heads.train import train
from anabranch.cli.heads.transcribe import transcribe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Route a model's attention heads: each token uses only some of them (PVChat's ReMoH, MoH).

    The result is a model like any other: anabranch eval, generate and serve run it.""",
)

app.command("train")(train)
app.command("report")(report)
app.command("transcribe")(transcribe)
