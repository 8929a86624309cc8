"""``anabranch gateway``: one module per command, each of which loads what it needs when it is called."""

from collections.abc import Callable

import typer

from anabranch.cli.gateway.ab import show_tests
from anabranch.cli.gateway.add_model import add_model
from anabranch.cli.gateway.budget import app as budget
from anabranch.cli.gateway.coe import GROUP, group
from anabranch.cli.gateway.collect import collect
from anabranch.cli.gateway.convert import convert
from anabranch.cli.gateway.curve import curve
from anabranch.cli.gateway.doors import GATEWAY, entering
from anabranch.cli.gateway.eval import evaluate
from anabranch.cli.gateway.fit import fit
from anabranch.cli.gateway.keys import app as keys
from anabranch.cli.gateway.ledger import app as ledger
from anabranch.cli.gateway.probe import probe
from anabranch.cli.gateway.replay import replay
from anabranch.cli.gateway.route import route
from anabranch.cli.gateway.scale import scale
from anabranch.cli.gateway.serve import serve

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Serve many models behind one endpoint, and learn from recorded outcomes which query should go to which.

    Recorded outcomes are JSON lines (.jsonl, .jsonl.gz) with query and scores: {model: number}, or a CSV file.""",
)
app.callback()(entering(GATEWAY))
_COMMANDS: dict[str, Callable[..., None]] = {
    "serve": serve,
    "fit": fit,
    "eval": evaluate,
    "route": route,
    "replay": replay,
    "curve": curve,
    "probe": probe,
    "scale": scale,
    "collect": collect,
    "add-model": add_model,
    "ab": show_tests,
    "import": convert,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
for _name, _group in {"keys": keys, "budget": budget, "ledger": ledger, GROUP: group(GATEWAY)}.items():
    app.add_typer(_group, name=_name)
