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
    help="""Let a model skip or repeat layers, depending on the prompt.

    Dr.LLM adds routers to a pretrained model: search, train, eval, report. FTP lets blocks skip tokens: redundancy, prune, prune-eval.
    Duo-LLM chooses between two sizes of each layer: oracle.""",
)

app.command("search")(search)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("prune")(prune)
app.command("prune-eval")(prune_eval)
app.command("redundancy")(redundancy)
app.command("oracle")(oracle)
