"""A library is built once, whole, by any number of processes, and found again without a compiler."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch import native
from anabranch.errors import AnabranchError, BackendError, CapacityError, DataError
from anabranch.locks import locked
from anabranch.native import builder, stored
from anabranch.native import compiler as compilers
from anabranch.native.isa import NATIVE
from anabranch.native.sources import library_name


def compiled(calls):
    """How often the compiler was given a source."""
    return sum(" -c " in f" {line} " for line in calls.read_text().splitlines()) if calls.exists() else 0


def folder(tmp_path):
    return tmp_path / "cache" / "kernels"


def test_what_is_built_is_found_where_there_is_no_compiler(compiler, no_compiler, tmp_path):
    compiler()
    built = native.build()
    no_compiler()
    assert native.find() == built
    assert native.load().anabranch_answer() == 42
    assert native.status() == native.Status(built)
    assert built.compiler.endswith("(small 1.0)")
    assert sorted(path.name for path in folder(tmp_path).iterdir()) == [
        built.path.with_suffix(".json").name,
        built.path.name,
    ]


def test_a_cache_that_can_only_be_read_gives_its_library(compiler, no_compiler, monkeypatch):
    compiler()
    built = native.build()
    no_compiler()
    monkeypatch.setattr("anabranch.native.stored.cache_folder", lambda: (_ for _ in ()).throw(DataError("nowhere")))
    assert native.find() == built


def test_one_line_says_that_kernels_are_compiled(compiler, caplog, tmp_path):
    compiler()
    with caplog.at_level(logging.WARNING):
        native.load()
        native.load()
    (line,) = caplog.messages
    assert line.startswith("compiling the CPU kernels, once for this machine")
    assert line.endswith(str(folder(tmp_path)))


DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again(compiler, damage):
    calls = compiler()
    path = native.build().path
    whole = path.read_bytes()
    # Another file of its name: this process has the whole one loaded, and would end with SIGBUS if that were cut off under it.
    path.unlink()
    path.write_bytes(DAMAGES[damage](whole))
    assert native.find() is None
    assert native.load().anabranch_answer() == 42
    assert compiled(calls) == 2
    assert native.find().path == path


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"sha256": 5}', "\x00", pytest.param("[" * 200_000, id="deep")])
def test_a_damaged_record_is_written_again(compiler, record):
    compiler()
    path = native.build().path
    path.with_suffix(".json").write_text(record)
    assert native.find() is None
    assert native.build() == native.find()
    path.with_suffix(".failed.json").write_text(record)
    assert stored.read_failure(path.parent, NATIVE) is None


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), keep=st.floats(0, 1, exclude_max=True))
def test_no_damage_is_ever_loaded(small, tmp_path, at, bits, keep):
    library = folder(tmp_path) / library_name(NATIVE)
    library.parent.mkdir(parents=True, exist_ok=True)
    data = small.read_bytes() * 20
    library.write_bytes(data)
    stored.record(library, NATIVE, "c++", 1.0)
    assert native.find() is not None
    place = int(at * len(data))
    for damaged in (data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :], data[: int(keep * len(data))]):
        library.write_bytes(damaged)
        assert native.find() is None
    library.write_bytes(data)
    record = library.with_suffix(".json")
    written = record.read_bytes().strip()
    record.write_bytes(written[: int(at * len(written))])
    assert native.find() is None


def test_a_failure_is_remembered_until_the_compiler_or_the_sources_change(compiler, small, caplog):
    calls = compiler("echo 'no such thing' >&2; exit 1")
    with pytest.raises(BackendError, match=r"could not compile the kernels: no such thing$"):
        native.build()
    tries = compiled(calls)
    with pytest.raises(BackendError, match=r"no such thing \(before; `anabranch doctor --build` tries again\)"):
        native.build()
    assert compiled(calls) == tries
    assert native.load() is None
    assert caplog.messages[-1].startswith("no compiled kernels, running in plain PyTorch: ")
    assert native.status().reason.endswith("no such thing")
    with pytest.raises(BackendError):
        native.build(again=True)
    assert compiled(calls) == 2 * tries
    small.write_text(small.read_text() + "// changed\n")
    with pytest.raises(BackendError):
        native.build()
    assert compiled(calls) == 3 * tries
    compiler(version="small 2.0")
    assert native.build().compiler.endswith("(small 2.0)")
    assert native.status().is_ready


@pytest.mark.parametrize("made", ["exit 0", 'for last; do :; done; echo no library > "$last"'], ids=["nothing", "text"])
def test_a_compiler_that_makes_no_library_leaves_none(compiler, made, tmp_path):
    calls = compiler(made)
    with pytest.raises(BackendError, match=rf"made kernels that cannot be loaded: .*{library_name(NATIVE)}: "):
        native.build()
    assert [path.suffixes for path in folder(tmp_path).iterdir()] == [[".failed", ".json"]]
    tries = compiled(calls)
    assert native.load() is None
    assert compiled(calls) == tries
    compiler(version="small 2.0")
    assert native.load().anabranch_answer() == 42


def unloadable(tmp_path):
    """A library that is whole by its record, as one of another system is."""
    library = folder(tmp_path) / library_name(NATIVE)
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    return stored.record(library, NATIVE, "c++ of another image", 1.0)


def test_a_whole_library_that_cannot_be_loaded_is_built_again(compiler, tmp_path):
    found = unloadable(tmp_path)
    calls = compiler()
    status = native.status()
    assert (status.library, status.is_ready, status.will_build) == (found, False, True)
    assert status.reason.startswith("it cannot be loaded: ")
    assert native.load().anabranch_answer() == 42
    assert native.load().anabranch_answer() == 42
    assert compiled(calls) == 1
    assert native.status() == native.Status(native.find())


def test_a_library_that_cannot_be_loaded_stays_where_there_is_no_compiler(no_compiler, tmp_path, caplog):
    found = unloadable(tmp_path)
    no_compiler()
    assert native.load() is None
    assert "no C++ compiler found" in caplog.messages[-1]
    assert native.find() == found
    assert native.status().reason.startswith("it cannot be loaded: ")
    assert not native.status().will_build


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CXX", "g++ '", 'CXX is "g++ \'", which is no command: No closing quotation'),
        ("CXX", "g++ \\", "which is no command: No escaped character"),
        ("CXX", "/nowhere/c++", "cannot run the C++ compiler '/nowhere/c++'"),
        ("ANABRANCH_CACHE", "~nobody-of-this-name/x", "begins with a home directory that is not known here"),
    ],
)
def test_no_setting_ends_the_first_forward(compiler, monkeypatch, caplog, name, value, said):
    compiler()
    monkeypatch.setenv(name, value)
    assert native.load() is None
    assert caplog.messages[-1].startswith("no compiled kernels, running in plain PyTorch: ")
    assert said in caplog.messages[-1]
    assert said in native.status().reason
    with pytest.raises(AnabranchError):
        native.build()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.text("g+ '\"\\$~/.#\n", max_size=8))
def test_whatever_cxx_says_is_a_compiler_or_a_plain_error(monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendError):
        native.find_compiler()


def test_nobody_waits_forever_for_another_process(compiler, monkeypatch, caplog, tmp_path):
    calls = compiler()
    monkeypatch.setattr(builder, "_WAIT_S", 0.2)
    folder(tmp_path).mkdir(parents=True)
    with locked(folder(tmp_path) / f".{library_name(NATIVE)}.lock") as alone:
        assert alone
        with pytest.raises(BackendError, match=r"another process has been compiling .* end it if it hangs"):
            native.build()
        assert native.load() is None
    assert caplog.messages[-1].startswith("no compiled kernels, running in plain PyTorch: another process")
    assert compiled(calls) == 0
    assert native.load().anabranch_answer() == 42


def test_a_success_clears_the_failure_before_it(compiler):
    compiler("exit 1")
    with pytest.raises(BackendError):
        native.build()
    compiler()
    built = native.build(again=True)
    built.path.unlink()
    assert native.status().will_build


def test_a_failure_of_another_compiler_does_not_count(compiler):
    compiler("exit 1")
    with pytest.raises(BackendError):
        native.build()
    assert not native.status().will_build
    compiler(version="small 2.0")
    assert native.status().will_build


def test_the_last_words_of_a_compiler_are_kept(compiler):
    compiler("echo first >&2; seq 10000 >&2; echo last >&2; exit 1")
    with pytest.raises(BackendError, match=r"10000\nlast$") as caught:
        native.build()
    assert "first" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "said",
    [
        "fatal error: Killed signal terminated program cc1plus",
        "No space left on device",
        "fatal error: Terminated signal terminated program cc1plus",
        "fatal error: Interrupt signal terminated program cc1plus",
        "clang: error: unable to execute command: Terminated",
    ],
)
def test_what_was_the_machine_s_fault_is_tried_again(compiler, said):
    compiler(f"echo '{said}' >&2; exit 1")
    with pytest.raises(BackendError, match=said):
        native.build()
    compiler()
    assert native.build() == native.find()


@pytest.mark.parametrize("said", ["error: unterminated #ifdef", "error: missing terminating character: interrupted_by"])
def test_what_is_wrong_with_the_sources_is_not_tried_again(compiler, said):
    compiler(f"echo '{said}' >&2; exit 1")
    for reason in (said, r"\(before; .*doctor --build"):
        with pytest.raises(BackendError, match=reason):
            native.build()


def test_racing_builders_compile_once(compiler, caplog):
    calls = compiler('sleep 0.2; exec c++ "$@"')
    with ThreadPoolExecutor(4) as pool:  # a lock is held per open file, so threads stand for processes
        found = list(pool.map(lambda _: native.build(), range(4)))
    assert found == [native.find()] * 4
    assert compiled(calls) == 1
    assert "another process compiles the CPU kernels; waiting for it" in caplog.messages


def test_nothing_is_left_of_a_build_that_failed(compiler, tmp_path):
    compiler('case "$*" in *" -c "*) exec c++ "$@";; *) exit 1;; esac')
    with pytest.raises(BackendError, match="it ended with code 1"):
        native.build()
    assert [path.suffixes for path in folder(tmp_path).iterdir()] == [[".failed", ".json"]]


def test_what_killed_builders_left_is_cleared(compiler, tmp_path):
    compiler()
    names = [f".{library_name(NATIVE)}.{name}" for name in ("old", "old-folder", "new")]
    for name in names:
        path = folder(tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if "folder" in name else path.touch()
        if "old" in name:
            os.utime(path, (0, 0))
    native.build()
    assert [(folder(tmp_path) / name).exists() for name in names] == [False, False, True]


def test_a_full_disk_is_no_failure_of_the_compiler(compiler, monkeypatch, tmp_path):
    compiler()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.Compiler, "make_library", full)
    with pytest.raises(CapacityError, match="no room left on disk"):
        native.build()
    assert not list(folder(tmp_path).glob("*.failed.json"))


def test_says_when_there_is_no_compiler(no_compiler):
    no_compiler()
    with pytest.raises(BackendError, match=r"no C\+\+ compiler found; install g\+\+ or set CXX"):
        native.build()
    assert native.status() == native.Status(None, "no C++ compiler found; install g++ or set CXX")


def test_a_cache_that_cannot_be_written(compiler, tmp_path, monkeypatch):
    compiler()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the cache .*; set ANABRANCH_CACHE to a folder of yours"):
        native.build()
    assert native.load() is None


@pytest.mark.parametrize(
    ("cores", "free", "files"), [(8, None, 8), (8, 64_000_000_000, 8), (8, 1_100_000_000, 2), (2, 0, 1)]
)
def test_files_are_compiled_within_cores_and_memory(monkeypatch, cores, free, files):
    monkeypatch.setattr(compilers.machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(compilers.machine, "memory", lambda: SimpleNamespace(available_bytes=free))
    assert compilers._at_once() == files


def test_the_switch(compiler, monkeypatch):
    compiler()
    built = native.build()
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    assert native.load() is None
    assert native.status() == native.Status(built, "ANABRANCH_NO_KERNELS is set")
