"""The process that runs code of models: each run in a child of its own, which it watches and ends. See `anabranch.test_time.verify`."""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

from anabranch.sandbox_worker import Limits, serve

# Of one run.
MEMORY = 1 << 30
FILE_BYTES = 1 << 20
NUM_FILES = 32

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000


def answer(request: bytes) -> dict[str, Any]:
    """``passed``, or why not, in a word."""
    asked = json.loads(request)
    if not hasattr(os, "fork"):
        return {"error": "code cannot be run here: this system has no fork"}
    folder = tempfile.mkdtemp(prefix="anabranch-code-")
    try:
        return {"answer": _watched(asked["code"], asked["tests"], float(asked["seconds"]), folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(code: str, tests: str, seconds: float, folder: str) -> str:
    word = secrets.token_hex(16)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _run(code, tests, seconds, folder, write, word)
    os.close(write)
    said = b""
    deadline = time.monotonic() + seconds
    try:
        while len(said) < 200:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([read], [], [], left)[0]:
                return "!TimeoutError"
            piece = os.read(read, 200)
            if not piece:
                break
            said += piece
    finally:
        os.close(read)
        # Whatever it has started is in its group.
        for end in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                end(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = said.decode("ascii", "replace")
    if text == word:
        return "passed"
    # Behind a mark: an error may be called "passed".
    return f"!{text}" if text.isidentifier() else "!ended early"


def _run(code: str, tests: str, seconds: float, folder: str, write: int, word: str) -> None:
    """In the child; it never returns."""
    try:
        _confine(seconds, folder, write)
        scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        try:
            exec(compile(code, "answer", "exec"), scope)
            exec(compile(tests, "tests", "exec"), scope)
            said = word
        except BaseException as error:
            # A name of an error, and no more: its text is the code's.
            said = type(error).__name__[:60]
        os.write(write, said.encode("ascii", "replace"))
    finally:
        os._exit(0)


def _confine(seconds: float, folder: str, write: int) -> None:
    import resource

    os.setsid()
    with contextlib.suppress(OSError, AttributeError):
        # No network, where a user may have a namespace of his own.
        os.unshare(_NEW_USER | _NEW_NETWORK)  # type: ignore[attr-defined]
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    # The pipes of the sandbox among them: an answer is not for the code to give.
    for first, end in ((3, write), (write + 1, 1024)):
        os.closerange(first, end)
    most = int(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: most,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: NUM_FILES + write,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, wanted in limits.items():
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(kind)[1]
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (wanted, wanted))
    sys.setrecursionlimit(1000)


if __name__ == "__main__":
    # Nothing that the code could read of its parent's.
    os.environ.clear()
    serve(answer, Limits(seconds=20.0, memory=2 << 30))
