"""No file ends the process: bits flipped in every array of every format, headers changed by type; opened mapped and not, then worked on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graph_file_fuzz import USES
from graph_header_fuzz import ALL

TESTS = Path(__file__).parent.parent


def fuzz(kinds, cases, seed, script="graph_file_fuzz.py"):
    """What a script told of each kind, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, TESTS / script, ",".join(kinds), str(cases), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["format"] for one in told] == list(kinds)
    for one in told:
        assert one["refused"] + one["used"] == cases
    return told


def flip(kinds, flips, seed):
    for one in fuzz(kinds, flips, seed):
        # Checksums are right in half of the files, and rows out of range are seen all the same.
        assert one["refused"] > flips / 8, one


def test_a_few_flips():
    flip(USES, 16, 1)


def test_a_few_headers():
    fuzz(["hnsw-f32", "shards", "rows", "names", "peer", "grank", "fastrp", "brute"], 8, 1, "graph_header_fuzz.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_a_thousand_headers(kind):
    for one in fuzz([kind], 1000, 2, "graph_header_fuzz.py"):
        assert one["refused"] > 500


@pytest.mark.slow
@pytest.mark.parametrize("kind", USES)
def test_two_thousand_flips(kind):
    flip([kind], 2000, 2)
