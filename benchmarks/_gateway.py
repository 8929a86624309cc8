"""What the benchmarks of the gateway share: a mock upstream, servers as processes, a light client, and their use of the machine.

The client speaks HTTP/1.1 over asyncio's sockets and does next to nothing with answers, so that it does not hide what is measured. All
is on loopback.
"""

import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from _machine import here

HERE = Path(__file__).parent
CHUNKS = 20  # content chunks of a stream
PROMPT = "Explain in two sentences why rivers meander, and name one river that does. " * 8

ANSWER = json.dumps(
    {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "created": 1,
        "model": "mock",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "word " * CHUNKS}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 120, "completion_tokens": CHUNKS, "total_tokens": 120 + CHUNKS},
    }
).encode()


def _events() -> list[bytes]:
    head = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": "word "} for _ in range(CHUNKS))]
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 120, "completion_tokens": CHUNKS, "total_tokens": 120 + CHUNKS}
    chunks.append({**head, "choices": [], "usage": usage})
    return [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), b"data: [DONE]\n\n"]


class Upstream(asyncio.Protocol):
    """Answers any POST at once: a whole answer, or a stream whose chunks are written one by one. ``?fail=N``: every N-th request fails."""

    served = 0
    fail_every = 0
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER
    broken = b'{"error":{"message":"broken"}}'
    failure = (
        b"HTTP/1.1 500 Oops\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(broken) + broken
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    events = tuple(b"%x\r\n%s\r\n" % (len(event), event) for event in _events())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._held = b""

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = self._held[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
            if len(self._held) < end + 4 + length:
                return
            body, self._held = self._held[end + 4 : end + 4 + length], self._held[end + 4 + length :]
            self._reply(body)

    def _reply(self, body: bytes) -> None:
        Upstream.served += 1
        if Upstream.fail_every and Upstream.served % Upstream.fail_every == 0:
            self._transport.write(self.failure)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self._transport.write(self.head)
            asyncio.get_running_loop().create_task(self._stream())
        else:
            self._transport.write(self.answer)

    async def _stream(self) -> None:
        for event in self.events:
            self._transport.write(event)
            await asyncio.sleep(0)
        self._transport.write(b"0\r\n\r\n")


async def _serve(port: int, fail_every: int) -> None:
    Upstream.fail_every = fail_every
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


RELAY = """
import sys
from aiohttp import ClientSession, TCPConnector, web
async def relay(request):
    body = await request.read()
    headers = {"content-type": "application/json"}
    async with request.app["session"].post(sys.argv[2] + request.path_qs, data=body, headers=headers) as upstream:
        if upstream.content_type != "text/event-stream":
            return web.Response(status=upstream.status, body=await upstream.read(), content_type="application/json")
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response
async def session(app):
    app["session"] = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False)
    yield
    await app["session"].close()
app = web.Application()
app.cleanup_ctx.append(session)
app.router.add_post("/{path:.*}", relay)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Contestant:
    """A server under test.

    Attributes:
        url: (host, port).
        path: of chat.
        key: it wants.
        model: to ask for.
        process: its own; None for the upstream itself.
        ready_s: from start to the first answer of its health page.
    """

    name: str
    port: int
    path: str = "/v1/chat/completions"
    key: str = "none"
    model: str = "mock"
    process: psutil.Process | None = None
    ready_s: float = 0.0

    def request(self, stream: bool, text: str = PROMPT) -> bytes:
        """The bytes of one request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 64,
        }
        if stream:
            fields["stream"] = True
        body = json.dumps(fields).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def rss_mib(self) -> float:
        """Resident memory of the process and its children."""
        assert self.process is not None
        family = [self.process, *self.process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / 2**20

    def cpu_s(self) -> float:
        """Processor seconds of the process and its children so far."""
        assert self.process is not None
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in family)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    health: str,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    timeout_s: float = 120.0,
) -> Iterator[tuple[psutil.Process, float]]:
    """A server as a process of its own, from when it answers; ended at the end."""
    begin = time.perf_counter()
    with open(log or os.devnull, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(environment or {})})
        try:
            while not _answers(port, health):
                if process.poll() is not None or time.perf_counter() - begin > timeout_s:
                    raise SystemExit(f"{' '.join(command[:4])} did not start; see {log}")
                time.sleep(0.01)
            yield psutil.Process(process.pid), time.perf_counter() - begin
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int, path: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\r\n".encode())
            return link.recv(64).split(b" ")[1:2] in ([b"200"], [b"404"], [b"405"])
    except OSError:
        return False


