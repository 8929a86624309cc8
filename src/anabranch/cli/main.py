"""The command ``anabranch``. Every command is a module here that loads what it needs when it is called, so help is quick."""

import difflib
import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from anabranch import __version__
from anabranch.cli.adapt import adapt
from anabranch.cli.adapters import app as adapters
from anabranch.cli.boundary import debug_wanted, guarded
from anabranch.cli.chat import chat
from anabranch.cli.cluster import app as cluster
from anabranch.cli.compare import compare
from anabranch.cli.convert import convert
from anabranch.cli.depth import app as depth
from anabranch.cli.doctor import doctor
from anabranch.cli.eval import evaluate
from anabranch.cli.experts import app as experts
from anabranch.cli.gateway import app as gateway
from anabranch.cli.generate import generate
from anabranch.cli.graph import app as graph
from anabranch.cli.heads import app as heads
from anabranch.cli.info import info
from anabranch.cli.options import FLAG
from anabranch.cli.oracle import oracle
from anabranch.cli.output import print_line, visible
from anabranch.cli.plan import plan
from anabranch.cli.pvchat import app as pvchat
from anabranch.cli.report import report
from anabranch.cli.rl import app as rl
from anabranch.cli.routers import app as routers
from anabranch.cli.serve import serve
from anabranch.cli.study import study
from anabranch.cli.train import TrainCommand, train
from anabranch.extras import explain


def _show_version(wanted: bool) -> None:
    if wanted:
        print_line(f"anabranch {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", metavar=FLAG, callback=_show_version, is_eager=True, help="Show the version."
    ),
    debug: bool = typer.Option(
        False, "--debug", metavar=FLAG, help="Show the traceback of an error. Also: ANABRANCH_DEBUG=1."
    ),
) -> None:
    # None where a test or the documentation runs the app without `main`.
    asked = context.ensure_object(dict)
    asked["debug"] = asked.get("debug", False) or debug


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "adapt": adapt,
    "compare": compare,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "report": report,
    "oracle": oracle,
    "convert": convert,
    "plan": plan,
    "serve": serve,
    "study": study,
    "info": info,
    "doctor": doctor,
}
_GROUPS = {
    "adapters": adapters,
    "cluster": cluster,
    "depth": depth,
    "experts": experts,
    "heads": heads,
    "pvchat": pvchat,
    "rl": rl,
    "graph": graph,
    "routers": routers,
    "gateway": gateway,
}


def _app_of(names: Iterable[str]) -> typer.Typer:
    """The command line with these commands and groups."""
    made = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        help="""Train, measure, compare and serve models that route: tokens to experts, queries to models, walks to graph nodes.

    Start with [bold]anabranch train demo --out runs/demo[/bold] (a few minutes on two cores, no download).""",
        rich_markup_mode="rich",
    )
    made.callback()(_root)
    for name in names:
        if name in _COMMANDS:
            made.command(name, cls=TrainCommand if name == "train" else None)(_COMMANDS[name])
        else:
            made.add_typer(_GROUPS[name], name=name)
    _let_paragraphs_flow(made)
    return made


def _let_paragraphs_flow(group: typer.Typer) -> None:
    """A paragraph of help in one line each, which a terminal breaks at its own width: else it breaks at the source's lines too."""
    for command in group.registered_commands:
        command.help = _flowing(command.help or inspect.getdoc(command.callback))
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            told = inner.typer_instance.info
            told.help = _flowing(told.help) if isinstance(told.help, str) else told.help
            _let_paragraphs_flow(inner.typer_instance)


