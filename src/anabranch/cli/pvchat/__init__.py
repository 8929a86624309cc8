"""``anabranch pvchat``: one module per command."""

import typer

from anabranch.cli.pvchat.ask import ask
from anabranch.cli.pvchat.compose import compose
from anabranch.cli.pvchat.evaluate import evaluate
from anabranch.cli.pvchat.learn import learn
from anabranch.cli.pvchat.pretrain import pretrain
from anabranch.cli.pvchat.ways import ways

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Teach a small model a new subject from one drawing, and ask it about video clips (PVChat).

    pretrain makes a model from a folder of drawings, learn adds a subject, ask and eval use it, ways measures a choice among twenty
    subjects, compose makes clips to ask about.""",
)

app.command("pretrain")(pretrain)
app.command("learn")(learn)
app.command("ask")(ask)
app.command("eval")(evaluate)
app.command("ways")(ways)
app.command("compose")(compose)
