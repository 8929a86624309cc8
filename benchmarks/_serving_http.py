"""What the benchmarks of serving over HTTP share: a server as a process, its processes' memory, a client that counts."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import anabranch

SOURCE = str(Path(anabranch.__file__).resolve().parent.parent)


def save_small_moe(folder: Path) -> str:
    """A mixture of experts of random weights and bytes as tokens: large enough to be busy, small enough to start at once."""
    from anabranch.data import ByteTokenizer
    from anabranch.lm import Decoder, save_model
    from anabranch.nn import MoE, SelfAttention
    from anabranch.routing import Router, TopK

    feed_forward = MoE.Config(num_experts=8, hidden_dim=64, router=Router.Config(select=TopK.Config(top_k=2)))
    config = Decoder.Config(
        vocab_size=257,
        dim=64,
        num_layers=4,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=feed_forward,
        init_std=0.3,
        max_positions=2048,
    )
    path = folder / "small-moe"
    if not path.exists():
        save_model(path, config.build(seed=0).eval(), ByteTokenizer())
    return str(path)


class Server:
    """A command that serves, and when it does.

    Args:
        command: its first line of JSON on stdout says it is ready and where; with ``url`` the address is asked until it answers.
        url: of a server that does not say.
    """

    def __init__(self, command: list[str], url: str | None = None, environment: dict[str, str] | None = None) -> None:
        self.log = tempfile.TemporaryFile()
        given = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", **(environment or {})}
        # A server that does not say where it is writes its log to stdout instead: a pipe that nobody reads would stop it once it is full.
        said = subprocess.PIPE if url is None else self.log
        self.process = subprocess.Popen(command, stdout=said, stderr=self.log, env=given)
        self.url = url or self._said_url()

    def _said_url(self) -> str:
        assert self.process.stdout is not None
        said = b""
        while not said.endswith(b"\n}\n"):
            line = self.process.stdout.readline()
            if not line:
                self.process.wait(10)
                self.log.seek(0)
                raise SystemExit(f"the server did not start: {self.log.read().decode()}")
            said += line
        return json.loads(said)["url"]

    def logged(self) -> str:
        """What it has written to stderr, and to stdout where that is no pipe."""
        # The server writes where the file is: it must not be moved.
        number = self.log.fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")

    def children(self) -> list[int]:
        """Processes that it has started."""
        found: list[int] = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
        return found

    def end(self, timeout_s: float = 60.0, *, is_told: bool = False) -> int:
        """SIGTERM, unless it has got one, and its exit code."""
        if self.process.poll() is None and not is_told:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.log.close()


def ours(model: str, *arguments: str, threads: int = 1) -> Server:
    """``anabranch serve`` on a free port."""
    command = [
        sys.executable,
        "-m",
        "anabranch.cli.main",
        "serve",
        model,
        "--port",
        "0",
        "--json",
        "--quiet",
        *arguments,
    ]
    return Server(command, environment={"OMP_NUM_THREADS": str(threads)})


def resident_bytes(pid: int) -> int:
    """RSS of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


@dataclass
class Result:
    """What became of one request.

    Attributes:
        sent: seconds of `time.monotonic`.
        status: of HTTP; 0 if no head came.
        outcome: ``whole``, ``error`` (told: a status or an event), ``cut`` (a head, but no end), ``refused`` (nobody listens),
            ``reset`` (the connection broke before a head), ``late`` (no end in time).
        ttft_s, total_s: from sent.
        tokens: chunks of a stream that carried text.
    """

    sent: float
    status: int = 0
    outcome: str = "reset"
    ttft_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    timeout_s: float = 120,
) -> Result:
    """Send one request to ``/v1/completions`` and read it to its end."""
    result = Result(time.monotonic())
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.post(f"{url}/v1/completions", json=body, headers=headers) as answer,
        ):
            result.status, result.outcome, result.headers = answer.status, "cut", dict(answer.headers)
            if answer.status != 200:
                await answer.read()
                result.outcome = "error"
            elif body.get("stream"):
                await _read_stream(answer, result)
            else:
                made = json.loads(await answer.read())
                result.tokens, result.outcome = made["usage"]["completion_tokens"], "whole"
    except aiohttp.ClientConnectorError:
        result.outcome = "refused"
    except TimeoutError:
        result.outcome = "late"
    except (aiohttp.ClientError, ConnectionError, ValueError):
        pass  # "reset" before a head, "cut" after it
    result.total_s = time.monotonic() - result.sent
    return result


async def _read_stream(answer: aiohttp.ClientResponse, result: Result) -> None:
    is_error = False
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            result.outcome = "error" if is_error else "whole"
            return
        is_error = is_error or line.startswith(b'data: {"error"')
        result.ttft_s = result.ttft_s or time.monotonic() - result.sent
        result.tokens += 1
