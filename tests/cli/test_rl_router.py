"""``anabranch rl train router-r1`` and ``rl eval``, from a command line to a router that can be loaded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from anabranch.cli.main import main
from anabranch.files import parse_json
from anabranch.lm import load_model
from rl_router_small import SMALL
from server_process import SOURCE


def words(settings):
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


FEW = words(SMALL | {"warm.steps": 3})


def run(capfd, *line):
    code = main([*map(str, line)])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "run"
    assert main(["rl", "train", "router-r1", "--samples", "16", "--seed", "2", "--out", str(out), "--quiet", *FEW]) == 0
    return out


def test_train_tells_as_json_and_writes_what_a_gateway_needs(capfd, tmp_path):
    out = tmp_path / "run"
    code, said, _ = run(
        capfd, "rl", "train", "router-r1-grpo", "--samples", 20, "--out", out, "--json", "--quiet", *FEW
    )
    told = json.loads(said)
    assert code == 0
    # Whole rollouts of 8.
    assert (told["samples"], told["steps"], told["episodes"]) == (16, 4, 8)
    assert told["mean_return"] == told["mean_reward"]
    assert told["samples_per_second"] > 0
    assert {
        "exact_match_one_hop",
        "exact_match_two_hop",
        "calls",
        "raw_cost",
        "well_formed",
        "to_experts",
    } <= told.keys()
    model, tokenizer = load_model(out)
    assert tokenizer.vocab_size == model.config.vocab_size
    strategy = (out / "strategy.toml").read_text()
    assert 'kind = "router_r1"' in strategy
    assert strategy.count("good at") == 3


def test_eval_says_what_training_said(capfd, trained, tmp_path):
    pytest.importorskip("matplotlib")
    made = ["--csv", tmp_path / "e.csv", "--picture", tmp_path / "c.svg"]
    code, out, _ = run(capfd, "rl", "eval", trained, "--episodes", 8, "--json", *made)
    told = json.loads(out)
    assert code == 0
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert told["mean_return"] == metrics[-1]["mean_reward"]
    lines = (tmp_path / "e.csv").read_text().splitlines()
    assert lines[0].startswith("question,answer,wanted,reward")
    assert len(lines) == 9
    assert "episodes of a rollout" in (tmp_path / "c.svg").read_text()
    code, out, _ = run(capfd, "rl", "eval", trained, "--episodes", 2, "--seed", 9)
    assert code == 0
    assert "on average of 2 episodes" in out
    assert f"anabranch serve {trained} --served-name router" in out


@pytest.mark.slow
def test_a_run_goes_on_for_more_episodes(capfd, tmp_path):
    where = tmp_path / "run"
    assert run(capfd, "rl", "train", "router-r1", "--samples", 8, "--out", where, "--quiet", *FEW)[0] == 0
    code, out, _ = run(capfd, "rl", "train", "--out", where, "--resume", "--samples", 24, "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["samples"] == 24
    # The warm start is what it was.
    assert parse_json((where / "warm" / "config.json").read_text())["train"]["steps"] == 3


def test_a_run_that_saved_nothing_yet_begins_with_its_warm_start(capfd, trained, tmp_path):
    where = tmp_path / "run"
    shutil.copytree(trained / "warm", where / "warm")
    shutil.copy(trained / "config.json", where)
    # A rate by which no weight moves.
    line = ["rl", "train", "--out", where, "--resume", "--samples", 8, "--quiet", "--set", "train.learning_rate=1e-30"]
    assert run(capfd, *line)[0] == 0
    warm, begun = (load_model(folder)[0].state_dict() for folder in (where / "warm", where))
    assert all(torch.equal(begun[name], value) for name, value in warm.items())


@pytest.mark.slow
def test_a_warm_start_ends_with_the_code_of_its_signal(tmp_path):
    words = [
        sys.executable,
        "-m",
        "anabranch.cli.main",
        "rl",
        "train",
        "router-r1",
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    words += ["--set", "warm.steps=100000", *FEW[: -len(["--set", "warm.steps=3"])]]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run/warm/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


@pytest.mark.slow
def test_a_warm_start_that_is_there_is_gone_on_with(capfd, trained, tmp_path):
    where = tmp_path / "run"
    where.mkdir()
    (where / "warm").symlink_to(trained / "warm")
    before = sorted((trained / "warm" / "checkpoints").iterdir())
    line = ["rl", "train", "router-r1", "--samples", 8, "--out", where, "--quiet", "--json"]
    assert run(capfd, *line, "--seed", 2, *FEW)[0] == 0
    assert sorted((trained / "warm" / "checkpoints").iterdir()) == before
    # One of another seed is none of this run's.
    (where / "config.json").unlink()
    (where / "metrics.jsonl").unlink()
    (where / "checkpoints").rename(tmp_path / "old")
    code, _, err = run(capfd, *line, "--seed", 3, *FEW)
    assert code == 2
    assert "train.seed was 2 and is now 3" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", "router-r2", "--out", "x"], "did you mean 'router-r1'"),
        (["train", "router-r1", "--out", "x", "--set", "model.dim=3"], "fields of task, train and warm can be set"),
        (
            ["train", "router-r1", "--out", "x", "--set", "warm.size=3"],
            "traces, steps, batch_size, learning_rate can be set",
        ),
        (["train", "router-r1", "--out", "x", "--set", "warm.steps=-1"], "steps is -1"),
        (["train", "router-r1", "--out", "x", "--set", "task.world.alpha=2"], "alpha is 2"),
        (["train", "router-r1", "--out", "x", "--set", "task.world.entities=2"], "entities is 2"),
        (["train", "router-r1", "--out", "x", "--set", "task.world.kind=nowhere"], "nowhere"),
        (["train", "router-r1-grpo", "--out", "x", "--set", "task.group=1"], "group is 1"),
        (["train", "router-r1", "--out", "x", "--set", "train.batch_size=7"], "does not divide"),
        (["train", "--out", "x", "--resume"], "no training run"),
        (["train", "router-r1", "--out", "{run}"], "already holds a run"),
        (["train", "router-r1", "--out", "{run}", "--resume"], "WHAT is given with --resume"),
        (
            ["train", "--out", "{run}", "--resume", "--set", "warm.steps=4"],
            "the warm start of a run that goes on is over",
        ),
        (["eval", "{run}", "--csv", "{run}/config.json"], "is read"),
        (["replay", "{run}", "--out", "a.gif"], "read its episodes"),
    ],
)
def test_wrong_lines_are_one_line(capfd, trained, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capfd, "rl", *(word.replace("{run}", str(trained)) for word in line))
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
