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
from torchruns import children_of, started_by


@pytest.fixture
def torchrun(cli, work):
    """Run ``torchrun --nproc-per-node 2 -m anabranch`` with arguments; what it printed, having ended well."""

    def run(*arguments):
        done = cli(*arguments, before=started_by(2))
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


def kill_one(running):
    """One of the processes, as if it had taken too much memory. torchrun ends the others."""
    os.kill(children_of(running.pid)[3], signal.SIGKILL)


def kill_all(running):
    """Everything at once, as if the machine had lost its power."""
    for process in (running.pid, *children_of(running.pid).values()):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes by /proc")
@pytest.mark.parametrize(
    ("kill", "processes", "layout"), [(kill_one, 2, ("2", "1")), (kill_all, 1, ("1", "1"))], ids=["one", "all"]
)
def test_a_killed_run_of_four_goes_on_in_another_layout_to_the_bit(
    cli, work, environment, tiny, data, kill, processes, layout
):
    settings = [*tiny, *data, "--set=parallel.exact=4", "--set=train.checkpoint_every=1", "--set=train.log_every=1"]
    settings += ["--steps", "40", "--json", "--quiet"]
    if not (work / "exact-one").exists():
        alone = cli("train", "tiny", "--out", "exact-one", *settings)
        assert alone.returncode == 0, alone.stderr
    out = f"exact-{kill.__name__}"
    four = [*started_by(4), "train", "tiny", "--out", out, *settings]
    four += ["--set=parallel.pipeline=2", "--set=parallel.data=2"]
    running = subprocess.Popen(
        four, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 200
        while len(checkpoints(work / out)) < 2:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)
        kill(running)
        _, told = running.communicate(timeout=100)
    finally:
        running.kill()
        running.wait()
    assert running.returncode != 0
    assert "a fault inside anabranch" not in told
    assert told.count("error: another process of this run has ended") <= 1
    assert 2 <= len(read_metrics(work / out)) < 40
    shape = [f"--set=parallel.pipeline={layout[0]}", f"--set=parallel.data={layout[1]}"]
    start = {"before": started_by(processes)} if processes > 1 else {}
    resumed = cli("train", "--out", out, "--resume", "--json", "--quiet", *shape, **start)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["step"] == 40
    ours, theirs = (
        [line for line in read_metrics(work / run) if line["kind"] == "train"] for run in ("exact-one", out)
    )
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("step", "loss", "auxiliary", "gradient_norm"):
            assert mine[name] == other[name]
    for file in ("model.safetensors", "optimizer.safetensors"):
        mine, other = (load_file(checkpoints(work / run)[-1] / file) for run in ("exact-one", out))
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


@pytest.mark.slow
def test_what_all_processes_find_wrong_is_told_once(cli, work, tiny, data):
    settings = ["--steps", 4, "--set=parallel.pipeline=2", "--set=parallel.data=3", *tiny, *data]
    done = cli("train", "demo", "--out", "wrong", *settings, before=started_by(2))
    said = "parallel.data is 3, and 2 processes in groups of 2 have 1 batches; start 6, or set it to 1"
    assert done.returncode != 0
    assert done.stderr.count(f"error: {said}") == 1
    # torchrun's own account of who failed.
    assert f": {said}" in done.stderr.partition("Root Cause")[2]


@pytest.fixture(scope="module")
def long_text(work):
    """More tokens than processes run one by one, and no multiple of them."""
    (work / "long.txt").write_text("class Alpha3:\n    name = 'thing'\n\ndef add(a, b):\n" * 4)
    return work / "long.txt"


@pytest.mark.slow
def test_two_processes_continue_a_text_over_a_cache_that_is_cut(cli, torchrun, trained, long_text):
    line = ["generate", trained[0], "--prompt", long_text.read_text(), "--max-tokens", "12", "--temperature", "0"]
    alone = json.loads(cli(*line, "--json").stdout)
    cut = json.loads(torchrun(*line, "--context", "2", "--json").stdout)
    assert (cut["token_ids"], cut["prompt_token_ids"]) == (alone["token_ids"], alone["prompt_token_ids"])
    assert len(cut["token_ids"]) == 12
    # What is piped in comes to the first process, and the first process talks.
    with open(long_text) as piped:
        done = cli(
            "generate", trained[0], *line[4:], "--prompt", "-", "--context", "2", before=started_by(2), stdin=piped
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == long_text.read_text() + alone["text"] + "\n"


@pytest.mark.slow
def test_what_two_processes_draw_is_the_same_for_a_seed(torchrun, trained, long_text):
    line = ["generate", trained[0], "--prompt", long_text.read_text(), "--max-tokens", "12", "--temperature", "1.5"]
    drawn = [*line, "--top-k", "20", "--seed", "3", "--context", "2", "--json"]
    assert json.loads(torchrun(*drawn).stdout)["token_ids"] == json.loads(torchrun(*drawn).stdout)["token_ids"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_cut_is_told_once(cli, trained):
    line = ["generate", trained[0], "--prompt", "a", "--context"]
    for beside, said in (
        (["3"], "--context is 3, and there are 2 processes; start it with torchrun --nproc-per-node 3"),
        (["2", "--memory", "1GiB"], "--memory cannot be combined with --context; leave one of them out"),
    ):
        done = cli(*line, *beside, before=started_by(2))
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count(f"error: {said}") == 1


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (
            ["--context", "2"],
            "--context is 2, and there is 1 process; start it with torchrun --nproc-per-node 2 -m anabranch generate",
        ),
        (["--context", "1", "--min-p", "0.1"], "--min-p cannot be combined with --context; leave one of them out"),
        (["--context", "1", "--rewire"], "--context cannot be combined with --rewire; leave one of them out"),
    ],
)
def test_what_does_not_go_with_a_cut_cache_is_one_line(here, trained, beside, said):
    code, out, told = here("generate", trained[0], "--prompt", "a", *beside)
    assert (code, out) == (2, "")
    assert told.startswith(f"error: {said}")


def test_one_process_has_the_whole_cache(here, trained):
    line = ["generate", trained[0], "--prompt", "class Al", "--max-tokens", "4", "--temperature", "0", "--json"]
    (_, alone, _), (code, cut, _) = here(*line), here(*line, "--context", "1")
    assert code == 0
    assert json.loads(cut)["token_ids"] == json.loads(alone)["token_ids"]


def test_the_module_is_the_command(cli):
    done = cli("--version", before=[sys.executable, "-m", "anabranch"])
    assert (done.returncode, done.stdout.split()[0]) == (0, "anabranch"), done.stderr
    done = cli("nonsense", before=[sys.executable, "-m", "anabranch"])
    assert (done.returncode, done.stderr) == (2, "error: no such command 'nonsense' (see anabranch --help)\n")
