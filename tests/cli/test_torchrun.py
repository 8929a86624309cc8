"""Training in two processes, started as the documentation says: torchrun, the module, the command."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anabranch.lm import load_model
from anabranch.train import checkpoints, read_metrics

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def torchrun(cli, work):
    """Run ``torchrun --nproc-per-node 2 -m anabranch`` with arguments; what it printed, having ended well."""

    def run(*arguments):
        done = cli(*arguments, before=[sys.executable, *TORCHRUN, "2", "-m", "anabranch"])
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    ["train.parallel=ddp", "train.parallel=fsdp", "parallel.experts=2", "parallel.context=2", "parallel.pipeline=2"],
)
def test_two_processes_train_and_one_talks(torchrun, work, tiny, data, parallel):
    out = f"two-{parallel}"
    settings = ["--steps", 4, f"--set={parallel}", *tiny, *data]
    found = json.loads(torchrun("train", "demo", "--out", out, "--json", "--quiet", *settings).stdout)
    assert (found["status"], found["step"], found["folder"]) == ("finished", 4, out)
    assert math.isfinite(found["bits_per_byte"])
    assert len(found["sample"]["prompt"]) == 16
    assert found["sample"]["text"]
    model, tokenizer = load_model(work / out)
    assert tokenizer is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == found["parameters"]
    assert Path(work / found["checkpoint"]).is_dir()


def child_of(pid, rank):
    """The process of a rank that a torchrun has started; None while there is none."""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        try:
            named = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in named:
            return child
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes by /proc")
def test_a_run_of_four_that_lost_one_goes_on_with_two_to_the_bit(cli, torchrun, work, environment, tiny, data):
    settings = [*tiny, *data, "--set=parallel.exact=4", "--set=train.checkpoint_every=1", "--set=train.log_every=1"]
    settings += ["--steps", "40", "--json", "--quiet"]
    assert cli("train", "tiny", "--out", "exact-one", *settings).returncode == 0
    four = [sys.executable, *TORCHRUN, "4", "-m", "anabranch", "train", "tiny", "--out", "exact-four", *settings]
    four += ["--set=parallel.pipeline=2", "--set=parallel.data=2"]
    running = subprocess.Popen(
        four, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 200
        while len(checkpoints(work / "exact-four")) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(child_of(running.pid, 3), signal.SIGKILL)
        _, told = running.communicate(timeout=100)
    finally:
        running.kill()
        running.wait()
    assert running.returncode != 0
    assert "a fault inside anabranch" not in told
    assert told.count("error: another process of this run has ended") <= 1
    assert 2 <= len(read_metrics(work / "exact-four")) < 40
    torchrun("train", "--out", "exact-four", "--resume", "--json", "--quiet", "--set=parallel.data=1")
    ours, theirs = (
        [line for line in read_metrics(work / f"exact-{name}") if line["kind"] == "train"] for name in ("one", "four")
    )
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("step", "loss", "auxiliary", "gradient_norm"):
            assert mine[name] == other[name]
    for file in ("model.safetensors", "optimizer.safetensors"):
        mine, other = (load_file(checkpoints(work / f"exact-{name}")[-1] / file) for name in ("one", "four"))
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


@pytest.mark.slow
def test_what_all_processes_find_wrong_is_told_once(cli, work, tiny, data):
    settings = ["--steps", 4, "--set=parallel.pipeline=2", "--set=parallel.data=3", *tiny, *data]
    done = cli("train", "demo", "--out", "wrong", *settings, before=[sys.executable, *TORCHRUN, "2", "-m", "anabranch"])
    said = "parallel.data is 3, and 2 processes in groups of 2 have 1 batches; start 6, or set it to 1"
    assert done.returncode != 0
    assert done.stderr.count(f"error: {said}") == 1
    # torchrun's own account of who failed.
    assert f": {said}" in done.stderr.partition("Root Cause")[2]


def test_the_module_is_the_command(cli):
    done = cli("--version", before=[sys.executable, "-m", "anabranch"])
    assert (done.returncode, done.stdout.split()[0]) == (0, "anabranch"), done.stderr
    done = cli("nonsense", before=[sys.executable, "-m", "anabranch"])
    assert (done.returncode, done.stderr) == (2, "error: no such command 'nonsense' (see anabranch --help)\n")
