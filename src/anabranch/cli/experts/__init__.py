"""``anabranch experts``: one module per command."""

import typer

from anabranch.cli.experts.fit_predictor import fit_predictor

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Run a mixture of experts that does not fit into memory (ExpertFlow).

    anabranch serve MODEL --expert-budget SIZE runs one. The command here trains a predictor that makes it faster.""",
)


# A group, though it has one command.
@app.callback()
def _root() -> None: ...


app.command("fit-predictor")(fit_predictor)
