"""No file ends the process: bits flipped in every array of every format, headers changed by type; opened mapped and not, then worked on."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.graph import HNSW, FullyPPR, Graph, PowerWalk
from anabranch.graph.array_file import _header
from anabranch.graph.hnsw import ShardedHNSW
from graph_file_fuzz import GRAPH, USES, made
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


LOADS = {
    "graph": Graph.load,
    "walks": partial(PowerWalk.load, graph=GRAPH),
    "result": FullyPPR.load,
    "hnsw-f32": HNSW.load,
    "hnsw-i8": HNSW.load,
    "shards": ShardedHNSW.load,
}


@pytest.mark.parametrize("kind", LOADS)
def test_a_mapped_file_that_is_verified_gives_no_other_answer(kind, tmp_path):
    """Whatever bit of whatever array has turned."""
    good, bad = tmp_path / "good.anb", tmp_path / "bad.anb"
    made(kind, good)
    LOADS[kind](good, mmap=True, verify=True)
    header, start = _header(good)
    rng, whole = np.random.default_rng(3), good.read_bytes()
    for entry in header["arrays"]:
        size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
        for _ in range(min(size, 3)):
            data = bytearray(whole)
            data[start + entry["offset"] + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
            bad.write_bytes(data)
            with pytest.raises(DataError, match="damaged"):
                LOADS[kind](bad, mmap=True, verify=True)


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
