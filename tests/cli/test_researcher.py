"""The path of somebody who tries an idea: text of one's own, a design in a file, a model that is not there, questions to the shell."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from anabranch.cli.options import read_assignments, read_texts, use_granted_cores
from anabranch.cli.runs import build_config, names_preset
from anabranch.config import differences
from anabranch.data import Files, Table, corpus_at
from anabranch.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for name in (
        "notes/a.md",
        "notes/b.md",
        "notes/deep/c.md",
        "notes/d.txt",
        "one[1].txt",
        "rows.jsonl",
        "more.jsonl",
    ):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Text of one's own


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        (["notes"], ["notes"]),
        (["notes/a.md"], ["notes/a.md"]),
        (["notes/*.md"], ["notes/a.md", "notes/b.md"]),
        (["notes/**/*.md"], ["notes/a.md", "notes/b.md", "notes/deep/c.md"]),
        (["notes/d.txt", "notes/?.md"], ["notes/d.txt", "notes/a.md", "notes/b.md"]),
        # What is there is no pattern.
        (["one[1].txt"], ["one[1].txt"]),
    ],
)
def test_files_folders_and_patterns(texts, given, paths):
    assert corpus_at(*given) == Files.Config(paths=tuple(paths))
    assert read_texts(given) == {"data.corpus.kind": "files", "data.corpus.paths": paths}


def test_tables_by_their_names(texts):
    assert corpus_at("*.jsonl") == Table.Config(paths=("more.jsonl", "rows.jsonl"))
    assert read_texts(["rows.jsonl"])["data.corpus.kind"] == "table"
    with pytest.raises(DataError, match=r"rows\.jsonl is a table, but notes is not"):
        corpus_at("rows.jsonl", "notes")
    assert read_texts(None) == read_texts([]) == {}


@pytest.mark.parametrize(
    ("given", "told"), [("nowhere/*.md", "nothing matches 'nowhere/*.md'"), ("nowhere", "nowhere")]
)
def test_text_that_is_not_there(texts, given, told):
    with pytest.raises(DataError) as raised:
        corpus_at("notes", given)
    assert told in str(raised.value)


def test_fields_that_are_set_are_over_the_text(texts):
    _, config = build_config("moe", None, None, read_texts(["notes"]) | {"data.corpus.pattern": "*.md"})
    assert (config.data.corpus.paths, config.data.corpus.pattern) == (("notes",), "*.md")


def test_a_pattern_without_quotes_is_told_so(texts, here):
    with pytest.raises(ConfigError, match="is a file or folder, not a preset; give text with --data"):
        build_config(str(texts / "notes" / "b.md"), None, None, {})
    code, _, err = here("train", "--data", texts / "notes", "--out", "x", texts / "notes" / "b.md")
    assert code == 2
    assert "give text with --data" in err


@pytest.mark.parametrize("command", ["train demo --out x", "eval m", "report m --out x"])
def test_files_of_a_pattern_without_quotes_are_told_to_be_quoted(texts, here, command):
    """The shell has put several files behind --data, which takes one."""
    files = [texts / "notes" / name for name in ("a.md", "b.md", "d.txt")]
    code, out, err = here(*command.split(), "--data", *files)
    assert (code, out) == (2, "")
    assert "put a pattern of files in quotes, as in --data 'notes/*.md'" in err
    assert not (texts / "x").exists()
    # What is no file is another mistake.
    assert "in quotes" not in here(*command.split(), "--data", files[0], "nonsense")[2]


def test_train_and_compare_read_it(here, work, tiny):
    (work / "half").mkdir(exist_ok=True)
    for number in range(12):
        shutil.copy(work / "text" / "alpha" / f"{number}.py", work / "half")
    options = ["--steps", 2, "--json", *tiny, "--set=data.validation_fraction=0.3"]
    code, _, err = here("train", "demo", "--data", "half/*.py", "--out", "of-half", *options)
    assert code == 0, err
    held = json.loads((work / "of-half" / "config.json").read_text())
    corpus = held["data"]["corpus"]
    assert (corpus["kind"], len(corpus["paths"])) == ("files", 12)
    code, _, err = here("compare", "moe", "dense", "--data", "nowhere", "--out", "y")
    assert code == 2
    assert "nowhere" in err
    assert not (work / "y").exists()


# Designs in files


def test_a_design_says_what_it_starts_from(here, work):
    (work / "margin.toml").write_text("[train]\nsteps = 1\n")
    (work / "named.toml").write_text('preset = "moe"\n[train]\nsteps = 1\n')
    assert [names_preset(work / name) for name in ("margin.toml", "named.toml")] == [False, True]
    code, out, err = here("compare", "moe", "margin.toml", "--out", "compared-margin")
    assert (code, out) == (2, "")
    assert "margin.toml names no preset, so what it is compared with is not said; put preset = " in err
    assert not (work / "compared-margin").exists()


def test_train_says_whose_what_a_file_leaves_open_is(here, work, tiny, data):
    code, out, err = here(
        "train", "--config", "margin.toml", "--out", "from-margin", "--steps", 1, "--json", *tiny, *data
    )
    assert code == 0, err
    assert "note: margin.toml names no preset; what it does not set is that of demo" in err
    json.loads(out)
    code, _, err = here("train", "moe", "--config", "margin.toml", "--out", "of-moe", "--steps", 0, *tiny, *data)
    assert code == 0, err
    assert "names no preset" not in err


# Answers


@pytest.mark.parametrize("command", ["eval m", "report m --out r", "train --out x", "compare moe dense --out x"])
def test_text_on_the_line_is_answered_by_the_option_for_files(here, command):
    code, out, err = here(*command.split(), "--text", "hello")
    assert (code, out) == (2, "")
    assert "no such option: --text; text is read from files here: --data PATH" in err


def test_the_cures_on_the_page_of_errors_work():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    lines = [shlex.split(found) for found in re.findall(r"`(--set [^`]*)`", page)]
    assert len(lines) >= 2
    for words in lines:
        settings = read_assignments([word for word in words if word != "--set"])
        _, config = build_config(None, None, None, settings)
        assert differences(build_config(None, None, None, {})[1], config)


def test_a_name_of_the_hub_is_answered_by_the_command_that_fetches_it(here, work):
    for command in ("info", "eval", "generate"):
        code, _, err = here(command, "allenai/OLMoE-1B-7B-0924", *(["--prompt", "x"] if command == "generate" else []))
        assert code == 2
        assert "hf download allenai/OLMoE-1B-7B-0924 --local-dir OLMoE-1B-7B-0924" in err
    for other in ("text/gone", "a/b/c", "/a/b", "../a"):
        assert "hf download" not in here("info", other)[2]


def test_info_says_what_a_model_is_and_how_it_is_stored(here, trained):
    run, _ = trained
    _, out, _ = here("info", run, "--json")
    found = json.loads(out)
    assert found["architecture"] == "anabranch"
    assert found["stored"] == {"float32": found["parameters"]}
    assert "stored  anabranch   float32\n" in here("info", run)[1]
    assert "architecture" not in json.loads(here("info", "moe", "--json")[1])


def test_info_of_a_folder_of_hugging_faces(here, trained, work):
    run, _ = trained
    code, _, err = here("convert", run, work / "in-bits", "--to", "native", "--dtype", "bfloat16")
    assert code == 0, err
    found = json.loads(here("info", work / "in-bits", "--json")[1])
    assert found["stored"] == {"bfloat16": found["parameters"]}


def test_a_report_that_would_be_a_file_is_told_so(here, trained, work):
    run, _ = trained
    (work / "page.html").write_text("mine")
    code, _, err = here("report", run, "--out", "page.html")
    assert code == 2
    assert "page.html is a file, and a report is a folder" in err
    assert (work / "page.html").read_text() == "mine"


def test_a_shell_completes_commands_and_options(cli, environment):
    def completed(line):
        told = {"_ANABRANCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = cli(env={**environment, **told})
        assert done.stderr == ""
        return done.stdout.split()

    assert {"train", "report", "graph"} <= set(completed("anabranch "))
    assert completed("anabranch tra") == ["train"]
    assert "--data" in completed("anabranch train --da")
    assert "ppr" in completed("anabranch graph pp")


# Cores


@pytest.mark.parametrize(("cores", "told", "threads"), [(1, None, 1), (64, None, None), (1, "2", None)])
def test_no_more_threads_than_cores_that_may_be_used(monkeypatch, cores, told, threads):
    monkeypatch.setattr("anabranch.machine.usable_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        use_granted_cores()
        assert torch.get_num_threads() == (threads or 2)
    finally:
        torch.set_num_threads(before)


# The demo


@pytest.mark.parametrize("is_ours", [True, False])
def test_make_demo_deletes_only_what_it_made(tmp_path, is_ours):
    if shutil.which("make") is None:
        pytest.skip("make is not here")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "anabranch"
    command.write_text("#!/bin/sh\necho anabranch $*\n")
    command.chmod(0o755)
    for name in (".venv/bin/pip", ".venv/.installed"):
        (tmp_path / name).touch()
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "mine.txt").write_text("months of work")
    if is_ours:
        (tmp_path / "runs" / "demo" / ".made-by-make-demo").touch()
    done = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (tmp_path / "runs" / "demo" / "mine.txt").exists() != is_ours
    if is_ours:
        assert done.returncode == 0, done.stderr
        assert "anabranch train demo --out runs/demo" in done.stdout
        # And so it is once more.
        assert (tmp_path / "runs" / "demo" / ".made-by-make-demo").exists()
    else:
        assert done.returncode != 0
        assert "make demo did not make it; move it away" in done.stderr
        assert "anabranch train" not in done.stdout
