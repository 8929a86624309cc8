"""`program_bytes`: what is measured is counted for all processes, rounded up, and kept for the same code and tokenizer."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from anabranch.data import ByteTokenizer
from anabranch.errors import BackendError
from anabranch.lm import Decoder, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.serving.memory import program
from anabranch.serving.memory.program import peak_bytes, program_bytes

MIB = 1 << 20


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """How often was measured; the numbers that come out are in ``told``."""
    said = SimpleNamespace(times=0, told=b"a warning\n%d %d %d\n" % (300 * MIB, 310 * MIB, 90 * MIB))

    def run(command, **options):
        said.times += 1
        return SimpleNamespace(stdout=said.told)

    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    return said


def test_all_processes_and_a_margin_are_counted_in_steps(measured):
    # 300 + 310 + 90 + 16 and 310 + 16, to whole 16.
    assert program_bytes("none", processes=2) == 720 * MIB
    assert program_bytes("none", processes=1) == 336 * MIB
    assert measured.times == 1


def test_a_plan_is_the_same_from_run_to_run_until_what_it_depends_on_changes(measured, tmp_path, monkeypatch):
    config = Decoder.Config(
        vocab_size=257,
        dim=16,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=1),
        feed_forward=SwiGLU.Config(hidden_dim=16),
    )
    save_model(tmp_path / "m", config.build(seed=0), ByteTokenizer())
    first = program_bytes(str(tmp_path / "m"), processes=2)
    measured.told = b"%d %d %d" % (304 * MIB, 330 * MIB, 90 * MIB)
    assert program_bytes(str(tmp_path / "m"), processes=2) == first
    assert measured.times == 1
    os.utime(tmp_path / "m" / "tokenizer.json", ns=(1, 1))
    assert program_bytes(str(tmp_path / "m"), processes=2) == first + 32 * MIB
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    program_bytes(str(tmp_path / "m"), processes=2)
    assert measured.times == 3


@pytest.mark.parametrize("text", ["", "[1, 2]", '[1, 2, "3"]', "[1, 2, -3]", "{}", "[1, 2, true]"])
def test_what_is_damaged_is_measured_again(measured, text):
    program_bytes("none", processes=2)
    [kept] = Path(os.environ["ANABRANCH_CACHE"], "program").iterdir()
    kept.write_text(text)
    assert program_bytes("none", processes=2) == 720 * MIB
    assert measured.times == 2


def test_without_a_folder_for_it_a_plan_is_made_too(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "file"))
    assert program_bytes("none", processes=2) == 720 * MIB


def test_what_cannot_be_measured_is_said(measured):
    measured.told = b"no numbers"
    with pytest.raises(BackendError, match="the memory of the program cannot be measured"):
        program_bytes("none", processes=2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure by")
def test_helpers_are_those_of_a_whole_sandbox(monkeypatch):
    monkeypatch.setattr("anabranch.sandbox._WORKERS", 3)
    # Of two kinds three each, and each a Python.
    assert 6 * 5 * MIB < program.helper_bytes() < 6 * 64 * MIB
    assert peak_bytes() == peak_bytes(os.getpid()) > 50 * MIB
    assert peak_bytes(1 << 30) is None


LOADED = """
import json, sys
from importlib.metadata import packages_distributions
from anabranch.serving.memory import program

program.load_code()
known = packages_distributions()
print(json.dumps(sorted({name for module in list(sys.modules) if "." not in module for name in known.get(module, ())})))
"""


@pytest.mark.slow
def test_what_is_kept_is_of_the_packages_that_are_loaded():
    """Those of the program that anabranch itself asks for; helpers load one each, and a GGUF file one."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = {name.lower().replace("_", "-") for name in json.loads(done.stdout)}
    asked = {re.match(r"[\w-]+", line)[0].lower() for line in requires("anabranch")}
    assert set(program.PACKAGES) == (loaded & asked) | {"jinja2", "llguidance", "gguf"}


@pytest.mark.parametrize("package", ["aiohttp", "uvloop", "torch", "llguidance"])
def test_another_version_of_a_package_is_measured_again(measured, monkeypatch, package):
    program_bytes("none", processes=2)
    monkeypatch.setattr(program, "version", lambda name: "another" if name == package else version(name))
    program_bytes("none", processes=2)
    assert measured.times == 2
