import ast
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anabranch.cli
from anabranch.cli.options import read_seeds
from anabranch.cli.output import (
    duration,
    fact,
    fact_table,
    let_go,
    print_json,
    print_line,
    quantity,
    sample,
    say,
    shell_word,
    size,
    table,
    visible,
    wrote,
)
from anabranch.cli.runs import build_config, flatten
from anabranch.errors import ConfigError


@pytest.mark.parametrize("label", ["wrote", "exactly8", "no answer", "much longer than that"])
def test_a_label_is_never_glued_to_what_it_labels(capsys, label):
    fact(label, "7 times")
    assert re.fullmatch(rf"{label} +7 times\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (1234567, "1.23 M"),
        (999_600, "1 M"),
        (6.9e9, "6.9 B"),
        (1.5e15, "1500 T"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 B"), (12_345_678, "12.3 MB"), (41.2e9, "41.2 GB"), (46_080, "46.1 kB")]
)
def test_size(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7900, "2 h 11 min"), (math.inf, "?")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_json_has_null_for_what_it_cannot_say(capsys):
    print_json({"a": math.nan, "b": [1.5, math.inf], "c": {"d": -math.inf}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": None}}


def test_table_sets_numbers_right_and_is_not_cut_in_a_file(capsys):
    table(["name", "value\n(unit)"], [["short", "1.50"], ["long " * 20, "100.25"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip().endswith("value")
    assert lines[1].startswith("name")
    assert lines[1].endswith("(unit)")
    assert lines[2].endswith("  1.50")
    assert lines[3].startswith("long long long")
    assert lines[3].endswith("100.25")


@pytest.mark.parametrize(
    ("text", "seeds"), [("0,1,2", [0, 1, 2]), ("0-3", [0, 1, 2, 3]), ("5", [5]), ("1,0-1", [1, 0])]
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "-1"])
def test_seeds_that_are_none(text):
    with pytest.raises(ConfigError, match="--seeds is"):
        read_seeds(text)


def test_kind_comes_before_what_it_has():
    table = {"data": {"corpus": {"paths": ["x"], "kind": "files"}}, "train": {"steps": 3}}
    assert list(flatten(table).items()) == [
        ("data.corpus.kind", "files"),
        ("data.corpus.paths", ["x"]),
        ("train.steps", 3),
    ]


def test_config_file_is_over_the_preset_and_under_the_options(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "moe"\n[train]\nsteps = 7\nseed = 1\n[data.corpus]\nkind = "files"\npaths = ["here"]\n'
        "[model.feed_forward.router.select]\ntop_k = 3\n"
    )
    name, config = build_config(None, file, None, {"train.seed": 2})
    assert name == "moe"
    assert (config.train.steps, config.train.seed) == (7, 2)
    assert config.data.corpus.paths == ("here",)
    assert config.model.feed_forward.router.select.top_k == 3
    assert build_config("dense", None, "small", {})[1].model.num_layers == 8
    assert build_config(None, None, None, {})[0] == "demo"


def test_saved_config_of_a_run_is_a_config_file_too(tmp_path):
    import json as json_module

    from anabranch.config import to_dict

    _, config = build_config("rexmoe", None, None, {"train.steps": 5})
    leaves = flatten(json_module.loads(json_module.dumps(to_dict(config))))
    from anabranch.config import override

    _, base = build_config("rexmoe", None, None, {})
    assert override(base, leaves) == config


def test_nothing_of_a_model_steers_the_terminal():
    assert visible("a\tb\nc\x1b[31m\r\x07\x9bé\u202ex\u2066") == "a\tb\nc�[31m���é�x�"


STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HOSTILE = "a\x1b[2Jb\x9b31mc\u202ed\x07\u2028e\u2067f\x7f"


@pytest.mark.parametrize(
    "show",
    [
        print_line,
        say,
        sample,
        lambda text: fact(text, text),
        lambda text: fact(text, text, to=sys.stderr),
        lambda text: wrote(text, shell_word(text)),
        lambda text: table([text], [[text]]),
        lambda text: fact_table([(text, text)]),
        lambda text: print_json({text: [text]}),
        lambda text: logged(text),
    ],
)
def test_whatever_shows_text_shows_what_would_steer(capfd, show):
    """A file that was downloaded says it, and a command repeats it."""
    show(HOSTILE)
    found = capfd.readouterr()
    assert "b" in found.out + found.err
    assert not STEERS.search(found.out + found.err)


def logged(text):
    from anabranch.cli.main import _Visible

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    handler.emit(logging.makeLogRecord({"msg": text}))


def test_json_that_would_steer_says_what_it_said(capsys):
    print_json({HOSTILE: [HOSTILE]})
    assert json.loads(capsys.readouterr().out) == {HOSTILE: [HOSTILE]}


def printed(tree):
    """Arguments of each call of print, and of a write to a standard stream, that are no constant."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "print" or name.endswith("console.print") or re.fullmatch(r"sys\.(stdout|stderr)\.write", name):
            yield from (argument for argument in node.args if not isinstance(argument, ast.Constant))


@pytest.mark.parametrize("path", sorted(Path(anabranch.cli.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_command_prints_past_what_shows_text(path):
    """Text of a file goes through what makes it visible: `print_line`, `fact`, `table`, ..., or `visible` where it is printed.

    ``show`` of `generate` gives a file what a model said, and a terminal what it can bear.
    """
    if path.name == "output.py":
        return
    past = [
        f"{path.name}:{argument.lineno}: {ast.unparse(argument)}"
        for argument in printed(ast.parse(path.read_text()))
        if not (isinstance(argument, ast.Call) and ast.unparse(argument.func) in ("visible", "show"))
    ]
    assert not past, f"print it with print_line, or through visible: {past}"


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        WORDS | st.sampled_from(["a\nb", "it's\n\\n", "-", "", "$HOME", "\x1b[1m", "\udcff"]), min_size=1, max_size=20
    )
)
def test_a_word_of_a_command_line_is_read_by_a_shell_as_it_was(words):
    line = " ".join(map(shell_word, words))
    assert "\n" not in line
    assert not re.search(r"[\x00-\x1f\x7f]", line)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True
    )
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in words)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_let_go_is_heard_no_more_and_the_other_is(name, capfd):
    let_go(getattr(sys, name))
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == (("", "err") if name == "stdout" else ("out", ""))
