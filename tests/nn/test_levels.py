"""The kernels of lesser processors, whose vectors are shorter, compute what those of this one do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.errors import BackendError
from anabranch.native.compiler import find_compiler
from anabranch.native.isa import LEVELS
from anabranch.native.sources import SOURCES, flags_for

ROOT = Path(__file__).parents[2]
TESTS = (
    *("tests/nn/test_fuzz.py", "tests/nn/test_grouped.py", "tests/nn/test_packed.py", "tests/nn/test_causal.py"),
    *("tests/nn/test_superblocks.py", "tests/nn/test_low_rank.py"),
    "tests/serving/fast",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "isa", [isa for isa in LEVELS if isa.name in ("x86-64", "x86-64-v3")], ids=lambda isa: isa.name
)
def test_of_shorter_vectors(isa, tmp_path):
    if not isa.runs_here():
        pytest.skip(f"this processor has no {isa.name}")
    try:
        compiler = find_compiler()
    except BackendError as error:
        pytest.skip(str(error))
    library = tmp_path / "kernels.so"
    compiler.make_library(SOURCES, flags_for(isa), library)
    options = ["-p", "tests.other_kernels", "-p", "no:cacheprovider", "-q", "-x", "-k", "not test_compiles"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS],
        cwd=ROOT,
        env={**os.environ, "KERNELS_UNDER_TEST": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
