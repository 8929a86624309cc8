"""An adapter that is named by nothing is not the working directory, in any command; and a text that nothing is to be added to."""

import json

import pytest
import typer

from anabranch.cli import main as line
from anabranch.data import ByteTokenizer
from anabranch.lm import save_model
from served_adapters import make_model

COMMANDS = {
    "generate": ["m", "-p", "x", "--adapter", None],
    "chat": ["m", "-m", "x", "--adapter", None],
    "eval": ["m", "--adapter", None],
    "serve": ["m", "--adapter", None],
    "adapt": ["m", "rows.jsonl", "--out", "o", "--from", None],
    "adapters card": [None],
    "adapters describe": [None, "--instruction", "x"],
    "adapters eval": ["m", None, "--data", "x"],
    "adapters gates": [None, "--model", "m", "--data", "x"],
    "adapters cluster": [None, "--clusters", "2"],
    "adapters route": [None, "x"],
    "adapters report": ["m", None, "--out", "o"],
    "adapters export": ["m", None, "--out", "o"],
    "adapters merge": ["a", None, "--out", "o"],
    "adapters fuse": ["m", None, "--out", "o"],
}


@pytest.mark.parametrize("empty", ["", " ", "arrow:", "phatgoose:"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_without_a_name(here, command, empty):
    arguments = [empty if part is None else part for part in COMMANDS[command]]
    if command == "serve" and empty:
        pytest.skip("it is NAME=FOLDER there")
    code, _, err = here(*command.split(), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    told = "must be NAME=FOLDER" if command == "serve" else "it names no folder; give that of an adapter"
    assert told in err
    assert err.startswith(("error: --", "error: ADAPTER", "error: [ADAPTER", "error: POOL", "error: engine."))


def test_no_command_with_an_adapter_is_forgotten():
    app = typer.main.get_command(line._app_of([*line._COMMANDS, *line._GROUPS]))

    def walk(command, path=()):
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))
        for param in getattr(command, "params", ()):
            is_one = "ADAPTER" in (param.metavar or "") or param.name in ("adapter", "adapters", "pool")
            if is_one and (path[0] in ("adapters", "adapt") or param.name == "adapter"):
                yield " ".join(path)

    assert set(walk(app)) == set(COMMANDS)


@pytest.mark.parametrize("prompt", ["x", "xy", "xyz" * 9])
def test_nothing_is_added_where_nothing_is_asked_for(here, tmp_path, prompt):
    save_model(tmp_path / "m", make_model(), ByteTokenizer())
    code, out, err = here("generate", tmp_path / "m", "-p", prompt, "--max-tokens", 0, "--json")
    assert code == 0, err
    assert (json.loads(out)["token_ids"], json.loads(out)["text"]) == ([], "")
