"""``anabranch cluster master``, a process of its own, as peers see it."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from anabranch.cluster.pccl import Communicator, Refused
from pccl_peers import together


@pytest.fixture
def started(tmp_path, environment):
    """Starts a master with these words; returns its process and what it told."""
    running = []

    def start(*words):
        process = subprocess.Popen(
            [sys.executable, "-m", "anabranch", "cluster", "master", "--json", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        running.append(process)
        told = ""
        while not told.endswith("}\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            told += line
        return process, json.loads(told)

    yield start
    for process in running:
        process.kill()
        process.communicate(timeout=60)


def test_peers_reduce_it_is_killed_started_again_and_stopped(started, tmp_path):
    (tmp_path / "secret").write_text("river\n")
    words = ("--journal", "run.journal", "--secret-file", "secret", "--dead-after", "2")
    process, told = started("--listen", "127.0.0.1:0", *words)
    assert told["has_secret"]
    with pytest.raises(Refused):
        Communicator(told["address"], secret="delta").connect()
    again = []

    def work(number, peers):
        first = torch.ones(3)
        peers.all_reduce(first)
        if number == 0:
            process.kill()
            process.wait(60)
            again.append(started("--listen", told["address"], *words))
        second = torch.full((3,), 2.0)
        peers.all_reduce(second)
        return first.tolist(), second.tolist()

    found = together(told["address"], 2, work, secret="river", master_wait_s=30.0)
    assert found == [([2.0] * 3, [4.0] * 3)] * 2
    (second, retold) = again[0]
    assert retold["run"] == told["run"]
    second.send_signal(signal.SIGTERM)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0
    assert err.splitlines()[-1] == "stopped"


def test_an_open_master_says_so(started):
    process, told = started("--listen", "0.0.0.0:0")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "no secret: whoever reaches this port takes part" in err
    assert not told["has_secret"]
    assert process.returncode == 0
