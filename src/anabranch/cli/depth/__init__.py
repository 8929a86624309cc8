"""``anabranch depth``: one module per command."""

import typer

from anabranch.cli.depth.evaluate import evaluate
from anabranch.cli.depth.prune import prune
from anabranch.cli.depth.prune_eval import prune_eval
from anabranch.cli.depth.redundancy import redundancy
from anabranch.cli.depth.report import report
from anabranch.cli.depth.search import search
from anabranch.cli.depth.train import train
from anabranch.cli.oracle import oracle

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Let a model decide how much of its depth a prompt gets.

    Routers for a pretrained model (Dr.LLM): search paths, train on them, eval, report. Tokens that blocks pass over (FTP): redundancy,
    prune, prune-eval. Between two sizes of a layer (Duo-LLM): oracle.""",
)

app.command("search")(search)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("prune")(prune)
app.command("prune-eval")(prune_eval)
app.command("redundancy")(redundancy)
app.command("oracle")(oracle)
