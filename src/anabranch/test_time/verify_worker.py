"""The process that has code of models run: each run in processes of its own, behind `anabranch.jail`, which it watches and ends.

It runs none of the code itself. See `anabranch.test_time.verify`.
"""

import contextlib
import doctest
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anabranch.jail import filter_of, inside, python
from anabranch.sandbox_worker import Limits, serve

# Of one process of a run. The last three are counted for the user, and others of his need them.
LIMITS = {
    **{"RLIMIT_AS": 1 << 30, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0},
    **{"RLIMIT_SIGPENDING": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_MEMLOCK": 0},
}
NUM_FILES = 32

# Bytes that are read of what one says: `verify_child` prints fewer characters, each of at most 12 bytes in JSON.
MOST_SAID = 4 << 20

MOST_EXAMPLES = 200

# Seconds for what comes before the code: walls and a Python.
START_S = 10.0

_CLOSING = re.compile(r"(?:\"{3}|'{3}|`{3}\w*)[ \t]*$", re.MULTILINE)
_CHILD = str(Path(__file__).with_name("verify_child.py"))


def answer(request: bytes) -> dict[str, Any]:
    """What a run said, as JSON; ``unknown`` where the code could not be run at all."""
    asked = json.loads(request)
    if not asked["mode"]:
        return {"answer": "{}"}
    try:
        said = {"examples": _examples, "run": _alone, "check": _in_two}[asked["mode"]](asked)
    except OSError as error:
        said = {"unknown": f"a process for it cannot be started: {error}"}
    return {"answer": json.dumps(said)}


def _alone(asked: dict[str, Any]) -> dict[str, Any]:
    running = _Running(asked)
    try:
        return running.said()
    finally:
        running.end()


def _examples(asked: dict[str, Any]) -> dict[str, Any]:
    """The code, and behind it the examples without what they should give, which is held against what they gave here."""
    # A closing mark of a docstring or a fence is no part of what the last example gives.
    until = time.monotonic() + asked["seconds"]
    try:
        with _ended_at(until):
            text = _CLOSING.sub("", asked["question"])
            examples = [one for one in doctest.DocTestParser().get_examples(text) if not one.options.get(doctest.SKIP)]
    except (ValueError, TimeoutError):
        examples = []
    left_s = until - time.monotonic()
    if not 0 < len(examples) <= MOST_EXAMPLES or left_s <= 0:
        return {"no_examples": True}
    said = _alone({**asked, "seconds": left_s, "sources": [one.source for one in examples]})
    outputs = said.get("outputs")
    if not isinstance(outputs, list):
        return {**said, "passed": False}
    is_right = len(outputs) == len(examples) and all(map(_is_wanted, examples, outputs))
    return {"passed": is_right, "error": "AssertionError"}


@contextlib.contextmanager
def _ended_at(until: float) -> Iterator[None]:
    """Raises TimeoutError then, in the middle of whatever is done: patterns of `doctest` take time quadratic in some questions."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, until - time.monotonic()))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_wanted(example: doctest.Example, output: Any) -> bool:
    """Whether what an example printed or raised is what stands in the question. What came may be anything: the code can write it."""
    if not (isinstance(output, list) and len(output) == 2 and isinstance(output[0], str)):
        return False
    printed, raised = output
    flags = doctest.NORMALIZE_WHITESPACE
    for flag, is_on in example.options.items():
        flags = flags | flag if is_on else flags & ~flag
    check = doctest.OutputChecker().check_output
    if raised is None:
        return check(example.want, printed, flags)
    if example.exc_msg is None or not isinstance(raised, str):
        return False
    wanted, got = example.exc_msg, raised
    if flags & doctest.IGNORE_EXCEPTION_DETAIL:
        wanted, got = (text.partition(":")[0].strip().rpartition(".")[2] for text in (wanted, got))
    return check(wanted, got, flags)


def _in_two(asked: dict[str, Any]) -> dict[str, Any]:
    """The code in one process and its tests in another, with nothing between them but lines."""
    ends = socket.socketpair()
    try:
        served = _Running({**asked, "mode": "serve"}, ends[0])
        try:
            tested = _Running({**asked, "code": asked["prompt"]}, ends[1])
            for end in ends:
                end.close()
            try:
                return served.lack_of_start() or tested.said()
            finally:
                tested.end()
        finally:
            served.end()
    finally:
        for end in ends:
            end.close()


class _Running:
    """A process that runs something.

    Args:
        asked: for `verify_child`, with ``jail`` (walls; none where it is empty) and ``seconds``.
        peer: socket that it has too.
    """

    def __init__(self, asked: dict[str, Any], peer: socket.socket | None = None) -> None:
        self._asked, self._unread, self._folder = asked, b"", ""
        given = [] if peer is None else [peer.fileno()]
        with contextlib.ExitStack() as closing:
            if asked["jail"]:
                rules = filter_of()
                closing.callback(os.close, rules)
                passed, command = [*given, rules], inside(asked["jail"], rules, _CHILD)
            else:
                self._folder = tempfile.mkdtemp(prefix="anabranch-code-")
                passed, command = given, [python(), "-I", "-S", _CHILD]
            environment = {"HOME": self._folder, "TMPDIR": self._folder} if self._folder else {}
            how: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            how |= {"env": environment, "cwd": self._folder or None, "start_new_session": True, "pass_fds": passed}
            try:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(command, **how)
            except OSError:
                self._clean()
                raise
        limits = {"RLIMIT_CPU": int(asked["seconds"]) + 1, "RLIMIT_NOFILE": NUM_FILES + max(given, default=0), **LIMITS}
        job = {name: asked.get(name) for name in ("mode", "code", "sources", "name")}
        if asked["mode"] == "check":
            job["tests"] = asked["tests"]
        self._tell({**job, "limits": limits, "peer": given[0] if given else None}, time.monotonic() + START_S)

    def lack_of_start(self) -> dict[str, Any] | None:
        """Why it could not start, once it has or has not; None where it could. It is asked once."""
        if self._line(START_S) == {"started": True}:
            return None
        return {"unknown": f"the process that runs it did not start ({self._complaint()})"}

    def said(self) -> dict[str, Any]:
        """Its answer, or why there is none."""
        lack = self.lack_of_start()
        if lack:
            return lack
        until = time.monotonic() + self._asked["seconds"]
        told = self._line(until - time.monotonic())
        if self._asked["mode"] == "run":
            if told != {"ready": True}:
                return {"error": told.get("error")}
            # Its tests, and the word that says they passed, are no sooner there than the code has run.
            word = secrets.token_hex(16)
            self._tell({"tests": self._asked["tests"], "word": word}, until)
            told = self._line(until - time.monotonic())
            told = {"error": told.get("error"), "passed": told.get("passed") == word}
        # What else it says may be the code's: whether it could be run, and what was asked, is not for it to say.
        return {name: told[name] for name in ("error", "outputs", "passed") if name in told}

    def _complaint(self) -> str:
        """The last line of what is said of a start that failed. Nobody's code has run yet."""
        self._process.kill()
        lines = self._process.communicate()[1].decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else f"code {self._process.returncode}"

    def end(self) -> None:
        """End it and all it started: with the first process of a jail all others end."""
        for end in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                end(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._clean()

    def _clean(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, job: dict[str, Any], until: float) -> None:
        """Send a job. What is not read in time, or has ended, is found out when it is listened to."""
        assert self._process.stdin is not None
        handle, text = self._process.stdin.fileno(), json.dumps(job).encode() + b"\n"
        os.set_blocking(handle, False)
        with contextlib.suppress(OSError):
            while text and select.select([], [handle], [], max(0.0, until - time.monotonic()))[1]:
                text = text[os.write(handle, text) :]

    def _line(self, seconds: float) -> dict[str, Any]:
        """What it says next, which may be anything that its code wrote there."""
        assert self._process.stdout is not None
        handle, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                return {"error": "TimeoutError"}
            piece = os.read(handle, 1 << 16)
            self._unread += piece
            if not piece or len(self._unread) > MOST_SAID:
                return {"error": "ended early"}
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            told = None
        return told if isinstance(told, dict) else {"error": "ended early"}


if __name__ == "__main__":
    serve(answer, Limits(seconds=20.0, memory=2 << 30))
