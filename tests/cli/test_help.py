"""What help says, as it was reviewed. After a change on purpose: ``python tests/cli/test_help.py`` writes it anew.

Compared are the words, not how the installed version of typer draws them.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import typer
from typer import rich_utils
from typer.testing import CliRunner

from anabranch.cli.main import _built, app, main

FILE = Path(__file__).with_name("help.txt")
SCRIPT = """
import sys
from anabranch.cli.main import main
assert all(main([*name.split(), "--help"]) == 0 for name in ("", "train", "study", "report", "info", "graph", "graph ppr"))
heavy = ("torch", "numpy", "pyarrow", "matplotlib", "tokenizers", "scipy", "numba", "starlette")
heavy = [name for name in heavy if name in sys.modules]
print("heavy:", heavy)
"""


def commands(group, prefix=""):
    """Every command by its whole name, those of groups included."""
    found = {}
    for name, command in group.commands.items():
        found[prefix + name] = command
        found |= commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else {}
    return found


def shown(group=None):
    """Every command with its help, and every option with its names, value, need and help."""
    group = group or typer.main.get_command(app)
    lines = ["$ anabranch", inspect.cleandoc(group.help)]
    for name, command in commands(group).items():
        lines += ["", f"$ anabranch {name}", inspect.cleandoc(command.help), ""]
        for parameter in command.params:
            if "--help" in parameter.opts or parameter.hidden:
                continue
            every = [*parameter.opts, *parameter.secondary_opts]
            names = "/".join(every) if parameter.param_type_name == "option" else ""
            value = (parameter.metavar or "").strip()
            need = "  (needed)" if parameter.required else ""
            lines.append(f"  {f'{names} {value}'.strip():<28}{parameter.help}{need}")
    # A backslash has the terminal show what would be its markup.
    return "\n".join(lines).replace("\\[", "[") + "\n"


def test_help_is_as_reviewed():
    assert shown() == FILE.read_text()


def test_a_command_that_is_made_alone_is_as_among_all():
    group = _built("nonsense")
    whole = shown(group)
    head = whole.partition("\n\n$ anabranch ")[0] + "\n"
    assert head + "".join(shown(_built(name)).removeprefix(head) for name in group.commands) == whole


def test_every_option_is_explained_in_a_sentence():
    for command in commands(typer.main.get_command(app)).values():
        for parameter in command.params:
            if "--help" not in parameter.opts:
                assert parameter.help, (command.name, parameter.name)
                assert parameter.help.endswith("."), (command.name, parameter.name, parameter.help)


def test_help_is_shown_whole(monkeypatch, capsys):
    """Of lists in brackets the terminal's markup made nothing: {"samples": [true, false, ...]} was shown without its list."""
    # Nothing is broken into lines.
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 20_000)
    group = typer.main.get_command(app)
    for name, command in {"": group, **commands(group)}.items():
        assert main([*name.split(), "--help"]) == 0
        output = " ".join(capsys.readouterr().out.split())
        told = [command.help, *(one.help for one in command.params if "--help" not in one.opts and not one.hidden)]
        told += [one.metavar for one in command.params if one.metavar and not one.hidden]
        told += [one.short_help or one.help.split("\n")[0] for one in getattr(command, "commands", {}).values()]
        for paragraph in "\n\n".join(map(str, told)).split("\n\n"):
            words = " ".join(re.sub(r"\[/?bold\]", "", paragraph).split())
            assert words in output, (name, words)


def test_help_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert "Train a language model on text." in done.stdout


def test_the_app_runs_without_main():
    """As the documentation runs it, to show what every command says."""
    done = CliRunner().invoke(app, ["train", "--help"], prog_name="anabranch")
    assert done.exit_code == 0, done.exception
    assert "Train a language model on text." in done.output


if __name__ == "__main__":
    FILE.write_text(shown())
