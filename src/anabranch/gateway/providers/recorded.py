"""Traffic on disk: `Record` writes down what another provider answered, `Replay` answers from it, by the hash of the request.

A file has one JSON object a line, ``{"key", "status", "headers", "body", "seconds"}`` with ``body`` as text.
A line is appended whole or not at all.
"""

import asyncio
import errno
import fcntl
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.gateway.providers.openai import PATHS, unsupported
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    Provider,
    Reply,
    Translator,
    Transport,
    UpstreamError,
    UpstreamRequest,
)

logger = logging.getLogger(__name__)
KEPT_HEADERS = ("content-type", "retry-after")


def request_key(path: str, body: bytes, *, ends: bool = True) -> str:
    """Of what is asked, whatever the order of fields and the name of the model; without ``ends``, whatever the end it asks for too."""
    try:
        fields = json.loads(body)
        fields.pop("model", None)
        fields.pop("stream_options", None)
        if not ends:
            fields.pop("max_tokens", None)
            fields.pop("max_completion_tokens", None)
        asked = json.dumps(fields, sort_keys=True)
    except (ValueError, RecursionError):
        return hashlib.sha256(path.encode() + b"\0" + body).hexdigest()
    return hashlib.sha256(f"{path}\0{asked}".encode()).hexdigest()


class Record(Provider, kind="record"):
    """Passes everything to another provider, and writes down what it answers."""

    @configclass
    class Config(Provider.Config):
        """What to record.

        Attributes:
            provider: whose answers.
            path: JSONL file, appended to; made if it is not there. It holds answers, not requests and no keys.
        """

        provider: Provider.Config
        path: str

        def check(self, *, reads_model: bool = False) -> None:
            """As the other."""
            self.provider.check(reads_model=reads_model)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner: Provider = config.provider.build()
        self.endpoints = self.inner.endpoints  # type: ignore[misc]
        self.makes_on, self.is_inside = self.inner.makes_on, self.inner.is_inside  # type: ignore[misc]
        self.predicts, self.stops_when_closed = self.inner.predicts, self.inner.stops_when_closed
        self.holds_tool_calls = self.inner.holds_tool_calls
        self._file = _Log(Path(config.path))

    def build(self, request: UpstreamRequest) -> HttpCall:
        """As the other."""
        return self.inner.build(request)

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """As the other."""
        return self.inner.parse(request, body)

    def translator(self, request: UpstreamRequest) -> Translator | None:
        """As the other."""
        return self.inner.translator(request)

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """As the other."""
        return self.inner.error(status, headers, body)

    def redacted(self, failure: Failure) -> Failure:
        """As the other."""
        return self.inner.redacted(failure)

    def transport(self, http: Transport) -> Transport:
        """That of the other, listened to."""
        return _Recorder(self.inner.transport(http), self._file)

    async def start(self) -> None:
        """As the other."""
        await self.inner.start()
        self.context, self.counter, self.series = self.inner.context, self.inner.counter, self.inner.series
        self.prompt_tokens = self.inner.prompt_tokens

    @property
    def has_failed(self) -> bool:
        """As the other."""
        return self.inner.has_failed

    async def close(self) -> None:
        """As the other."""
        await self.inner.close()


