"""A server as users start it: a process of its own, on loopback, ended when the test is over."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anabranch

SOURCE = str(Path(anabranch.__file__).resolve().parent.parent)


@dataclass
class Served:
    """A server that answers.

    Attributes:
        url: where, without a slash at the end.
        process: its.
        log: file of its stderr.
    """

    url: str
    process: subprocess.Popen
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@contextlib.contextmanager
def started(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """``anabranch`` with these arguments, ``--port 0`` and ``--json``, once it has said where it listens."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        command = [sys.executable, "-m", "anabranch.cli.main", *arguments, "--port", "0", "--json"]
        environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", **(environment or {})}
        with open(log, "wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=folder)
        try:
            assert process.stdout is not None
            said = b""
            while not said.endswith(b"\n}\n"):
                line = process.stdout.readline()
                if not line:
                    process.wait(60)
                    raise AssertionError(f"the server did not start: {log.read_text()}")
                said += line
            yield Served(json.loads(said)["url"], process, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            process.stdout.close()
