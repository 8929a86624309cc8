"""An OpenAI-compatible upstream that notes what it is sent."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


class Noting(ThreadingHTTPServer):
    """Answers 200 with `ANSWER`, but first with the statuses in ``failing``.

    Attributes:
        seen: headers (lower case) and body of each request, in order.
        failing: statuses to give before it answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.failing: list[int] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Noting)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        server.seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
        status = server.failing.pop(0) if server.failing else 200
        sent = json.dumps(ANSWER if status == 200 else {"error": {"message": "no", "type": "server_error"}}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@contextlib.contextmanager
def noting() -> Iterator[Noting]:
    """Such an upstream, until the end of the block."""
    with Noting() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
