"""``anabranch cluster``: one module per command."""

import typer

from anabranch.cli.cluster.attention import attention
from anabranch.cli.cluster.bench import bench
from anabranch.cli.cluster.churn import churn
from anabranch.cli.cluster.coordinate import coordinate
from anabranch.cli.cluster.elastic import elastic
from anabranch.cli.cluster.fabric import fabric
from anabranch.cli.cluster.master import master
from anabranch.cli.cluster.plan import plan

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Plan and run training on several machines: pipeline stages, long sequences, the network, and lost machines.

    Nothing here needs a GPU or a second machine.""",
)


@app.callback()
def _group() -> None:
    """So that one command alone is not the whole group."""


app.command("plan")(plan)
app.command("fabric")(fabric)
app.command("attention")(attention)
app.command("elastic")(elastic)
app.command("coordinate")(coordinate)
app.command("master")(master)
app.command("churn")(churn)
app.command("bench")(bench)
