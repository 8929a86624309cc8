"""A request to an ASGI application, without a server between."""

import asyncio


class Sending:
    """A request whose body comes in pieces, to an application without a server."""

    def __init__(self, app, host, length=None, path="/v1/search"):
        self.pieces, self.status, self.answer = asyncio.Queue(), None, b""
        headers = [(b"content-type", b"application/json")]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": (host, 1),
            "server": ("x", 80),
            "scheme": "http",
            "app": app,
        }
        self.task = asyncio.ensure_future(app(scope, self.pieces.get, self._send))

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.answer += message.get("body", b"")

    async def send(self, body, more=True):
        self.pieces.put_nowait({"type": "http.request", "body": body, "more_body": more})
        # However late this process runs, the application has its turns.
        for _ in range(20):
            await asyncio.sleep(0.0005)
