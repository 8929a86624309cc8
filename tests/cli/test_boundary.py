"""The last net: whatever is raised below it, a user sees one line and an exit code, and the trace only where it is asked for."""

import asyncio
import errno
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile

import jinja2
import pyarrow
import pytest
import typer

from anabranch.cli.main import main
from anabranch.errors import ConfigError, DataError

FAULTS = [
    RuntimeError("shapes do not match"),
    IndexError("list index out of range"),
    KeyError("model"),
    AssertionError(),
    ZeroDivisionError("division by zero"),
    OverflowError("int too large to convert to float"),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
    zipfile.BadZipFile("File is not a zip file"),
    gzip.BadGzipFile("Not a gzipped file"),
    EOFError("Compressed file ended before the end-of-stream marker was reached"),
    struct.error("unpack requires a buffer of 8 bytes"),
    json.JSONDecodeError("Expecting value", "{", 1),
    pyarrow.ArrowInvalid("Parquet magic bytes not found\nin footer"),
    jinja2.TemplateSyntaxError("unexpected end", 1),
    OSError("no errno at all"),
    StopIteration(),
    ExceptionGroup("several", [ValueError("one"), ValueError("two")]),
    asyncio.CancelledError(),
    GeneratorExit(),
]


@pytest.fixture
def failing(monkeypatch):
    """Let ``anabranch info`` raise what it is given."""

    def prepare(error):
        def raising(*_):
            raise error

        monkeypatch.setattr("anabranch.cli.info._list_presets", raising)

    return prepare


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_of_ours_is_one_line_that_says_so(failing, capsys, error):
    failing(error)
    assert main(["info"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: a fault inside anabranch, please report it: ")
    assert type(error).__name__ in err
    assert "--debug" in err


def test_under_torchrun_a_line_is_told_once(failing, capsys, monkeypatch, tmp_path):
    """Four processes with one wrong line, and one with another: each leaves torchrun its own."""
    for rank in range(5):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        failing(ConfigError("steps is 0; use 1 or more" if rank < 4 else "another thing"))
        assert main(["info"]) == 2
        said = "steps is 0; use 1 or more" if rank < 4 else "another thing"
        assert json.loads((folder / "error.json").read_text())["message"] == said
        assert capsys.readouterr().err == (f"error: {said}\n" if rank in (0, 4) else "")


@pytest.mark.parametrize("place", ["", "/dev/null/none/error.json"])
def test_without_a_folder_of_torchruns_each_process_tells(failing, capsys, monkeypatch, place):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
    failing(ConfigError("steps is 0"))
    for _ in range(2):
        assert main(["info"]) == 2
        assert capsys.readouterr().err == "error: steps is 0\n"


def test_a_line_stays_a_line(failing, capsys):
    failing(ValueError("a\nb\n" * 100_000))
    assert main(["info"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 1100


@pytest.mark.parametrize("asked", ["option", "variable"])
@pytest.mark.parametrize("error", [IndexError("list index out of range"), DataError("no corpus")])
def test_the_trace_is_shown_where_it_is_asked_for(failing, capsys, monkeypatch, asked, error):
    failing(error)
    if asked == "variable":
        monkeypatch.setenv("ANABRANCH_DEBUG", "1")
    assert main(["--debug", "info"] if asked == "option" else ["info"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in raising" in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_a_variable_that_says_no_shows_no_trace(failing, capsys, monkeypatch, value):
    failing(IndexError("list index out of range"))
    monkeypatch.setenv("ANABRANCH_DEBUG", value)
    assert main(["info"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("no corpus at\n  x"), "no corpus at x"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x/y"), "no such file or directory: x/y"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "no space left on device; free some room or choose another place",
        ),
        (MemoryError(), "out of memory; use a smaller batch, sequence length or model"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 8000 bytes"
            ),
            "out of memory (8000 bytes more were asked for); use a smaller batch, sequence length or model",
        ),
        (SystemExit("could not bind"), "could not bind"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_users_can_cause_is_told_without_blame(failing, capsys, error, message):
    failing(error)
    assert main(["info"]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_pipe_that_broke_elsewhere_is_an_error(failing, capsys, monkeypatch):
    """Only a reader of what we print may go without our saying so; here stdout is a pipe that is open."""
    read, write = os.pipe()
    try:
        monkeypatch.setattr("sys.stdout.fileno", lambda: write, raising=False)
        failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))
        assert main(["info"]) == 2
        assert capsys.readouterr() == ("", "error: broken pipe\n")
        os.close(read)
        assert main(["info"]) == 0
    finally:
        os.close(write)


def test_a_page_whose_reader_has_gone_is_no_mistake(failing, capsys):
    """rich ends the program where the reader of its page has left: anabranch --help | head."""
    left = SystemExit(1)
    left.__context__ = BrokenPipeError(errno.EPIPE, "Broken pipe")
    failing(left)
    assert main(["info"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=["interrupt", "abort"])
def test_interrupt_exits_with_130(failing, capsys, error):
    failing(error)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("error", [typer.Exit(143), SystemExit(143)], ids=["typer", "system"])
def test_an_exit_code_is_kept(failing, capsys, error):
    failing(error)
    assert main(["info"]) == 143
    assert capsys.readouterr() == ("", "")


def test_a_group_without_a_command_shows_its_help(capsys):
    for arguments in (["graph"], ["gateway"], ["gateway", "keys"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"error: name a command (see {' '.join(['anabranch', *arguments])} --help)\n"


def test_the_name_alone_shows_the_help(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr()
    assert main([]) == 0
    assert capsys.readouterr() == told
    assert "train" in told.out


@pytest.fixture(scope="module")
def shell(environment):
    """Run a line of sh in which ``$A`` is the command: (exit code, stderr)."""

    def run(line, **variables):
        command = f"{sys.executable} -m anabranch.cli.main"
        done = subprocess.run(
            ["sh", "-c", line],
            env={**environment, "A": command, **variables},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("$A --version >&-", 0, ""),
        ("$A --version <&- >&- 2>&-", 0, ""),
        ("$A trian 2>&-", 2, ""),
        ("$A trian >&-", 2, "error: no such command 'trian'"),
        ("$A --version > /dev/full", 2, "error: no space left on device"),
        ("$A trian 2> /dev/full", 2, ""),
        ("{ $A --version; echo $? >&2; } | true", 0, "0\n"),
        ("{ sleep 1; $A trian; echo $? > code; } 2>&1 | true; exit $(cat code)", 2, ""),
    ],
)
def test_standard_streams_that_are_closed_or_full(shell, tmp_path, line, code, message):
    found, err = shell(f"cd {tmp_path} && {line}")
    assert (found, err[: len(message)]) == (code, message)
    assert err.count("\n") <= 1


def test_a_file_does_not_take_the_place_of_a_closed_stream(shell):
    """A closed stdout leaves number 1 free: the next file that is opened would get what is printed."""
    script = (
        "import sys; from anabranch.cli.main import main; main(['--version']); sys.exit(open('/dev/null').fileno())"
    )
    code, _ = shell('$PYTHON -c "$SCRIPT" <&- >&-', PYTHON=sys.executable, SCRIPT=script)
    assert code > 2


def test_letters_that_a_terminal_does_not_have_are_escaped(shell):
    code, err = shell("$A $(printf 'caf\\303\\251\\377')", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert code == 2
    assert err.startswith("error: no such command 'caf")
    assert "Traceback" not in err


AT_IMPORT = """
import os, signal, sys

class Finder:
    done = False

    @classmethod
    def find_spec(cls, name, *_):
        if name == os.environ["AT"] and not cls.done:
            cls.done = True
            for _ in range(int(os.environ["TIMES"])):
                os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("anabranch.cli.main", ["--version"]),
        ("typer", ["--version"]),
        ("anabranch.files", ["info"]),
        ("numpy", ["graph", "info", "lesmis"]),
        ("numpy.linalg", ["graph", "info", "lesmis"]),
        pytest.param("torch", ["info", "moe"], marks=pytest.mark.slow),
        pytest.param("torch.nn", ["info", "moe"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_modules_are_imported_is_one_line(environment, tmp_path, name, arguments, times):
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "anabranch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "PYTHONPATH": path, "AT": name, "TIMES": str(times)},
    )
    # Python ends itself by the signal, which shells show as 130 too, if an interrupt has gone through an exec of somebody's.
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr == "interrupted\n"


def test_a_background_job_that_ignores_interrupts_goes_on_ignoring_them(shell):
    script = "import os, sys; from anabranch.cli import entry; os.kill(os.getpid(), 2); sys.exit(entry.main())"
    code, _ = shell("trap '' INT; $PYTHON -c \"$SCRIPT\" --version", PYTHON=sys.executable, SCRIPT=script)
    assert code == 0


def test_ctrl_c_is_one_line(environment):
    script = (
        "import sys, time; import anabranch.cli.info as info; from anabranch.cli.main import main\n"
        "def slow(*_):\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "info._list_presets = slow\nsys.exit(main(['info']))"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
