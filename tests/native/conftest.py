"""A library of one small function, compilers that are scripts, and a cache of their own."""

import shutil
import stat

import pytest

from anabranch.native import builder, isa, sources

SMALL = 'extern "C" int anabranch_answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """The kernels are one small function, and the cache is empty. Returns the source file."""
    here = tmp_path / "sources"
    here.mkdir()
    (here / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(sources, "HERE", here)
    for module in (sources, builder):
        monkeypatch.setattr(module, "SOURCES", (here / "small.cpp",))
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANABRANCH_NO_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return here / "small.cpp"


@pytest.fixture
def features(monkeypatch):
    """Give the processor other features."""

    def give(names, machine="x86_64"):
        found = frozenset(names.split())
        for module in (isa, sources):
            monkeypatch.setattr(module, "processor_features", lambda: found)
            monkeypatch.setattr(module.platform, "machine", lambda: machine)

    return give


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Make a script the compiler: it writes down its calls, then does ``then``. Returns the file of calls."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    calls = tmp_path / "calls"

    def make(then='exec c++ "$@"', version="small 1.0"):
        script = tmp_path / "compiler"
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit; fi\necho "$@" >> {calls}\n{then}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
        return calls

    return make


@pytest.fixture
def no_compiler(monkeypatch):
    """Take the compiler away, as in a slim container."""

    def take():
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")

    return take
