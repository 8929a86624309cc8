"""``anabranch doctor``: every fact is of this machine, nothing heavy is needed, and what cannot be built says why."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from anabranch import native
from anabranch.cli import doctor
from anabranch.extras import INTERNAL, Package, extras
from anabranch.native import builder, sources

# As on a base install: whatever an extra brings cannot be imported.
BASE_ONLY = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {gone}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from anabranch.cli.main import main
sys.exit(main({arguments}))
"""
GONE = ("torch", "safetensors", "tokenizers", "matplotlib", "scipy", "numba", "aiohttp", "jinja2", "gguf", "yaml")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The kernels are one small function, and the cache is empty."""
    (tmp_path / "small.cpp").write_text('extern "C" int anabranch_answer() { return 42; }\n')
    monkeypatch.setattr(sources, "HERE", tmp_path)
    for module in (sources, builder):
        monkeypatch.setattr(module, "SOURCES", (tmp_path / "small.cpp",))
    monkeypatch.delenv("CXX", raising=False)

    def cached():
        monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("ANABRANCH_NO_KERNELS", raising=False)

    return cached


def test_on_a_base_install(environment, work):
    script = BASE_ONLY.format(gone=GONE, arguments=["doctor", "--json"])
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {
        "version",
        "python",
        "isa",
        "compiler",
        "kernels",
        "threads",
        "memory",
        "cgroup",
        "extras",
        "gpu",
        "sandbox",
    } <= set(found)
    assert bool(found["sandbox"]["command"]) != bool(found["sandbox"]["reason"])
    assert found["isa"]["machine"] == platform.machine()
    assert found["kernels"]["reason"] == "ANABRANCH_NO_KERNELS is set"
    assert found["threads"]["usable"] <= found["threads"]["processors"] == os.cpu_count()
    assert 0 < found["memory"]["available_bytes"] < found["memory"]["total_bytes"]
    assert found["extras"]["graph"]["missing"] == ["numba", "scipy"]
    assert not found["extras"]["graph"]["installed"]
    assert found["gpu"]["torch"] is None


def test_what_is_installed_counts_as_installed(here):
    found = json.loads(here("doctor", "--json")[1])
    assert found["extras"]["graph"] == {"installed": True, "missing": [], "outdated": []}
    assert found["gpu"]["torch"]["version"] is not None


def test_text(here):
    code, out, err = here("doctor")
    assert (code, err) == (0, "")
    labels = [line.partition(" ")[0] for line in out.partition("\n\n")[0].splitlines()]
    expected = (
        "anabranch processor instructions compiler kernels threads memory torch packages GPU sandbox cache".split()
    )
    assert [label for label in labels if label] == expected
    assert "kernels       none: ANABRANCH_NO_KERNELS is set" in out or "not used: ANABRANCH_NO_KERNELS" in out


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_build(here, small):
    small()
    before = json.loads(here("doctor", "--json")[1])
    assert not before["kernels"]["ready"]
    assert before["kernels"]["will_build"]
    assert before["isa"]["used"] is None
    code, out, _ = here("doctor", "--build", "--json")
    after = json.loads(out)
    assert code == 0
    assert after["kernels"]["ready"]
    assert after["kernels"]["path"] == str(native.find().path)
    assert after["isa"]["used"] == "native"
    assert "kernels       ready; native, compiled here in" in here("doctor")[1]


def test_build_without_a_compiler(here, small, monkeypatch):
    small()
    monkeypatch.setenv("PATH", "/nowhere")
    message = "no C++ compiler found; install g++ or set CXX"
    code, out, err = here("doctor", "--build")
    assert (code, out, err) == (2, "", f"error: {message}\n")
    assert f"kernels       none: {message}" in here("doctor")[1]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_build_that_the_compiler_refuses(here, small, tmp_path):
    small()
    (tmp_path / "small.cpp").write_text("this is no C++\n")
    code, _, err = here("doctor", "--build")
    assert code == 2
    assert "could not compile the kernels: " in err
    assert "small.cpp:1:1: error: " in err
    assert "small.cpp:1:1: error: " in json.loads(here("doctor", "--json")[1])["kernels"]["reason"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_build_tries_a_compiler_again_that_failed_before(here, small, tmp_path, monkeypatch):
    small()
    script = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(script))
    for then, expected in (("exit 1", 2), ('exec c++ "$@"', 0)):
        script.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "one version"; exit; fi\n{then}\n')
        script.chmod(0o755)
        assert here("doctor", "--build")[0] == expected
    assert native.status().is_ready


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_built_kernels_that_cannot_be_loaded(here, small, monkeypatch):
    small()

    def refuse(library):
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr("anabranch.native.builder.opened", refuse)
    code, _, err = here("doctor", "--build")
    assert code == 2
    assert "made kernels that cannot be loaded: libgomp.so.1" in err
    assert native.find() is None


def fake_smi(tmp_path, monkeypatch, said):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def torch_that(**facts):
    return lambda: (
        {"version": "2.0", "cuda": None, "cuda_available": False, "devices": [], "reason": "made for CPUs only"} | facts
    )


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (lambda: None, "torch is not installed; pip install 'anabranch[lm]'"),
        (torch_that(), "made for CPUs only"),
        (torch_that(cuda_available=True, cuda="12.8"), ""),
    ],
)
def test_a_gpu_and_whether_torch_can_use_it(tmp_path, monkeypatch, torch, reason):
    fake_smi(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 81559, 570.86.15")
    monkeypatch.setattr(doctor, "_torch", torch)
    found = doctor._gpu()
    assert found["devices"] == [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 << 20, "driver": "570.86.15"}]
    assert found["reason"] == reason
    said = doctor._say_gpu(found)
    assert said.startswith("NVIDIA H100 80GB HBM3 (85.5 GB)")
    assert said.endswith(f"; not used: {reason}" if reason else ")")


def test_a_driver_that_answers_nonsense(tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, "No devices were found")
    monkeypatch.setattr(doctor, "_torch", lambda: None)
    assert doctor._gpu() == {"usable": False, "devices": [], "torch": None, "reason": "no NVIDIA GPU found"}


def test_a_torch_that_is_broken(monkeypatch):
    monkeypatch.setattr("anabranch.extras.is_installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    assert "torch cannot be imported" in doctor._torch()["reason"]


BROKEN = {
    "raise ImportError('libtorch_cpu.so: undefined symbol: abc')": "libtorch_cpu.so: undefined symbol: abc",
    "raise OSError('libcudart.so.12: cannot open shared object file')": "libcudart.so.12: cannot open shared object file",
    "import a_part_that_is_not_there": "No module named 'a_part_that_is_not_there'",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_torch_that_is_there_and_cannot_be_imported_is_told_by_every_command(cli, environment, tmp_path, code):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(code)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    broken = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
    done = cli("info", env=broken)
    assert (done.returncode, done.stdout) == (2, "")
    start = f"error: torch is installed, but cannot be imported: {BROKEN[code]}; install torch again, anabranch doctor shows"
    assert done.stderr.startswith(start)
    if code.startswith("raise OSError"):
        assert f"torch         cannot be imported: {BROKEN[code]}\n" in cli("doctor", env=broken).stdout


def test_versions_are_told_and_those_that_are_too_old(here, monkeypatch):
    versions = {"torch": "2.4.1+cu121", "numpy": "1.26", "pandas": "3.0.0"}

    def version(name):
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name, "999")

    monkeypatch.setattr(metadata, "version", version)
    found = json.loads(here("doctor", "--json")[1])
    assert found["packages"]["torch"] == {"version": "2.4.1+cu121", "needs": ">=2.10", "fits": False}
    assert found["packages"]["numpy"] == {"version": "1.26", "needs": ">=1.26", "fits": True}
    assert found["packages"]["gguf"]["version"] is None
    assert not found["packages"]["pandas"]["fits"]  # >=2.2,<3
    assert found["extras"]["lm"]["outdated"] == ["torch 2.4.1+cu121, needs >=2.10"]
    assert not found["extras"]["serve"]["installed"]
    page = here("doctor")[1]
    assert re.search(
        r"^lm +has torch 2.4.1\+cu121, needs >=2.10 +pip install -U 'anabranch\[lm\]'$", page, re.MULTILINE
    )
    assert "packages      numpy 1.26, torch 2.4.1+cu121, safetensors 999" in page


@pytest.mark.parametrize(
    ("version", "needs", "fits"),
    [
        ("2.10.0", ">=2.10", True),
        ("2.9.9", ">=2.10", False),
        ("2.10", ">=2.10.0", True),
        ("2.10.0+cu128", ">=2.10", True),
        ("2.11.0a0+git1", ">=2.10", True),
        ("10", ">=9.1", True),
        ("3", ">=2.2,<3", False),
        ("2.3.0", ">=2.2, <3", True),
        ("1", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(monkeypatch, version, needs, fits):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert Package("x", needs).fits == fits


def test_limits_are_told():
    threads = {"usable": 2, "processors": 64, "allowed": 8, "OMP_NUM_THREADS": "1"}
    cgroup = {"version": 2, "cores": 1.5, "memory_bytes": 2 * 10**9}
    assert doctor._say_threads(threads, cgroup) == (
        "2 usable of 64 processors; affinity allows 8; cgroup v2 allows 1.5; OMP_NUM_THREADS=1"
    )
    memory = {"total_bytes": 64 * 10**9, "available_bytes": 10**9}
    assert doctor._say_memory(memory, cgroup) == "64 GB; cgroup v2 allows 2 GB; 1 GB free"


def can_be_found(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # What it is a part of is not there.
        return False


def test_every_extra_is_judged_as_imports_are(here):
    found = json.loads(here("doctor", "--json")[1])["extras"]
    assert found.keys() == extras().keys() - set(INTERNAL)
    for name, extra in found.items():
        assert extra["missing"] == [module for module in extras()[name].modules if not can_be_found(module)], name
