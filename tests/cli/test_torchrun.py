"""Training in two processes, started as the documentation says: torchrun, the module, the command."""

import json
import math
import sys
from pathlib import Path

import pytest

from anabranch.lm import load_model


@pytest.fixture
def torchrun(cli, work):
    """Run ``torchrun --nproc-per-node 2 -m anabranch`` with arguments; what it printed, having ended well."""

    def run(*arguments):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "anabranch"]
        done = cli(*arguments, before=[sys.executable, *start])
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


def test_the_module_is_the_command(cli):
    done = cli("--version", before=[sys.executable, "-m", "anabranch"])
    assert (done.returncode, done.stdout.split()[0]) == (0, "anabranch"), done.stderr
    done = cli("nonsense", before=[sys.executable, "-m", "anabranch"])
    assert (done.returncode, done.stderr) == (2, "error: no such command 'nonsense' (see anabranch --help)\n")
