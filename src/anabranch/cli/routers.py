"""``anabranch routers``: learn and judge which model answers a query, on files alone.

The commands are those of ``anabranch gateway``; each names the door it was called through.
"""

from collections.abc import Callable

import typer

from anabranch.cli.gateway.coe import GROUP, group
from anabranch.cli.gateway.curve import curve
from anabranch.cli.gateway.doors import ROUTERS, entering, help_of
from anabranch.cli.gateway.eval import evaluate
from anabranch.cli.gateway.fit import fit
from anabranch.cli.gateway.probe import probe
from anabranch.cli.gateway.replay import replay
from anabranch.cli.gateway.route import route
from anabranch.cli.gateway.scale import scale

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Learn from recorded outcomes which model should answer a query, and evaluate that. Like the gateway, but without a server.

    Recorded outcomes are JSON lines (.jsonl, .jsonl.gz) with query and scores: {model: number}, or a CSV file.""",
)
app.callback()(entering(ROUTERS))
_COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit,
    "eval": evaluate,
    "route": route,
    "replay": replay,
    "curve": curve,
    "probe": probe,
    "scale": scale,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, help=help_of(_command, ROUTERS))(_command)
app.add_typer(group(ROUTERS), name=GROUP)
