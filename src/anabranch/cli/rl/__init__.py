"""``anabranch rl``: one module per command."""

import typer

from anabranch.cli.rl.evaluate import evaluate
from anabranch.cli.rl.replay import replay
from anabranch.cli.rl.train import train

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Reinforcement learning: PPO in gymnasium environments and in LaneWorld, our own road simulator.""",
)

app.command("train")(train)
app.command("eval")(evaluate)
app.command("replay")(replay)
