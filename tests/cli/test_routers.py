"""``anabranch routers``: fit, judge and ask a router on files, without the proxy."""

import os
import subprocess
import sys

import pytest

from anabranch.errors import DataError
from anabranch.routers import load_outcomes
from made_outcomes import made_outcomes, write_outcomes


def test_files_become_a_router_and_nothing_of_the_gateway_is_loaded(tmp_path):
    write_outcomes(tmp_path / "data.jsonl", made_outcomes(160))
    script = (
        "import sys; from anabranch.cli.main import main\n"
        "assert main('routers fit data.jsonl --out made --quiet --json'.split()) == 0\n"
        "assert main('routers eval data.jsonl --router made --allow-leak --quiet --json'.split()) == 0\n"
        "assert main('routers route add --router made --json'.split()) == 0\n"
        "assert main('routers replay data.jsonl --router made --allow-leak --json'.split()) in (0, 2)\n"
        "loaded = [name for name in sys.modules if name.startswith(('anabranch.gateway', 'aiohttp', 'torch'))]\n"
        "assert not loaded, loaded"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_store_of_a_gateway_is_outcomes_too(tmp_path):
    """By name: what reads it is loaded when it is needed."""
    with pytest.raises(DataError, match="no such file"):
        load_outcomes(tmp_path / "none.db")
