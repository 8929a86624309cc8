"""Functions of a user's own: where a module is looked for."""

import subprocess
import sys
from pathlib import Path

import pytest

import anabranch
from anabranch.errors import ConfigError
from anabranch.own_code import own_function

FIND = """
import sys
from anabranch.own_code import own_function
found, _ = own_function(sys.argv[1], what="reward", called_with="a question")
print(found("x"))
"""


def script(folder, *words):
    """What a command that is installed elsewhere says: Python puts its folder on the path, and not the working one."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/command.py").write_text(FIND)
    return subprocess.run(
        [sys.executable, folder / "bin/command.py", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(anabranch.__file__).parents[1])},
        check=False,
    )


def test_a_module_beside_a_command(tmp_path):
    (tmp_path / "beside_it.py").write_text("def score(x): return x + ' was found'\n")
    # What is installed goes before what lies there by chance.
    (tmp_path / "json.py").write_text("raise SystemExit('not the one')\n")
    made = script(tmp_path, "beside_it:score")
    assert (made.stdout, made.returncode) == ("x was found\n", 0), made.stderr
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "inner.py").write_text("import beside_it\ndef score(x): return beside_it.score('inner')\n")
    assert script(tmp_path, "some_package.inner:score").stdout == "inner was found\n"


def test_a_module_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(
        ConfigError, match=r"no module 'nowhere_at_all' is installed, or lies in .*; write file\.py:name"
    ):
        own_function("nowhere_at_all:score", what="reward", called_with="a question")
    assert sys.path == before


def test_what_a_module_lacks_itself_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lacks_one.py").write_text("import what_is_not_there\n")
    with pytest.raises(ConfigError, match="No module named 'what_is_not_there'"):
        own_function("lacks_one:score", what="reward", called_with="a question")


def test_a_module_that_ends_the_process_as_it_is_loaded(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no licence')\n")
    with pytest.raises(ConfigError, match=r"reward '.*leaves\.py:score' cannot be loaded: SystemExit: no licence"):
        own_function(f"{tmp_path / 'leaves.py'}:score", what="reward", called_with="a question")
