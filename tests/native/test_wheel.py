"""The build hook: a wheel carries one library for each level, and only where that was asked for."""

import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from anabranch import native
from anabranch.native import stored

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hook(monkeypatch):
    """The hook as hatchling makes it; hatchling itself is only there while a package is built."""
    for place, name in (("builders.hooks", "BuildHookInterface"), ("metadata", "MetadataHookInterface")):
        interface = ModuleType(f"hatchling.{place}.plugin.interface")
        setattr(interface, name, type(name, (), {}))
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Kernels()
    made.root, made.app = str(ROOT), SimpleNamespace(display_info=lambda text: None)
    return made


def build(hook, version="standard"):
    data = {"force_include": {}, "pure_python": True}
    hook.initialize(version, data)
    return data


@pytest.mark.parametrize(
    ("switch", "version"), [(None, "standard"), ("0", "standard"), ("", "standard"), ("1", "editable")]
)
def test_a_plain_wheel_and_an_editable_install_stay_pure_python(hook, monkeypatch, switch, version):
    monkeypatch.delenv("ANABRANCH_BUILD_KERNELS", raising=False)
    if switch is not None:
        monkeypatch.setenv("ANABRANCH_BUILD_KERNELS", switch)
    assert build(hook, version) == {"force_include": {}, "pure_python": True}


@pytest.mark.skipif(shutil.which("c++") is None or platform.machine() != "x86_64", reason="no compiler of x86-64")
def test_a_wheel_with_kernels(hook, monkeypatch, tmp_path, no_compiler):
    monkeypatch.setenv("ANABRANCH_BUILD_KERNELS", "1")
    data = build(hook)
    assert not data["pure_python"]
    assert data["tag"] == f"py3-none-{sys.platform}_x86_64"
    names = {Path(name) for name in data["force_include"].values()}
    assert len(names) == 2 * len([level for level in native.LEVELS if level.machine == "x86_64"])
    assert {name.parent for name in names} == {stored.SHIPPED.relative_to(ROOT / "src")}
    for source, name in data["force_include"].items():  # what hatchling does with them
        (tmp_path / Path(name).parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / name)
    hook.finalize("standard", data, "")
    assert not any(Path(source).exists() for source in data["force_include"])
    monkeypatch.setattr(stored, "SHIPPED", tmp_path / "anabranch" / "native" / "lib")
    no_compiler()
    assert native.find().isa == native.best_level().name
    assert native.load().anabranch_answer() == 42


def test_a_family_of_processors_without_levels_fails_the_build(hook, features, monkeypatch, compiler):
    compiler()
    features("", "riscv64")
    monkeypatch.setenv("ANABRANCH_BUILD_KERNELS", "1")
    with pytest.raises(RuntimeError, match="no kernels are known for riscv64; build the wheel without it"):
        build(hook)