def _flowing(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


app = _app_of([*_COMMANDS, *_GROUPS])


@functools.cache
def _built(name: str) -> Any:
    """The command or group of this name, or all where there is none: of a start, the options of all others would take a quarter."""
    found = typer.main.get_command(_app_of([name]) if name in _COMMANDS or name in _GROUPS else app)
    _show_brackets(found)
    return found


# What rich takes for its markup, but for what is meant so.
_MARKUP = re.compile(r"(\[(?!/?bold\])[a-z#/@][^\[]*?\])")


def _show_brackets(command: Any) -> None:
    """Help has lists and tables in brackets, ``[true, false]`` and ``[method]``, which are shown as they are written."""
    for one in (command, *command.params):
        for name in ("help", "short_help"):
            if text := getattr(one, name, None):
                setattr(one, name, _MARKUP.sub(r"\\\1", text))
    for one in getattr(command, "commands", {}).values():
        _show_brackets(one)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake of the user's (or a fault of ours), 130 when interrupted.

    A mistake is told in one line on stderr; ``--debug`` or ``ANABRANCH_DEBUG=1`` shows the trace before it.
    """
    _quiet_libraries()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Whoever has typed the name alone wants to know what there is.
    arguments = arguments or ["--help"]
    asked = {"debug": debug_wanted()}

    def run() -> int | None:
        # Not app(...): that turns an EOFError of a reader's and an interrupt into other things.
        command = _built(arguments[0])
        # A shell that completes a line asks by a variable, and wants nothing else.
        command._main_shell_completion({}, "anabranch")
        try:
            with command.make_context("anabranch", list(arguments), obj=asked) as context:
                code = command.invoke(context)
        except ModuleNotFoundError as error:
            raise explain(error, by=_command_of(arguments), near=arguments) or error from None
        return code if isinstance(code, int) else None

    return guarded(run, misuse=lambda error: _misuse(error, arguments), debug=lambda: asked["debug"])


# Which read text from files.
_READERS = ("anabranch train", "anabranch compare", "anabranch eval", "anabranch report")
# Options of other servers of models, as settings of ours.
_SERVE_SETTINGS = {
    "--threads": "engine.threads=N",
    "--ctx-size": "engine.max_positions=N",
    "--max-model-len": "engine.max_positions=N",
    "--dtype": "engine.dtype=NAME",
    "--max-num-seqs": "engine.max_seqs=N",
    "--parallel": "engine.max_seqs=N",
}


def _misuse(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong with the arguments, in one sentence: which option, which value, what would work."""
    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = re.sub(r" ?\(Possible options: .*\)", "", message).rstrip(".").replace(". Did you", "; did you")
    option = getattr(error, "option_name", None)
    if option and context is not None and message.startswith("No such option"):
        known = [name for parameter in context.command.params for name in parameter.opts]
        near = difflib.get_close_matches(option, known, n=1)
        message += f"; did you mean {near[0]}?" if near else ""
        if context.command_path in _READERS and option == "--text":
            message = f"No such option: {option}; text is read from files here: --data PATH"
        if context.command_path == "anabranch serve" and option in _SERVE_SETTINGS:
            message = f"No such option: {option}; it is --set {_SERVE_SETTINGS[option]} here"
    # A shell has made files of a pattern without quotes: the first is read, the others belong to nothing.
    extra = re.match(r"Got unexpected extra argument\S* \((\S+?)[ )]", message)
    if extra and "--data" in arguments and Path(extra[1]).exists():
        message += "; put a pattern of files in quotes, as in --data 'notes/*.md', or write --data before each file"
    invalid = re.fullmatch(r"Invalid value for '(.*?)'(?: / '.*?')*: (?:Value error, )?(.*)", message, re.DOTALL)
    if invalid:
        why = invalid[2].replace("Input should be", "it must be").partition(", unable to parse")[0]
        message = f"{invalid[1]} is {_given(invalid[1], arguments)}: {why}"
    command = context.command_path if context is not None else _command_of(arguments)
    # A group without one has shown its help.
    message = message or "name a command"
    # An argument is called by its name in capitals.
    first = message[:1] if message[:2].isupper() else message[:1].lower()
    return f"{first}{message[1:]} (see {command} --help)"


def _given(option: str, arguments: Sequence[str]) -> str:
    """The value that was given for an option, as it was written."""
    for number, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return repr(argument.partition("=")[2])
        if argument == option and number + 1 < len(arguments):
            return repr(arguments[number + 1])
    return "wrong"


def _command_of(arguments: Sequence[str]) -> str:
    group = _GROUPS.get(arguments[0]) if arguments else None
    if group is not None:
        known = {command.name for command in group.registered_commands}
        return " ".join([f"anabranch {arguments[0]}", *(name for name in arguments[1:2] if name in known)])
    return f"anabranch {arguments[0]}" if arguments and arguments[0] in _COMMANDS else "anabranch"


class _Visible(logging.Formatter):
    """A log says what stands in files and what others sent, and a terminal shows it."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _quiet_libraries() -> None:
    """Our own warnings as one line on stderr; those of libraries only where Python was asked for them (-W)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.addLevelName(logging.WARNING, "warning")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
