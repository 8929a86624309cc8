"""A gateway as users start it."""

import http.client
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from server_process import SOURCE, Served, started

__all__ = ["SOURCE", "Served", "ask", "call", "mock_config", "served"]


def served(*arguments: str, environment: dict[str, str] | None = None) -> AbstractContextManager[Served]:
    """``anabranch gateway serve`` with these arguments on a free port."""
    return started("gateway", "serve", *arguments, environment=environment)


def call(
    url: str, method: str, path: str, body: Any = None, key: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, Any]:
    """Status, body (read, if it is JSON) and headers of the answer to one request on a connection of its own."""
    link = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        sent = {"authorization": f"Bearer {key}"} if key else {}
        sent |= {} if body is None else {"content-type": "application/json"}
        sent |= headers or {}
        link.request(method, path, None if body is None else json.dumps(body), sent)
        answer = link.getresponse()
        raw = answer.read()
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, json.loads(raw) if is_json else raw.decode(), answer.headers
    finally:
        link.close()


def ask(url: str, text: str = "hello", model: str = "small", **options: Any) -> tuple[int, Any, Any]:
    """A chat of one message; see `call`."""
    sent = {"model": model, "messages": [{"role": "user", "content": text}]}
    return call(url, "POST", "/v1/chat/completions", sent, **options)


def mock_config(path: Path, *, top: str = "", tokens_per_s: int = 1000) -> str:
    """The path of a config file with the model ``small``, the store beside it, and whatever ``top`` has more."""
    path.write_text(
        f"""store = "{path.parent / "gateway.db"}"
{top}
[[models]]
name = "small"
price = {{ input_usd = 1, output_usd = 2 }}
deployments = [{{ provider = {{ kind = "mock", model = "small", tokens = 4, tokens_per_s = {tokens_per_s} }} }}]
"""
    )
    return str(path)
