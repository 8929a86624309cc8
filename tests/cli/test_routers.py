"""``anabranch routers``: fit, judge and ask a router on files, without the proxy."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import anabranch
from anabranch.cli.gateway import app as gateway_app
from anabranch.cli.gateway.doors import door
from anabranch.cli.main import main
from anabranch.cli.routers import app as routers_app
from anabranch.errors import DataError
from anabranch.routers import load_outcomes
from made_outcomes import made_outcomes, write_outcomes


def test_files_become_a_router_and_nothing_of_the_gateway_is_loaded(tmp_path):
    write_outcomes(tmp_path / "data.jsonl", made_outcomes(160))
    script = (
        "import sys; from anabranch.cli.main import main\n"
        "assert main('routers fit data.jsonl --out made --quiet --json'.split()) == 0\n"
        "assert main('routers eval data.jsonl --router made --allow-leak --quiet --json'.split()) == 0\n"
        "assert main('routers route add --router made --json'.split()) == 0\n"
        "assert main('routers replay data.jsonl --router made --allow-leak --json'.split()) in (0, 2)\n"
        "loaded = [name for name in sys.modules if name.startswith(('anabranch.gateway', 'aiohttp', 'torch'))]\n"
        "assert not loaded, loaded"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_store_of_a_gateway_is_outcomes_too(tmp_path):
    """By name: what reads it is loaded when it is needed."""
    with pytest.raises(DataError, match="no such file"):
        load_outcomes(tmp_path / "none.db")


# Two doors, the same commands

DOORS = {"gateway": gateway_app, "routers": routers_app}
TWINS = sorted(set.intersection(*({one.name for one in app.registered_commands} for app in DOORS.values())))


def test_all_commands_of_routers_are_of_the_gateway_too():
    assert (
        TWINS
        == sorted(one.name for one in routers_app.registered_commands)
        == ["curve", "eval", "fit", "probe", "replay", "route", "scale"]
    )


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("command", TWINS)
def test_help_at_a_door_names_that_door(name, command):
    help = typer.main.get_command(DOORS[name]).commands[command].help
    assert f"Example: anabranch {name} {command} " in help
    others = [other for other in DOORS if other != name]
    assert not re.search(rf"anabranch ({'|'.join(others)}) ({'|'.join(TWINS)})\b", help)


def nexts(capsys, line):
    """What a command says is to be typed next."""
    capsys.readouterr()
    assert main(shlex.split(line)) == 0
    said = capsys.readouterr()
    found = re.findall(r"^next +(anabranch .+)$", said.out, re.MULTILINE)
    assert len(found) == 1, said.out
    return found[0], said.out + said.err


@pytest.mark.parametrize("name", DOORS)
def test_each_door_names_itself_and_what_it_names_can_be_typed(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write_outcomes(tmp_path / "my data.jsonl", made_outcomes(160))
    other = next(one for one in DOORS if one != name)
    said = []

    def typed(line, wanted):
        after, text = nexts(capsys, line)
        said.append(text)
        assert re.match(rf"anabranch {name} ({wanted}) ", after), after
        return after

    after = typed(f"{name} fit 'my data.jsonl' --out 'made here' --strategy knn --strategy ridge --quiet", "eval")
    after = typed(after.removeprefix("anabranch ") + " --quiet", "serve" if name == "gateway" else "route")
    if name == "routers":
        assert main(shlex.split(after)[1:]) == 0
    after = typed(f"{name} fit 'my data.jsonl' --out 'whole' --strategy knn --hold-out 0 --quiet", "route")
    assert main(shlex.split(after)[1:]) == 0
    typed(f"{name} eval 'my data.jsonl' --strategy knn --seeds 1 --quiet", "fit|eval")
    typed(f"{name} fit 'my data.jsonl' --out both --strategy knn --strategy ridge --quiet", "eval")
    capsys.readouterr()
    assert main([name, "route", "a question", "--router", "both"]) == 0
    said.append(capsys.readouterr().err)
    assert f"(anabranch {name} eval DATA --router both recommends one)" in said[-1]
    assert not re.search(rf"{other} ({'|'.join(TWINS)})\b", "".join(said))


def test_a_command_of_one_door_leaves_no_trace_at_the_other(capsys):
    for name in (*DOORS, *reversed(DOORS)):
        assert main([name, "route", "x", "--router", "nowhere"]) == 2
        assert door() == f"anabranch {name}"


def test_no_other_text_of_theirs_names_a_door():
    """Of whatever they say: what is said at both doors names neither, or asks `door`."""
    root = Path(anabranch.__file__).parent
    shared = ("doors", "eval", "fit", "off_policy", "options", "replay", "route", "verdict")
    files = [*(root / "routers").rglob("*.py"), *(root / f"cli/gateway/{one}.py" for one in shared)]
    named = re.compile(rf"\b(gateway|routers) ({'|'.join(TWINS)})\b")
    found = []
    for file in files:
        tree = ast.parse(file.read_text())
        documents = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
        found += [
            (file.name, one.lineno, one.value) for one in texts if named.search(one.value) and id(one) not in documents
        ]
    assert found == []
