"""The checked build: kernels stay within their arrays, by pages that may not be touched, by comparing before, and by numba's own checks."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anabranch.graph.guarded import VARIABLE, guarded, held

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
# What kernels move within arrays of their own, rows that are summed, and marks; the last goes past an end.
REST = """
import numpy as np
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.raw import address, kernel, set_u8
from anabranch.graph.hnsw.search import clear, insert
from anabranch.graph.products import BLOCK, Operator, multiply_block

@kernel
def put(size, room):
    distances, slots = np.empty(32, np.float32), np.empty(32, np.int32)
    clear(distances, 0)
    return insert(distances, slots, size, room, np.float32(1), 5)

def summed(node):
    matrix = Operator(np.array([0, 1, 2]), np.array([1, node], np.int32), np.ones(0, np.float32), np.ones(2, np.float32))
    multiply_block(matrix, np.ones((2, BLOCK), np.float32), np.zeros((2, BLOCK), np.float32))

@kernel
def mark(marks, slot):
    set_u8(address(marks), slot, 1)

def is_fine(work, *arguments):
    try:
        work(*arguments)
    except IndexError:
        return False
    return True

print([is_fine(put, *of) for of in ((3, 10), (16, 32), (33, 40), (5, 33), (0, 0))])
print([is_fine(summed, node) for node in (0, 1, 2, -1)])
marks = HNSW(2)._storage.take_marks()
mark(marks, len(marks) - 1)
print("marked", flush=True)
mark(marks, len(marks))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where kernels with checks are kept, for all tests here."""
    return tmp_path_factory.mktemp("kernels")


def run(command, cache, timeout=280):
    """In a process whose kernels are compiled with checks."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **CHECKED, "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=timeout)


@pytest.mark.parametrize("shape", [(3, 64), (5,), (0, 16), (1024, 16)])
def test_an_array_is_as_any_other(shape):
    made = guarded(shape, np.float32)
    made[...] = 7
    assert made.shape == shape
    assert (made == 7).all()


@pytest.mark.parametrize(("place", "is_within"), [(0, True), (15, True), (16, False), (-1, False)])
def test_who_goes_past_an_end_is_stopped(tmp_path, cache, place, is_within):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run([str(tmp_path / "script.py"), str(place)], cache)
    assert (done.returncode == 0) is is_within, done.stderr
    if not is_within:
        assert done.returncode == -signal.SIGSEGV


def test_what_is_moved_and_summed_by_address_is_compared_before(tmp_path, cache):
    (tmp_path / "script.py").write_text(REST)
    done = run([str(tmp_path / "script.py")], cache)
    assert done.stdout.splitlines() == ["[True, True, False, False, False]", "[True, True, False, False]", "marked"], (
        done.stderr
    )
    assert done.returncode == -signal.SIGSEGV


def test_nothing_is_copied_without_being_asked():
    array = np.arange(3)
    assert held(array) is array


# Each in a process of its own.
SUITES = [
    ["hnsw"],
    ["hnsw_changes", "hnsw_slots"],
    ["hnsw_bits", "hnsw_ranges"],
    ["codes", "hnsw_coded"],
    ["hnsw_extremes", "hnsw_lock", "hnsw_single", "interrupts"],
    ["hnsw_groups", "hnsw_mending"],
    ["hnsw_strays", "hnsw_suspects", "hnsw_watch"],
    ["hnsw_equals", "hnsw_close", "hnsw_centres"],
    ["hnsw_beside", "hnsw_turns", "hnsw_sharded"],
    ["hnswlib_compat", "adapter_langchain", "adapter_llama_index"],
    ["live", "live_folder", "live_log", "live_names", "live_naming"],
    ["disk", "disk_making"],
    ["disk_answering", "disk_shards", "disk_source", "disk_stored", "disk_writing"],
    ["powerwalk"],
    ["ppr", "ppr_blocks", "networkx_backend"],
    ["store", "alias", "array_file", "coerce", "delta", "random", "sparse", "typed", "generate"],
    [
        "formats",
        "formats_parquet",
        "bad_input",
        "datasets",
        "file_fuzz",
        "header",
        "masks",
        "table_columns",
        "table_numbered",
    ],
    ["fastrp", "products", "projection", "evaluate", "estimator"],
    ["fully_ppr", "fully_ppr_devices", "fully_ppr_estimates", "fully_ppr_rounds", "spark_workers"],
    ["graphvite", "graphvite_augmentation", "graphvite_blocks", "graphvite_train"],
    ["rank", "rank_estimator", "rank_network", "workers"],
    ["one_door", "one_fit"],
]

# Why the other files of tests here are not among them.
LEFT_OUT = {
    "they start servers, which answer by kernels that the suites above run": [
        "serve",
        "serve_connections",
        "serve_gate",
        "serve_text",
        "serve_writes",
    ],
    "they need Java, and what Spark's workers compute is in spark_workers": [
        "fully_ppr_spark",
        "spark_cluster",
        "spark_edges",
    ],
    "what they test has no kernel: arguments, texts, messages, files beside files, processes that fork": [
        "adapter_documents",
        "arguments",
        "beside",
        "call_arguments",
        "forking",
        "function_arguments",
        "package",
        "rank_transport",
        "rank_window",
    ],
    "it is this one": ["guarded"],
}


def test_every_file_of_tests_is_looked_at_or_it_is_said_why_not():
    there = [path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")]
    assert sorted(itertools.chain(*SUITES, *LEFT_OUT.values())) == sorted(there)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", SUITES, ids="+".join)
def test_the_tests_pass_with_all_bounds_looked_at(cache, names):
    files = [str(HERE / f"test_{name}.py") for name in names]
    # Kernels are compiled as the tests first call them: on a busy machine that alone may take the time of a test.
    done = run(["-m", "pytest", "-q", "-x", "--timeout=1700", "-p", "no:cacheprovider", *files], cache, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