class _Log:
    """Appends whole lines."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise ConfigError(f"path is {str(path)!r}, but there is no folder {path.parent}")
        self._path = path

    def append(self, row: Json) -> None:
        """Raises nothing: that a recording has no room is no reason to fail a request, and is logged."""
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # So that nobody appends between a short write and its undoing.
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = os.fstat(handle).st_size
                if os.write(handle, line) < len(line):
                    os.ftruncate(handle, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)
        except OSError as error:
            logger.error("an answer was not recorded in %s: %s", self._path, error.strerror or error)


class _Recorder:
    def __init__(self, inner: Transport, file: _Log) -> None:
        self._inner, self._file = inner, file

    async def open(self, call: HttpCall) -> Reply:
        began = time.perf_counter()
        reply = await self._inner.open(call)
        return _Listened(reply, self._file, request_key(_path(call.url), call.body), began)


def _path(url: str) -> str:
    """The endpoint of a URL, wherever the server is."""
    return next((path for path in PATHS.values() if url.endswith(path)), url.rpartition("/")[2])


class _Listened:
    """Keeps what is read, and writes it down at the end."""

    def __init__(self, reply: Reply, file: _Log, key: str, began: float) -> None:
        self._reply, self._file, self._key, self._began = reply, file, key, began
        self.status, self.headers = reply.status, reply.headers
        self._parts: list[bytes] = []
        self._is_written = False

    def read_ready(self) -> bytes:
        data = self._reply.read_ready()
        self._parts.append(data)
        return data

    async def read_some(self) -> bytes:
        data = await self._reply.read_some()
        if data:
            self._parts.append(data)
        elif not self._is_written:
            self._is_written = True
            headers = {name: self.headers[name] for name in KEPT_HEADERS if name in self.headers}
            body = b"".join(self._parts).decode("utf-8", "replace")
            seconds = round(time.perf_counter() - self._began, 6)
            self._file.append(
                {"key": self._key, "status": self.status, "headers": headers, "body": body, "seconds": seconds}
            )
        return data

    def close(self) -> None:
        self._reply.close()


class Replay(Provider, kind="replay"):
    """Answers from a recording."""

    is_billed = False
    stops_when_closed = True

    @configclass
    class Config(Provider.Config):
        """Which.

        Attributes:
            path: JSONL file that `Record` wrote, or `write_answers`.
            provider: in whose form the answers are, as it was recorded (without a key); None for OpenAI's.
            pace: share of the recorded time that an answer takes; 0 answers at once.
        """

        path: str
        provider: Provider.Config | None = None
        pace: float = Field(default=0.0, ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._rows = _read(Path(config.path))
        self._inner: Provider | None = None if config.provider is None else config.provider.build()
        if self._inner is not None:
            self.endpoints = self._inner.endpoints  # type: ignore[misc]

    def build(self, request: UpstreamRequest) -> HttpCall:
        """As for the provider whose form it is; sent to nowhere."""
        if self._inner is not None:
            return self._inner.build(request)
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of {self.kind}")
        return HttpCall(PATHS[request.endpoint], {}, request.encoded(self.config.model, True))

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """As the provider whose form it is."""
        return super().parse(request, body) if self._inner is None else self._inner.parse(request, body)

    def translator(self, request: UpstreamRequest) -> Translator | None:
        """As the provider whose form it is."""
        return None if self._inner is None else self._inner.translator(request)

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """As the provider whose form it is."""
        if self._inner is None:
            return super().error(status, headers, body)
        return self._inner.error(status, headers, body)

    def transport(self, http: Transport) -> Transport:
        """Itself."""
        return _Player(self._rows, self.config.pace)


def _read(path: Path) -> dict[str, list[Json]]:
    rows: dict[str, list[Json]] = {}
    if not path.is_file():
        raise ConfigError(f"no recording at {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.setdefault(row["key"], []).append({**row, "body": row["body"].encode()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise DataError(
                f"{path}, line {number}: no recorded answer (key, status, headers, body, seconds)"
            ) from None
    return rows


class _Player:
    """Gives the answers to one request in the order they were recorded, then the last again.

    A request that names an end (``max_tokens``) and was not recorded is answered as the one without.
    """

    def __init__(self, rows: dict[str, list[Json]], pace: float) -> None:
        self._rows, self._pace = rows, pace
        self._next: dict[str, int] = {}

    async def open(self, call: HttpCall) -> Reply:
        keys = (request_key(_path(call.url), call.body, ends=ends) for ends in (True, False))
        key = next((key for key in keys if key in self._rows), None)
        if key is None:
            raise UpstreamError(Failure(kind="request", message="this request was not recorded", status=404))
        found = self._rows[key]
        at = self._next.get(key, 0)
        self._next[key] = min(at + 1, len(found) - 1)
        if self._pace:
            await asyncio.sleep(self._pace * found[at]["seconds"])
        return _Played(found[at])


class _Played:
    def __init__(self, row: Json) -> None:
        self.status, self.headers, self._body = row["status"], row["headers"], row["body"]

    def read_ready(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def read_some(self) -> bytes:
        return self.read_ready()

    def close(self) -> None:
        self._body = b""


def write_answers(path: str | Path, answers: dict[str, str], tokens: dict[str, tuple[int, int]] | None = None) -> None:
    """A recording made of prompts and what is answered to them, for replaying recorded outcomes through the gateway.

    They answer requests with any ``max_tokens``.

    Args:
        path: of the JSONL file, replaced whole.
        answers: text of the user's only message to the answer.
        tokens: prompt and completion tokens of it; words are counted where they are not given.
    """
    from anabranch.files import atomic_write_text

    lines = []
    for prompt, text in answers.items():
        counted = (tokens or {}).get(prompt, (len(prompt.split()), len(text.split())))
        usage = {"prompt_tokens": counted[0], "completion_tokens": counted[1], "total_tokens": sum(counted)}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = {
            "id": "replay",
            "object": "chat.completion",
            "created": 0,
            "model": "",
            "choices": [choice],
            "usage": usage,
        }
        asked = json.dumps({"messages": [{"role": "user", "content": prompt}]}).encode()
        row = {
            "key": request_key(PATHS["chat"], asked),
            "status": 200,
            "headers": {"content-type": "application/json"},
            "body": json.dumps(body),
            "seconds": 0.0,
        }
        lines.append(json.dumps(row, separators=(",", ":")))
    atomic_write_text(path, "".join(line + "\n" for line in lines))
