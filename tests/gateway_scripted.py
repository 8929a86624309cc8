"""An upstream of any kind that says what a test wrote, by the first part of the path; and a gateway in front of it."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gateway_process import served

# Content type, and all bytes of the body; or what makes them of the request's body.
Said = tuple[int, str, bytes]


def whole(value: Any, status: int = 200) -> Said:
    """JSON."""
    return status, "application/json", json.dumps(value).encode()


def sse(*events: Any) -> Said:
    """A stream of events: bytes as they are, others as JSON."""
    pieces = (one if isinstance(one, bytes) else b"data: " + json.dumps(one).encode() + b"\n\n" for one in events)
    return 200, "text/event-stream", b"".join(pieces)


@contextlib.contextmanager
def scripted(answers: dict[str, Said | Callable[[dict[str, Any]], Said]]) -> Iterator[str]:
    """Its URL, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            said = answers[self.path.split("/")[1]]
            status, kind, sent = said(json.loads(body)) if callable(said) else said
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def model(name: str, kind: str, url: str, upstream: str = "m", **fields: Any) -> dict[str, Any]:
    """A model of the configuration whose answers are those under its name."""
    provider = {"kind": kind, "model": upstream, "base_url": f"{url}/{name}", **fields}
    return {"name": name, "deployments": [{"provider": provider}]}


@contextlib.contextmanager
def fronted(folder: Any, models: list[dict[str, Any]], environment: dict[str, str], **fields: Any) -> Iterator[Any]:
    """A gateway process that serves such models."""
    path = folder / "gateway.json"
    store = str(folder / "gateway.db")
    settings = {"models": models, "retries": {"attempts": 1}, "store": store, "require_key": False, **fields}
    path.write_text(json.dumps(settings))
    with served("--config", str(path), environment=environment) as running:
        running.store = store
        yield running
