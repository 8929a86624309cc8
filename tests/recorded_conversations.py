"""Conversations with providers, as their documentation writes them, played by a server on loopback that checks what it is asked.

A file of ``tests/gateway/conversations`` holds exchanges: a request (path, query, headers, body) and its reply, whose body is one of

    json      one object
    events    server-sent events: objects, ``[DONE]``, and comments, which begin with a colon
    lines     lines of JSON
    raw       bytes in parts, each a little later, of conversations made in a test
    frames    names and payloads of Amazon's event stream

Any other request, header or body is a fault: it is kept, and answered with 418.
"""

import contextlib
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "gateway" / "conversations"
KEY = "sk-test-0123456789abcdef"


def exchanges(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["exchanges"]


def frame(headers: dict[str, str], payload: bytes) -> bytes:
    """A message of Amazon's event stream, by its documentation."""
    named = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack(">II", 16 + len(named) + len(payload), len(named))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + named + payload
    return message + struct.pack(">I", zlib.crc32(message))


def event_frame(name: str, value: Any) -> bytes:
    kind = "exception" if name.endswith("Exception") else "event"
    headers = {f":{kind}-type": name, ":content-type": "application/json", ":message-type": kind}
    return frame(headers, json.dumps(value).encode())


def pieces(reply: dict[str, Any]) -> list[bytes]:
    """The body of a reply, as it comes."""
    if "raw" in reply:
        return list(reply["raw"])
    if "json" in reply:
        return [json.dumps(reply["json"]).encode()]
    if "lines" in reply:
        return [json.dumps(line).encode() + b"\n" for line in reply["lines"]]
    if "frames" in reply:
        return [event_frame(name, value) for name, value in reply["frames"]]
    made = []
    for event in reply["events"]:
        text = event if isinstance(event, str) else json.dumps(event)
        made.append(f"{text}\n\n".encode() if text.startswith(":") else f"data: {text}\r\n\r\n".encode())
    return made


def plain(body: Any) -> Any:
    """A body in which texts that are JSON (arguments of calls) are read: their spaces say nothing."""
    if isinstance(body, dict):
        return {
            name: json.loads(value) if name == "arguments" and isinstance(value, str) else plain(value)
            for name, value in body.items()
        }
    return [plain(one) for one in body] if isinstance(body, list) else body


@dataclass
class Played:
    """A server that plays conversations.

    Attributes:
        url: where, without a slash at the end.
        faults: what was asked that is in no conversation.
        asked: path and query of each request.
        bodies: of each request.
    """

    url: str = ""
    faults: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def played(*conversations: list[dict[str, Any]], key: str = KEY) -> Iterator[Played]:
    """Play these, each request as often as it comes; ``$KEY`` in a header stands for ``key``."""
    told = Played()
    known: dict[str, list[dict[str, Any]]] = {}
    for conversation in conversations:
        for exchange in conversation:
            asked = exchange["request"]
            target = asked["path"] + (f"?{asked['query']}" if asked["query"] else "")
            known.setdefault(target, []).append(exchange)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            told.asked.append(self.path)
            told.bodies.append(body)
            asked = plain(body)
            found = next((one for one in known.get(self.path, []) if plain(one["request"]["body"]) == asked), None)
            fault = self._fault(found, headers, body)
            if fault:
                told.faults.append(fault)
                found = {"reply": {"status": 418, "headers": {}, "json": {"error": {"message": "not recorded"}}}}
            self._play(found["reply"])

        def _fault(self, found: Any, headers: dict[str, str], body: Any) -> str:
            if found is None:
                near = [json.dumps(one["request"]["body"]) for one in known.get(self.path, [])]
                return f"POST {self.path}\n  asked {json.dumps(body)}\n  known " + "\n        ".join(near)
            wanted = {"content-type": "application/json", **found["request"]["headers"]}
            wrong = {
                name: headers.get(name)
                for name, value in wanted.items()
                if headers.get(name) != value.replace("$KEY", key)
            }
            leaked = [name for name in headers if key in headers[name] and name not in wanted]
            return f"POST {self.path}: headers {wrong}, the key in {leaked}" if wrong or leaked else ""

        def _play(self, reply: dict[str, Any]) -> None:
            parts = pieces(reply)
            self.send_response(reply["status"])
            for name, value in reply["headers"].items():
                self.send_header(name, value)
            if "json" in reply:
                self.send_header("content-length", str(len(parts[0])))
                self.end_headers()
                self.wfile.write(parts[0])
                return
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            if "raw" not in reply:
                data = b"".join(parts)
                # Cut where no message ends.
                parts = [data[at : at + 97] for at in range(0, len(data), 97)]
            for at, part in enumerate(parts):
                if at and "raw" in reply:
                    time.sleep(0.05)
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
