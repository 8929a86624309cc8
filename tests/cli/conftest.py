"""A command line run as users run it, and one tiny trained model that all tests here share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    name = 'thing'\n\n\n"
# A model small enough to train in a second.
TINY = [
    "--set=model.dim=32",
    "--set=model.num_layers=2",
    "--set=model.feed_forward.hidden_dim=16",
    "--set=data.sequence_length=32",
    "--set=train.batch_size=4",
    "--set=train.eval_tokens=256",
    "--set=train.checkpoint_every=10",
]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for name in ("alpha", "beta"):
        (folder / "text" / name).mkdir()
        for number in range(30):
            text = TEXT.replace("Thing", f"{name.title()}{number}") * 4
            (folder / "text" / name / f"{number}.py").write_text(text)
    return folder


@pytest.fixture(scope="session")
def environment(work):
    return {
        **os.environ,
        "ANABRANCH_CACHE": str(work / "cache"),
        "ANABRANCH_NO_KERNELS": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }


@pytest.fixture(scope="session")
def cli(work, environment):
    """Run ``anabranch`` with arguments in a process of its own, in the work folder; ``before`` them stands what starts it."""

    def run(*arguments, before=(sys.executable, "-m", "anabranch.cli.main"), **options):
        command = [*before, *map(str, arguments)]
        options = {"capture_output": True, "text": True, "timeout": 240, "cwd": work, "env": environment, **options}
        return subprocess.run(command, **options)

    return run


@pytest.fixture(scope="session")
def data(work):
    """Options that choose the test's own text, in two domains."""
    return [
        "--set=data.corpus.kind=files",
        f'--set=data.corpus.paths=["{work}/text"]',
        "--set=data.corpus.label_by=folder",
        "--set=data.validation_fraction=0.3",
    ]


@pytest.fixture(scope="session")
def tiny():
    """Options that make the model and its batches tiny."""
    return TINY


@pytest.fixture(scope="session")
def trained(cli, work, data):
    """The folder of a run of 20 steps, and what training it printed."""
    done = cli("train", "demo", "--out", "trained", "--steps", 20, "--json", *TINY, *data)
    assert done.returncode == 0, done.stderr
    return Path(work / "trained"), done


@pytest.fixture
def here(cli, monkeypatch, environment, work, capsys):
    """Run ``anabranch`` in this process, which is quicker: (exit code, stdout, stderr)."""
    from anabranch.cli.main import main

    for name in ("ANABRANCH_CACHE", "ANABRANCH_NO_KERNELS", "COLUMNS", "TERM", "NO_COLOR"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(work)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run
