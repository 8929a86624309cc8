"""No pattern that sees text of users or models takes time quadratic in it: all of a package's are found by introspection, and tried.

They are tried in a process of its own (`pattern_probe`), whose processor time for one search is bounded: at its number of characters what
is quadratic needs seconds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")

PROBE = Path(__file__).with_name("pattern_probe.py")


@pytest.mark.slow
def test_every_pattern_is_linear():
    packages = ["anabranch.gateway", "anabranch.web", "anabranch.routers", "anabranch.test_time", "anabranch.rl"]
    done = subprocess.run(
        [sys.executable, str(PROBE), *packages], capture_output=True, text=True, timeout=580, env={**os.environ}
    )
    said, _, tried = done.stdout.strip().rpartition(" ")
    assert said == "TRIED", done.stdout + done.stderr
    assert int(tried) > 50
