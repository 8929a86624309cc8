"""Two hosts on one machine, as the guide shows them: two network namespaces with a link between them, and a torchrun in each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.testing import can_make_hosts
from anabranch.train import read_metrics

SCRIPT = Path(__file__).parents[2] / "deploy" / "two-hosts.sh"
HOSTS = ("ip", "netns", "list")


@pytest.fixture
def hosts(work, environment):
    """Run the script with arguments behind processes and Mbit/s; afterwards no host of its own is left."""

    def run(*arguments):
        before = subprocess.run(HOSTS, capture_output=True, text=True, check=True).stdout
        line = ["bash", str(SCRIPT), *map(str, arguments)]
        env = {**environment, "PYTHON": sys.executable}
        running = subprocess.Popen(line, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, told = running.communicate(timeout=500)
        finally:
            # It takes its hosts down.
            running.terminate()
            running.wait(60)
        done = subprocess.CompletedProcess(line, running.returncode, out, told)
        left = set(subprocess.run(HOSTS, capture_output=True, text=True, check=True).stdout.split("\n"))
        assert left <= set(before.split("\n"))
        assert not list(Path("/etc/netns").glob("anabranch-host-*"))
        return done

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc")
def test_two_hosts_train_together_and_end_together(hosts, cli, work, tiny, data):
    settings = [*tiny, *data, "--set=train.log_every=1", "--set=parallel.exact=4", "--steps", 4, "--json", "--quiet"]
    done = hosts(1, 200, "train", "demo", "--out", "two-hosts", *settings, "--set=parallel.pipeline=2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 4
    assert cli("train", "demo", "--out", "one-host", *settings).returncode == 0
    one, two = (
        [line["loss"] for line in read_metrics(work / name) if line["kind"] == "train"]
        for name in ("one-host", "two-hosts")
    )
    assert one == two


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc")
def test_what_a_host_finds_wrong_ends_both(hosts, tiny, data):
    done = hosts(1, 200, "train", "demo", "--out", "two-more", "--set=parallel.data=3", *tiny, *data)
    assert done.returncode != 0
    assert "parallel.data is 3, and 2 processes have 2 batches" in done.stderr


def test_without_arguments_it_says_what_it_takes():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "PROCESSES-PER-HOST MBIT COMMAND" in done.stdout
