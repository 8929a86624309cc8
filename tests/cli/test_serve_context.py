"""``anabranch serve --context`` under torchrun: one answers over keys and values of which each process has a share."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request

import pytest

from anabranch.cli.over_ranks import OverRanks
from serving_models import posted, saved_moe, serve_process
from torchruns import children_of, started_by

BODY = {"model": "m", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
SETTINGS = (
    "--set",
    "engine.dtype=float32",
    "--set",
    "engine.block_tokens=4",
    "--set",
    "engine.num_blocks=400",
    "--served-name",
    "m",
)
# Longest that anything here may take: starting processes on a machine that does something else.
BOUND_S = 120


@contextlib.contextmanager
def served(tmp_path, environment, processes, *more):
    """(torchrun, the URL) of a server over so many processes."""
    log = open(tmp_path / "stderr", "wb")
    words = ["serve", saved_moe(), "--context", str(processes), "--port", "0", "--json", *SETTINGS, *more]
    process = subprocess.Popen(
        [*started_by(processes), *words], stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path, env=environment
    )
    try:
        said = ""
        while not said.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, (tmp_path / "stderr").read_text()
            said += line
        yield process, json.loads(said)["url"]
    finally:
        for pid in children_of(process.pid).values() if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=BOUND_S)
        log.close()


def prompts():
    return ["A river branches and joins again. " * 12, "A river branches and joins anew. " * 9, "x", "Two ways"]


def completions(url, **changes):
    """All of them beside each other, by the texts of their answers."""
    body = {**BODY, "prompt": prompts(), **changes}
    return [choice["text"] for choice in posted(url, body)["choices"]]


@pytest.mark.slow
def test_answers_are_those_of_one_process_and_a_client_that_leaves_harms_nobody(tmp_path, environment):
    with serve_process(*SETTINGS) as alone:
        expected = completions(alone.url)
    with served(tmp_path, environment, 2) as (process, url):
        assert completions(url) == expected
        host, port = url.removeprefix("http://").split(":")
        for _ in range(3):
            body = json.dumps({**BODY, "prompt": prompts()[0], "max_tokens": 900, "stream": True}).encode()
            with socket.create_connection((host, int(port)), BOUND_S) as gone:
                gone.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
                gone.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
                assert gone.recv(10)
        assert completions(url) == expected
        with pytest.raises(urllib.error.HTTPError) as caught:
            posted(url, {**BODY, "prompt": "x", "max_tokens": 100_000})
        assert caught.value.code == 400
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=BOUND_S)
    assert "Traceback" not in (tmp_path / "stderr").read_text().partition("torch")[0]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_ends_all_with_a_word(tmp_path, environment, sign):
    with served(tmp_path, environment, 2, "--set", "engine.context_timeout_s=4") as (process, url):
        os.kill(children_of(process.pid)[1], sign)
        # By whoever sees it first: torchrun, or the first process at its next pass.
        with pytest.raises((urllib.error.HTTPError, OSError)):
            posted(url, {**BODY, "prompt": "x"})
        process.communicate(timeout=BOUND_S)
        assert process.returncode == 1
    told = (tmp_path / "stderr").read_text()
    if sign == signal.SIGSTOP:
        assert "RankLost" in told
        assert "start all processes again" in told


STEPS = """
import os, shutil, sys
from pathlib import Path

import torch.distributed as dist

from anabranch.cli.over_ranks import over_ranks
from anabranch.lm import checkpoint

run, copy, given = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
find = checkpoint.find_model


def found_before(path):
    place = find(path)
    dist.barrier()
    return place


with over_ranks(2, "cpu", {}) as ranks:
    if ranks.is_first:
        checkpoint.find_model = found_before
    else:
        # The first has found its checkpoint.
        dist.barrier()
        shutil.copytree(copy, run / "checkpoints" / "step-00000002")
    print(f"{os.environ['RANK']} {ranks.checkpoint(given)}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "model"])
def test_all_processes_have_the_checkpoint_that_the_first_has_found(what, tmp_path, environment):
    run, script = tmp_path / "run", tmp_path / "script.py"
    first = run / "checkpoints" / "step-00000001"
    shutil.copytree(saved_moe(), first)
    script.write_text(STEPS)
    given = str(run) if what == "run" else saved_moe()
    words = [*started_by(2)[:-2], str(script), str(run), saved_moe(), given]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoints" / "step-00000002").is_dir()
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told == dict.fromkeys("01", str(first) if what == "run" else saved_moe())


def test_one_process_has_the_newest_checkpoint(tmp_path):
    for step in ("step-00000001", "step-00000002"):
        shutil.copytree(saved_moe(), tmp_path / "run" / "checkpoints" / step)
    assert OverRanks(1).checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoints" / step)
    assert OverRanks(1).checkpoint(saved_moe()) == saved_moe()


@pytest.mark.slow
def test_without_torchrun_it_says_how(cli):
    done = cli("serve", saved_moe(), "--context", "2")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2 -m anabranch serve" in done.stderr
