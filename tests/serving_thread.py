"""A server in a thread of this process, in front of a scripted engine or any other, for tests that speak HTTP to it."""

import asyncio
import contextlib
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from anabranch.data import ByteTokenizer
from anabranch.serving.http.app import App
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.reading import Reader
from fake_engine import FakeEngine, Script
from waiting import until

HELLO = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}


class Serving:
    """A server that answers.

    Attributes:
        url, port: where.
        frontend, app: its parts, which live in the loop of its thread.
        script: of the fake engine.
    """

    def __init__(self, config: HttpConfig, script: Any, reader: Reader) -> None:
        self.config, self.script, self._reader = config, script, reader
        self.loop = asyncio.new_event_loop()
        self._bound = threading.Event()

    def _run(self) -> None:
        self.loop.run_until_complete(self._main())
        self.loop.close()

    async def _main(self) -> None:
        self.frontend = Frontend(self.config, self.script, lambda: self._reader)
        self.app = App(self.frontend)
        self._stop = asyncio.Event()
        server = self.app.server()
        listener = await self.loop.create_server(server, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        starting = self.loop.create_task(self.frontend.start())
        self._bound.set()
        await self._stop.wait()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        listener.close()
        server.pre_shutdown()
        await server.shutdown(0.1)
        await self.frontend.close()

    def on_loop(self, function: Any, *arguments: Any) -> Any:
        """Call it in the server's loop."""

        async def call() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(60)

    @contextlib.contextmanager
    def holds(self) -> Iterator[list[float]]:
        """Processor seconds of this process between two turns of the loop: what held it up, in its own thread or with Python's lock.

        How busy the machine is makes no difference: what waits for a processor uses none, and what other threads may have used while the
        loop's own waited for one is left out.
        """
        found: list[float] = [0.0]
        others = max(1, (os.cpu_count() or 1) - 1)

        async def watch() -> None:
            while True:
                before, starved_s = time.process_time(), _starved_s()
                await asyncio.sleep(0.001)
                found.append(time.process_time() - before - others * (_starved_s() - starved_s))

        watching = asyncio.run_coroutine_threadsafe(watch(), self.loop)
        try:
            yield found
        finally:
            watching.cancel()

    @property
    def engine(self) -> FakeEngine:
        return self.script.made[-1]

    def wait_ready(self) -> None:
        until(lambda: self.frontend.state == "ready")

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, body: JSON where it is. ``_`` in names of headers stands for ``-``."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            if raw is not None:
                given.setdefault("content-type", "application/json")
            link.request(method or ("GET" if raw is None else "POST"), path, raw, given)
            answer = link.getresponse()
            data = answer.read()
            is_json = answer.headers.get("content-type", "").startswith("application/json")
            return answer.status, answer.headers, json.loads(data) if is_json else data
        finally:
            link.close()

    def chat(self, **fields: Any) -> tuple[int, Any, Any]:
        return self.ask("/v1/chat/completions", {**HELLO, **fields})

    def complete(self, **fields: Any) -> tuple[int, Any, Any]:
        return self.ask("/v1/completions", {"model": "fake", "prompt": "hello", **fields})

    def metrics(self) -> dict[str, float]:
        """Value by series."""
        lines = self.ask("/metrics")[2].decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name.removeprefix("anabranch_serving_"): float(value) for name, value in pairs}


@contextlib.contextmanager
def serving(script: Any = None, reader: Reader | None = None, *, wait: bool = True, **config: Any) -> Iterator[Serving]:
    """A server with this engine and config; it is ready unless told not to ``wait``."""
    made = Serving(HttpConfig(**{"access_log": False, **config}), script or Script(), reader or Reader(ByteTokenizer()))
    thread = threading.Thread(target=made._run)
    thread.start()
    try:
        assert made._bound.wait(60)
        if wait:
            made.wait_ready()
        yield made
    finally:
        made.loop.call_soon_threadsafe(made._stop.set)
        thread.join(60)
        assert not thread.is_alive()


def events(raw: bytes) -> list[Any]:
    """JSON of the events of a stream, and the text ``[DONE]``."""
    blocks = [block for block in raw.decode().split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks), blocks
    return [block[6:] if block[6:] == "[DONE]" else json.loads(block[6:]) for block in blocks]


def streamed(raw: bytes, index: int = 0) -> str:
    """The text of a choice of a stream."""
    made = [event for event in events(raw) if event != "[DONE]"]
    parts = [choice for event in made for choice in event.get("choices", ()) if choice["index"] == index]
    return "".join(part.get("text") or (part.get("delta") or {}).get("content") or "" for part in parts)


def _starved_s() -> float:
    """Seconds for which the calling thread could have run and had no processor so far; 0 where the system does not tell."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
