"""Which kernels run on which processor, and what a library is called."""

import platform
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from anabranch import native
from anabranch.native import isa, stored
from anabranch.native.isa import LEVELS, NATIVE, best_level
from anabranch.native.sources import library_name

HASWELL = "avx avx2 bmi1 bmi2 f16c fma abm movbe sse4_2 popcnt"
SKYLAKE_X = f"{HASWELL} avx512f avx512bw avx512cd avx512dq avx512vl"
ZEN_4 = f"{SKYLAKE_X} avx512_bf16 avx512_vnni avx512_vbmi"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_tile amx_bf16 amx_int8"


@pytest.mark.parametrize(
    ("names", "machine", "level"),
    [
        ("sse2", "x86_64", "x86-64"),
        ("", "x86_64", "x86-64"),
        (HASWELL, "x86_64", "x86-64-v3"),
        (HASWELL.replace("fma", ""), "x86_64", "x86-64"),
        (SKYLAKE_X, "x86_64", "x86-64-v4"),
        (ZEN_4, "x86_64", "x86-64-v4-bf16"),
        (SAPPHIRE_RAPIDS, "x86_64", "x86-64-v4-amx"),
        ("asimd", "aarch64", "armv8-a"),
    ],
)
def test_the_best_level_of_a_processor(features, names, machine, level):
    features(names, machine)
    assert best_level().name == level


def test_an_unknown_family_of_processors(features):
    features("", "riscv64")
    assert best_level() is None
    assert native.find() is None


def test_what_a_library_is_called(features, small, monkeypatch):
    features(HASWELL)
    name, portable = library_name(NATIVE), library_name(LEVELS[3])
    assert name.startswith("kernels-native-")
    assert portable.startswith("kernels-x86-64-v3-")
    monkeypatch.setenv("CXX", "/another/compiler")
    assert library_name(NATIVE) == name  # where a library lies, no compiler is asked
    features(ZEN_4)
    assert library_name(NATIVE) != name
    assert library_name(LEVELS[3]) == portable  # one for all processors of its level
    features(HASWELL)
    assert library_name(NATIVE) == name
    monkeypatch.setattr("anabranch.native.sources.FLAGS", ("-O2",))
    assert library_name(NATIVE) != name
    monkeypatch.undo()


def test_a_source_or_a_header_that_changes_makes_another_library(small):
    names = {library_name(NATIVE)}
    (small.parent / "shared.h").write_text("// one")
    names.add(library_name(NATIVE))
    (small.parent / "shared.h").write_text("// two")
    names.add(library_name(NATIVE))
    small.write_text("// other")
    names.add(library_name(NATIVE))
    assert len(names) == 4


def test_only_instructions_count_among_the_features(tmp_path, monkeypatch):
    """What a kernel of the system adds to the list (mended flaws, virtual machines) leaves libraries as they are."""
    text = "processor\t: 0\nflags\t\t: fpu avx2 fma avx512_bf16 ibrs ibpb stibp hypervisor retbleed_fix constant_tsc\n"
    monkeypatch.setattr(isa.Path, "read_text", lambda self, **_: text)
    isa.processor_features.cache_clear()
    try:
        assert isa.processor_features() == {"avx2", "fma", "avx512_bf16"}
    finally:
        isa.processor_features.cache_clear()


def test_every_feature_of_an_arm_processor_counts(monkeypatch):
    """Their names follow no pattern, and the list holds nothing but instructions."""
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp sve bf16 i8mm\nCPU part\t: 0xd4f\n"
    monkeypatch.setattr(isa.Path, "read_text", lambda self, **_: text)
    isa.processor_features.cache_clear()
    try:
        assert isa.processor_features() == {"fp", "asimd", "asimddp", "sve", "bf16", "i8mm"}
    finally:
        isa.processor_features.cache_clear()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A wheel that carries the library of one level."""

    def ship(level):
        target = tmp_path / "lib"
        target.mkdir(exist_ok=True)
        monkeypatch.setattr(stored, "SHIPPED", target)
        return native.compile_kernels(level, target, native.find_compiler())

    return ship


@pytest.mark.skipif(shutil.which("c++") is None or platform.machine() != "x86_64", reason="no compiler of x86-64")
def test_a_wheel_s_kernels_are_used_without_a_compiler(shipped, no_compiler):
    level = best_level()
    library = shipped(level)
    no_compiler()
    assert native.find() == library
    assert library.is_shipped
    assert native.load().anabranch_answer() == 42


@pytest.mark.skipif(shutil.which("c++") is None or platform.machine() != "x86_64", reason="no compiler of x86-64")
def test_what_was_built_here_goes_before_what_was_shipped(shipped):
    shipped(best_level())
    built = native.build()
    assert native.find() == built
    assert not built.is_shipped


@pytest.mark.skipif(shutil.which("c++") is None or platform.machine() != "x86_64", reason="no compiler of x86-64")
def test_shipped_kernels_that_this_system_cannot_load_are_built_here(shipped, monkeypatch):
    shipped(best_level())
    whole = stored.opened

    def old_system(library):
        if library.is_shipped:
            raise OSError("version `GLIBC_2.99' not found")
        return whole(library)

    monkeypatch.setattr("anabranch.native.loader.opened", old_system)
    assert native.load().anabranch_answer() == 42
    assert not native.find().is_shipped


def test_a_system_without_openmp_is_told_what_to_install(tmp_path, monkeypatch):
    def absent(path, mode=0):
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(stored.ctypes, "CDLL", absent)
    with pytest.raises(OSError, match=r"libgomp.*install it \(apt-get install libgomp1\)"):
        stored.opened(stored.Library(tmp_path / "x.so", "native", "c++", 1.0))


def test_the_openmp_of_torch_does_for_a_system_without(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libgomp.so.1").touch()
    monkeypatch.setattr(
        stored.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    opened = []

    def library(path, mode=0):
        opened.append(path)
        if len(opened) == 1:
            raise OSError("libgomp.so.1: cannot open shared object file")
        return path

    monkeypatch.setattr(stored.ctypes, "CDLL", library)
    assert stored.opened(stored.Library(tmp_path / "x.so", "native", "c++", 1.0)) == str(tmp_path / "x.so")
    assert opened[1] == str(tmp_path / "lib" / "libgomp.so.1")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("level", [level for level in LEVELS if level.machine == platform.machine()])
def test_every_level_s_flags_are_known_to_the_compiler(level, small, tmp_path):
    done = subprocess.run(
        ["c++", *level.flags, "-c", str(small), "-o", str(tmp_path / "x.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
