"""No file ends the process: bits flipped in every array of every format, opened mapped and not, then worked on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graph_file_fuzz import USES

SCRIPT = Path(__file__).parent.parent / "graph_file_fuzz.py"


def fuzz(kinds, flips, seed):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, SCRIPT, ",".join(kinds), str(flips), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["format"] for one in told] == list(kinds)
    for one in told:
        assert one["refused"] + one["used"] == flips
        # Checksums are right in half of the files, and rows out of range are seen all the same.
        assert one["refused"] > flips / 8, one


def test_a_few_flips():
    fuzz(USES, 16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", USES)
def test_two_thousand_flips(kind):
    fuzz([kind], 2000, 2)