def upstream_command(port: int, fail_every: int = 0) -> list[str]:
    return [sys.executable, str(HERE / "_gateway.py"), str(port), str(fail_every)]


def relay_command(port: int, upstream_port: int) -> list[str]:
    return [sys.executable, "-c", RELAY, str(port), f"http://127.0.0.1:{upstream_port}"]


class Link(asyncio.Protocol):
    """One connection of the client."""

    def __init__(self) -> None:
        self._done: asyncio.Future[int] | None = None
        self._held = b""
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True
        if self._done is not None and not self._done.done():
            self._done.set_result(0)

    def data_received(self, data: bytes) -> None:
        self._held += data
        end = self._held.find(b"\r\n\r\n")
        if end < 0 or self._done is None or self._done.done():
            return
        head = self._held[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            is_whole = len(self._held) >= end + 4 + int(head[at + 15 :].split(b"\r\n")[0])
        else:
            is_whole = self._held.endswith(b"0\r\n\r\n")
        if is_whole:
            status = int(self._held[9:12])
            self._held = b""
            self._done.set_result(status)

    async def ask(self, request: bytes) -> int:
        """Send, and wait for the whole answer; its status, 0 if the connection broke."""
        self._done = asyncio.get_running_loop().create_future()
        self._held = b""
        self.transport.write(request)
        return await self._done


@dataclass
class Load:
    """What came of a load.

    Attributes:
        latency_s: of each request that was answered with 200.
        wall_s: of all.
        statuses: how often each came.
        cpu_s: of the server.
    """

    latency_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    def row(self) -> dict[str, float]:
        """Milliseconds, requests a second, processor milliseconds a request."""
        count = len(self.latency_s)
        if not count:
            return {"failed": sum(self.statuses.values())}
        cuts = statistics.quantiles(self.latency_s, n=100, method="inclusive") if count > 1 else self.latency_s * 99
        return {
            "p50_ms": round(1e3 * cuts[49], 3),
            "p95_ms": round(1e3 * cuts[94], 3),
            "p99_ms": round(1e3 * cuts[98], 3),
            "requests_s": round(count / self.wall_s, 1),
            "cpu_ms": round(1e3 * self.cpu_s / count, 4),
            "failed": sum(self.statuses.values()) - count,
        }


async def load(contestant: Contestant, count: int, concurrency: int, stream: bool) -> Load:
    """``count`` requests from ``concurrency`` connections that stay open."""
    loop, result, request = asyncio.get_running_loop(), Load(), contestant.request(stream)
    left = count

    async def client() -> None:
        nonlocal left
        link: Link | None = None
        while left > 0:
            left -= 1
            if link is None or link.lost:
                _, link = await loop.create_connection(Link, "127.0.0.1", contestant.port)
            begin = time.perf_counter()
            status = await link.ask(request)
            if status == 200:
                result.latency_s.append(time.perf_counter() - begin)
            result.statuses[status] = result.statuses.get(status, 0) + 1
        if link is not None:
            link.transport.close()

    before = contestant.cpu_s() if contestant.process else 0.0
    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    result.wall_s = time.perf_counter() - begin
    result.cpu_s = contestant.cpu_s() - before if contestant.process else 0.0
    return result


async def paced(contestant: Contestant, count: int, per_second: float, stream: bool) -> Load:
    """``count`` requests at fixed times, whatever became of those before: an open loop.

    A request's latency counts from the time it was due, so that a server which falls behind is not spared.
    """
    loop, result, request = asyncio.get_running_loop(), Load(), contestant.request(stream)
    idle: list[Link] = []
    begin = time.perf_counter() + 0.01

    async def one(due: float) -> None:
        link = idle.pop() if idle else None
        if link is None or link.lost:
            _, link = await loop.create_connection(Link, "127.0.0.1", contestant.port)
        status = await link.ask(request)
        if status == 200:
            result.latency_s.append(time.perf_counter() - due)
        result.statuses[status] = result.statuses.get(status, 0) + 1
        idle.append(link)

    before, under_way = contestant.cpu_s() if contestant.process else 0.0, set[asyncio.Task[None]]()
    for at in range(count):
        due = begin + at / per_second
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        under_way.add(task := loop.create_task(one(due)))
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    result.wall_s = time.perf_counter() - begin
    result.cpu_s = contestant.cpu_s() - before if contestant.process else 0.0
    for link in idle:
        link.transport.close()
    return result


def machine() -> dict[str, Any]:
    """Where it ran."""
    return {**here(), "python": platform.python_version()}


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
