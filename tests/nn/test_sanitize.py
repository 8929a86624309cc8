"""The kernels under sanitizers, as ``make sanitize`` runs them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "sanitize.py"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose sanitizers these are")
@pytest.mark.parametrize("tiles", [False, True], ids=["vectors", "tiles"])
def test_the_kernels_read_and_write_what_is_theirs(tiles):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--examples", "20", *["--tiles"] * tiles],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "skipped:" not in done.stdout
