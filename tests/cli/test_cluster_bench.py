"""``anabranch cluster bench`` in two shells."""

import json
import subprocess
import sys
import time

import pytest


@pytest.fixture
def shell(tmp_path, environment):
    running = []

    def start(*words):
        process = subprocess.Popen(
            [sys.executable, "-m", "anabranch", "cluster", "bench", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate(timeout=60)


def address_of(process):
    """What the one that listens says to start elsewhere."""
    line = process.stderr.readline()
    assert "--master " in line, line + process.stderr.read()
    return line.partition("--master ")[2].partition(",")[0]


def test_two_shells_print_the_same_table(shell, tmp_path):
    (tmp_path / "secret").write_text("river\n")
    words = (
        "--size",
        "1MB",
        "--size",
        "8B",
        "--rounds",
        "3",
        "--secret-file",
        "secret",
        "--quantise",
        "min_max",
        "--json",
    )
    first = shell("--listen", "127.0.0.1:0", *words)
    second = shell("--master", address_of(first), *words)
    told = []
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told.append(json.loads(out))
    assert told[0].pop("me") != told[1].pop("me")
    assert told[0] == told[1]
    assert [timing["size_bytes"] for timing in told[0]["timings"]] == [1_000_000, 8]
    # A quarter of the bytes of float32.
    assert told[0]["timings"][0]["sent_bytes"] < 0.3 * 1_000_000


@pytest.mark.slow
def test_a_shell_that_is_killed_ends_the_other_one_with_a_word(shell):
    words = ("--size", "1MB", "--rounds", "10000", "--wait", "60")
    first = shell("--listen", "127.0.0.1:0", *words)
    second = shell("--master", address_of(first), *words)
    time.sleep(8)
    assert first.poll() is None
    second.kill()
    out, err = first.communicate(timeout=120)
    assert first.returncode == 2
    assert "Traceback" not in err
    assert "peer" in err
    assert not out


@pytest.mark.slow
def test_nobody_comes(shell):
    process = shell("--listen", "127.0.0.1:0", "--wait", "2", "--size", "8B")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "1 of 2 peers were there after 2 s" in err
