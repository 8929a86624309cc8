"""Kernels of the index stay within its arrays: pages behind them may not be touched; and the others within theirs, by numba's checks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anabranch.graph.hnsw.guarded import VARIABLE, guarded

HERE = Path(__file__).parent
CHECKED = {VARIABLE: "1", "NUMBA_BOUNDSCHECK": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

SCRIPT = """
import sys
import numpy as np
from anabranch.graph.hnsw.raw import get_i32, kernel
from anabranch.graph.hnsw.storage import aligned

@kernel
def read(address, place):
    return get_i32(address, place)

place = int(sys.argv[1])
# To see its beginning: a whole page, so that both of its ends are at a guard.
array = aligned((1024 if place < 0 else 16,), np.int32)
array[:] = 5
assert read(array.ctypes.data, place) == 5
"""
SUITES = [
    "hnsw",
    "hnsw_changes",
    "hnsw_extremes",
    "hnswlib_compat",
    "interrupts hnsw_lock",
    "powerwalk",
    "ppr",
    "store",
]


def run(command, tmp_path, timeout=280):
    """In a process whose kernels are compiled with checks, into a cache of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **CHECKED, "NUMBA_CACHE_DIR": str(tmp_path)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=timeout)


@pytest.mark.parametrize("shape", [(3, 64), (5,), (0, 16), (1024, 16)])
def test_an_array_is_as_any_other(shape):
    made = guarded(shape, np.float32)
    made[...] = 7
    assert made.shape == shape
    assert (made == 7).all()


@pytest.mark.parametrize(("place", "is_within"), [(0, True), (15, True), (16, False), (-1, False)])
def test_who_goes_past_an_end_is_stopped(tmp_path, place, is_within):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run([str(tmp_path / "script.py"), str(place)], tmp_path)
    assert (done.returncode == 0) is is_within, done.stderr
    if not is_within:
        assert done.returncode == -signal.SIGSEGV


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    ["hnsw", "hnsw_changes", "hnsw_extremes", "hnswlib_compat", "interrupts hnsw_lock", "powerwalk", "ppr", "store"],
)
def test_the_tests_pass_with_all_bounds_looked_at(tmp_path, names):
    files = [str(HERE / f"test_{name}.py") for name in names.split()]
    done = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
