"""The last net under the command line: whatever goes wrong becomes one line on stderr and an exit code, never a traceback.

What a user can cause is told by the reader that meets it, with file, field, value and what is allowed (`anabranch.errors`). What
gets here without that is a fault of ours: the line says so, names the kind of exception and how its trace is seen.
"""

import errno
import hashlib
import json
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import typer

from anabranch.cli.output import let_go, say, visible
from anabranch.errors import AnabranchError
from anabranch.extras import packages

DONE, USER_ERROR, INTERRUPTED = 0, 2, 130
DEBUG = "ANABRANCH_DEBUG"
# typer carries its own click since 0.26 and used the installed one before; this is that click's class for misuse either way.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Characters of a line; a library may quote a whole file.
_LONGEST = 1000


def guarded(run: Callable[[], int | None], *, misuse: Callable[[Exception], str], debug: Callable[[], bool]) -> int:
    """Run a command and return its exit code, whatever it raises.

    Args:
        run: the command; None counts as 0.
        misuse: what is wrong with the arguments, in one sentence, for a `UsageError`.
        debug: whether the trace is wanted; asked after the command has failed.

    Returns:
        0; 2 for any error, after one line that begins with ``error:``; 130 when interrupted; the command's own code.
    """
    _open_what_is_closed()
    try:
        code = run() or DONE
        sys.stdout.flush()
        return code
    except typer.Exit as exit:
        _settle(sys.stdout)
        return exit.exit_code
    except BaseException as error:
        if debug():
            say("".join(traceback.format_exception(error)).rstrip())
        return _told(error, misuse)


def debug_wanted() -> bool:
    """Whether the environment asks for traces (``ANABRANCH_DEBUG=1``)."""
    return os.environ.get(DEBUG, "").strip().lower() not in ("", "0", "false", "no", "off")


def _told(error: BaseException, misuse: Callable[[Exception], str]) -> int:
    if isinstance(error, SystemExit):
        # As rich ends where nobody reads its page any more (--help | head): nothing is wrong.
        if isinstance(error.__context__, BrokenPipeError):
            _settle(sys.stdout)
            return DONE
        if error.code is None or isinstance(error.code, int):
            _settle(sys.stdout)
            return error.code or DONE
        return _fail(str(error.code))
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _settle(sys.stdout)
        say("interrupted")
        return INTERRUPTED
    # | head: nothing is wrong.
    if isinstance(error, BrokenPipeError) and _reader_is_gone(sys.stdout):
        _settle(sys.stdout)
        return DONE
    return _fail(misuse(error) if isinstance(error, UsageError) else sentence(error))


def sentence(error: BaseException) -> str:
    """What an exception comes to, for a user."""
    text = str(error)
    if isinstance(error, AnabranchError):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        hint = "; free some room or choose another place" if error.errno == errno.ENOSPC else ""
        return f"{(error.strerror or text).lower()}{where}{hint}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search("memory|overflowed", text)):
        needed = re.search(r"(?:allocate|allocating)\D*([\d.]+ ?\w*)", text)
        what = f" ({needed[1].strip()} more were asked for)" if needed else ""
        return f"out of memory{what}; use a smaller batch, sequence length or model"
    broken = _broken_package(error)
    if broken:
        return f"{broken} is installed, but cannot be imported: {text}{_advice(broken)}"
    name = type(error).__name__ if type(error).__module__ == "builtins" else _full_name(type(error))
    return f"a fault inside anabranch, please report it: {name}: {text or 'no message'} (--debug or {DEBUG}=1 shows the trace)"


def _broken_package(error: BaseException) -> str | None:
    """The package of others that could not be imported, where that is what went wrong; None for anything else."""
    named = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    # Code of a module that runs while it is imported: a library that does not load is an OSError there, or worse.
    running = [
        frame.f_globals.get("__name__", "").partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    known = packages()
    return next((module for module in (*running, named) if module in known), None)


def _advice(module: str) -> str:
    package = packages()[module]
    wanted = (
        "" if package.fits else f"; it is version {package.version}, and anabranch needs {package.name}{package.needs}"
    )
    return f"{wanted}; install {package.name} again, anabranch doctor shows what is here"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _fail(message: str) -> int:
    _settle(sys.stdout)
    # It may repeat what others said, a server or a file.
    line = visible(" ".join(message.split()))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST * 3 // 4]} ... {line[-_LONGEST // 4 :]}"
    if not _is_told_by_another(line):
        say(f"error: {line}")
    return USER_ERROR


def _is_told_by_another(line: str) -> bool:
    """Whether another process that the same torchrun started on this machine has said this line: what all find out is told once.

    torchrun is left the line too, for its own account of who failed.
    """
    # A file in a folder of this process, which is in one of all that were started with it; torchrun makes and removes both.
    named = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not named:
        return False
    report = Path(named)
    with suppress(OSError):
        report.write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    said = report.parent.parent / f"anabranch-said-{hashlib.sha256(line.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        # A line twice is better than none.
        return False
    return False


def _settle(stream: TextIO) -> None:
    """Write what is still held; where that cannot be, let it go, or Python would complain of it at its end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        let_go(stream)


def _reader_is_gone(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        # No descriptor of its own, or a system without poll.
        return True


def _open_what_is_closed() -> None:
    """Standard streams that were closed (``>&-``) lead nowhere, and what cannot be written in a stream's encoding is escaped.

    A file that is opened later would otherwise take the number of a closed stream, and get what is meant for that.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors in ("strict", "surrogateescape"):
        reconfigure(errors="backslashreplace")
