"""An endpoint of OpenAI's form that answers as a test says."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def vectors(*rows, first=0):
    return {"data": [{"index": first + place, "embedding": row} for place, row in enumerate(rows)]}


@contextmanager
def endpoint(answer):
    """(its address, what it was sent); ``answer(path, body)`` gives (status, bytes or what is JSON, headers)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.path, body, dict(self.headers)))
            status, said, headers = answer(self.path, body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            # Who asked may have left: answers come late, too.
            with suppress(ConnectionError):
                self.send_response(status)
                for name, value in {"content-length": len(data), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
