"""Compile the kernels with the address and undefined-behaviour sanitizers, and run their tests and the fuzz with that library.

    python tests/sanitize.py [--examples 100] [arguments of pytest]

Python itself is not sanitized, so the runtime is loaded before it, and its leaks are not counted. Ends with the tests' exit code; a fault
ends the tests' process, and the sanitizer's report says where it was.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from anabranch.native.compiler import Compiler
from anabranch.native.isa import NATIVE
from anabranch.native.sources import SOURCES

ROOT = Path(__file__).parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
FLAGS = ("-std=gnu++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fopenmp", "-fPIC", *SANITIZE, *NATIVE.flags)
RUNTIME = ("libasan.so", "libubsan.so", "libstdc++.so.6")
TESTS = (
    *("tests/nn/test_fuzz.py", "tests/nn/test_rows.py", "tests/nn/test_causal.py", "tests/nn/test_grouped.py"),
    *("tests/nn/test_packed.py", "tests/nn/test_transfers.py", "tests/nn/test_door.py", "tests/serving/fast"),
    *("tests/serving/expertflow/test_token_scheduler.py", "tests/serving/expertflow/test_expertflow_tiers.py"),
    "tests/serving/expertflow/test_expertflow_predictors.py",  # the compiled step of the route predictor
)

# A kernel that is told of one row more than there is: past the door, which would not let it in.
FAULT = """
import ctypes, os
library, row = ctypes.CDLL(os.environ["SANITIZED_KERNELS"]), ctypes.CDLL(None).malloc
row.restype = ctypes.c_void_p
x, y, size = row(256), row(512), ctypes.c_int64
library.anabranch_norm_forward(0, *map(ctypes.c_void_p, (x, x, y, 0)), size(2), size(64), ctypes.c_float(1e-5), 1)
"""


def main() -> int:
    """The exit code of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="of each fuzz")
    options, rest = parser.parse_known_args()
    command = shutil.which("g++")
    if command is None or not sys.platform.startswith("linux"):
        print("skipped: the sanitizers are those of g++ on Linux, which is not here")
        return 0
    runtime = [_file_of(command, name) for name in RUNTIME]
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        library = Path(folder) / "kernels.so"
        print("compiling the kernels with sanitizers", flush=True)
        Compiler((command,), "").make_library(SOURCES, FLAGS, library)
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "SANITIZED_KERNELS": str(library),
            "FUZZ_EXAMPLES": str(options.examples),
        }
        fault = subprocess.run(
            [sys.executable, "-c", FAULT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if "heap-buffer-overflow" not in fault.stderr:
            print(f"a row too many went unseen, so nothing would be seen: {fault.stdout}{fault.stderr[-2000:]}")
            return 1
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.sanitized",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(rest or (*TESTS, "-k", "not test_compiles")),
        ]
        return subprocess.run(pytest, cwd=ROOT, env=environment, check=False).returncode


def _file_of(compiler: str, name: str) -> str:
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(said.stdout.strip()).resolve())


if __name__ == "__main__":
    sys.exit(main())
