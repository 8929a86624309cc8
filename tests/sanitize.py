"""Compile the kernels with the address and undefined-behaviour sanitizers, and run their tests and the fuzz with that library.

    python tests/sanitize.py [--examples 100] [--tiles] [arguments of pytest]

With --tiles the kernels multiply bfloat16 by the tiles of matrix units (AMX), whose instructions are functions here (`tiles.h`): what
such a processor computes is tested on one that has none, but has vectors of the same width (AVX-512).

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
from anabranch.native.isa import NATIVE, processor_features
from anabranch.native.sources import SOURCES

ROOT = Path(__file__).parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
FLAGS = ("-std=gnu++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fopenmp", "-fPIC", *SANITIZE, *NATIVE.flags)
RUNTIME = ("libasan.so", "libubsan.so", "libstdc++.so.6")
TESTS = (
    *("tests/nn/test_fuzz.py", "tests/nn/test_rows.py", "tests/nn/test_causal.py", "tests/nn/test_grouped.py"),
    *("tests/nn/test_packed.py", "tests/nn/test_transfers.py", "tests/nn/test_binding.py", "tests/serving/fast"),
    "tests/nn/test_low_rank.py",
    *("tests/serving/expertflow/test_token_scheduler.py", "tests/serving/expertflow/test_expertflow_tiers.py"),
    "tests/serving/expertflow/test_expertflow_predictors.py",  # the compiled step of the route predictor
)

# A kernel that is told of one row more than there is: past the binding, which would not let it in.
FAULT = """
import ctypes, os
library, row = ctypes.CDLL(os.environ["KERNELS_UNDER_TEST"]), ctypes.CDLL(None).malloc
row.restype = ctypes.c_void_p
x, y, size = row(256), row(512), ctypes.c_int64
library.anabranch_norm_forward(0, *map(ctypes.c_void_p, (x, x, y, 0)), size(2), size(64), ctypes.c_float(1e-5), 1)
"""

IN_SOFTWARE = "-DANABRANCH_TILES_IN_SOFTWARE"
MULTIPLYING = (
    *("tests/nn/test_fuzz.py", "tests/nn/test_grouped.py", "tests/nn/test_packed.py", "tests/nn/test_causal.py"),
    "tests/serving/fast",
)
# Experts (where the processor multiplies pairs of bfloat16 at all) and packed matrices use tiles.
TILES = """
import ctypes, torch
from tests.other_kernels import library
from anabranch.native.isa import processor_features
from anabranch.nn.kernels import packed
from anabranch.nn.grouped import dense_mlp
from anabranch.nn.packed import Packed
products = ctypes.c_int64.in_dll(library, "anabranch_software_products")
packed.linear(Packed.pack(torch.randn(32, 64), "bfloat16"), torch.randn(3, 64))
assert products.value, "no packed product was one of tiles"
before, x = products.value, torch.randn(40, 32, dtype=torch.bfloat16)
dense_mlp(x, torch.randn(64, 32).bfloat16(), torch.randn(32, 32).bfloat16())
assert products.value > before or "avx512_bf16" not in processor_features(), "no product of experts was one of tiles"
"""


def main() -> int:
    """The exit code of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="of each fuzz")
    parser.add_argument("--tiles", action="store_true", help="with tiles of matrix units, in software")
    options, rest = parser.parse_known_args()
    command = shutil.which("g++")
    if command is None or not sys.platform.startswith("linux"):
        print("skipped: the sanitizers are those of g++ on Linux, which is not here")
        return 0
    if options.tiles and "avx512f" not in processor_features():
        print("skipped: tiles are of 16 numbers, as vectors of AVX-512 are, which this processor has not")
        return 0
    runtime = [_file_of(command, name) for name in RUNTIME]
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        library = Path(folder) / "kernels.so"
        print("compiling the kernels with sanitizers", flush=True)
        Compiler((command,), "").make_library(SOURCES, (*FLAGS, *[IN_SOFTWARE] * options.tiles), library)
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "KERNELS_UNDER_TEST": str(library),
            "FUZZ_EXAMPLES": str(options.examples),
        }
        fault = subprocess.run(
            [sys.executable, "-c", FAULT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if "heap-buffer-overflow" not in fault.stderr:
            print(f"a row too many went unseen, so nothing would be seen: {fault.stdout}{fault.stderr[-2000:]}")
            return 1
        if options.tiles:
            subprocess.run([sys.executable, "-c", TILES], cwd=ROOT, env=environment, check=True)
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.other_kernels",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(rest or (*(MULTIPLYING if options.tiles else TESTS), "-k", "not test_compiles")),
        ]
        return subprocess.run(pytest, cwd=ROOT, env=environment, check=False).returncode


def _file_of(compiler: str, name: str) -> str:
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(said.stdout.strip()).resolve())


if __name__ == "__main__":
    sys.exit(main())
