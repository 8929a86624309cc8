"""`render_template`: the text of a model's chat template, which cannot hang or exhaust the process that asks for it."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from anabranch.data import template_worker
from anabranch.errors import TokenizerError
from anabranch.extras import require

_WAIT_S = 20.0  # at most for an answer, computed or not: the last net, where the machine is busy or has no timers
_START_S = 120.0  # likewise for a new process


def render_template(template: str, **values: Any) -> str:
    """The text of a Jinja chat template.

    It is rendered in a process of its own, with a second of computing, a gigabyte of memory, and a million characters beyond eight for each
    of the request's (`template_worker`), so that a template that loops for ever ends there.

    Raises TokenizerError if it cannot be read, refuses the values, or passes a limit; MissingExtraError without jinja2.
    """
    try:
        return _ask(template, values)
    except _RefusedError as error:
        raise TokenizerError(f"the tokenizer's chat template refused the messages: {error}") from None


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """The names that a template expects to be given (``messages``, ``tools``, ...). Raises TokenizerError as `render_template`."""
    try:
        return frozenset(_ask(template, None))
    except _RefusedError as error:
        raise TokenizerError(f"the tokenizer's chat template cannot be read: {error}") from None


class _RefusedError(Exception):
    """What the template, or a limit, said."""


def _ask(template: str, values: Mapping[str, Any] | None) -> Any:
    try:
        request = json.dumps({"template": template, "values": values})
    except (TypeError, ValueError, RecursionError) as error:
        raise _RefusedError(f"they are no JSON: {error}") from None
    # By process: a fork of this one has the other end of the same pipe, and the answers must not be mixed.
    return _RENDERERS.setdefault(os.getpid(), _Renderer()).ask(request.encode())


class _Renderer:
    """The worker's process: started when it is first needed, kept for the next template, begun anew after a limit has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> Any:
        """The answer to a line of JSON. Raises _RefusedError."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._start()
            line = self._exchange(request, _WAIT_S)
            if not line:
                raise _RefusedError(self._why_it_ended())
        found = json.loads(line)
        if "error" in found:
            raise _RefusedError(found["error"])
        return found["answer"]

    def close(self) -> None:
        """End the process, which has nothing to lose. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):  # half a request that it did not read
                process.communicate()

    def _start(self) -> None:
        require("jinja2", by="a chat template")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # A session of its own: an interrupt at the terminal is not for it. -P: its folder has our modules, not the program's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(template_worker.__file__))], env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        greeting = json.dumps({"template": "", "values": {}}).encode()
        if not self._exchange(greeting, _START_S):
            raise _RefusedError(f"the process that renders it did not start: {self._why_it_ended()}")

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        """The line that answers another; an empty one if the process has ended, as it has after ``seconds``."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with _killed_after(process, seconds), contextlib.suppress(BrokenPipeError):
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line.endswith(b"\n"):
                return line
        return b""

    def _why_it_ended(self) -> str:
        process = self._process
        assert process is not None
        process.kill()
        code = process.wait()
        self.close()
        if code == template_worker.OUT_OF_MEMORY:
            return f"it asked for more than {template_worker.MEMORY >> 30} GiB of memory"
        if code == -getattr(signal, "SIGPROF", 0):
            return f"it took more than {template_worker.SECONDS:g} s of computing"
        return f"its process was ended (code {code}), after {_WAIT_S:g} s or by another"


@contextlib.contextmanager
def _killed_after(process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_RENDERERS: dict[int, _Renderer] = {}


@atexit.register
def _close() -> None:
    renderer = _RENDERERS.pop(os.getpid(), None)
    if renderer is not None:
        renderer.close()
