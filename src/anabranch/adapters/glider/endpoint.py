"""Instructions and vectors of texts by an endpoint that speaks OpenAI's API, such as `anabranch serve` and `anabranch gateway serve`.

writer = ChatWriter("http://127.0.0.1:8000/v1", "SmolLM2-135M-Instruct")
pool = GliderPool.load("adapters", writer=writer)                                   # instructions of queries; or pool.add(examples=...)
pool = GliderPool.load("adapters", embedder=EndpointEmbedder("http://127.0.0.1:8000/v1", "nomic-embed-text-v1.5"))
"""
# Shapes: N texts, D dimensions

import http.client
import json
import os
import queue
import re
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import ConfigError, DataError
from anabranch.files import parse_json
from anabranch.redaction import HIDDEN, hide_passwords

__all__ = ["ChatWriter", "EndpointEmbedder"]

# Of an answer, texts of one call, and a time that systems can wait for.
_MOST_BYTES, _MOST_TEXTS, _MOST_SECONDS = 64 << 20, 128, 1_000_000
# Of what an error says of itself.
_LONGEST = 400
_ROLE = (
    "You describe tasks. In one or two sentences, describe the task that the user's text is of and the skills that it takes. Write it as "
    "an instruction. Do not name a data set, and do not do the task."
)


class _Call:
    """The socket of one call, which whoever no longer waits for the answer can end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_over = False

    def begin(self, connection: http.client.HTTPConnection) -> None:
        """Connect. Raises TimeoutError where nobody waits any more, and OSError."""
        connection.connect()
        with self._lock:
            if self._is_over:
                raise TimeoutError
            # A descriptor of its own: the other's number may be another connection's by the time that this one is ended.
            self._socket = socket.socket(fileno=socket.dup(connection.sock.fileno()))

    def end(self) -> None:
        """Whoever reads from the socket, or writes to it, does so no more."""
        with self._lock:
            self._is_over = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                self._socket.close()
                self._socket = None


class _Endpoint:
    """Where calls go.

    Args:
        url: up to and with the version, ``http://127.0.0.1:8000/v1``. No proxy is asked, whatever the environment says.
        model: its name there.
        key_env: environment variable that holds the key; None for an endpoint that wants none.
        timeout_s: of a call, from its beginning to the last byte of its answer.

    Raises ConfigError for what is no such address, and for a variable that is not set, or holds what no header may.
    """

    def __init__(self, url: str, model: str, *, key_env: str | None = None, timeout_s: float = 60.0) -> None:
        try:
            parts = urlsplit(url)
            is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            is_one = is_one and not (parts.query or parts.fragment or "@" in parts.netloc) and url.isprintable()
        except ValueError:
            is_one = False
        if not is_one:
            raise ConfigError(f"the endpoint is {shown(_without_secrets(url))}; write http://HOST:PORT/v1")
        if not model:
            raise ConfigError(f"no model is named at the endpoint {url}; name the one that is asked")
        if not (0 < timeout_s <= _MOST_SECONDS):
            raise ConfigError(f"timeout_s is {timeout_s}; it must be above 0 and at most {_MOST_SECONDS:,}")
        self.url, self.model, self.timeout_s = url.rstrip("/"), model, timeout_s
        self.name = self.url
        self._key = None if key_env is None else os.environ.get(key_env)
        if key_env is not None and not self._key:
            raise ConfigError(f"the key of {self.name} is to be in {key_env}, which is not set")
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"{key_env} holds what no header may: a line end, or a letter beyond ASCII; set it to the key of {self.name} alone"
            )

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, an object. Raises DataError, without the key, for any other, and for one that is not whole in time."""
        told: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        call = _Call()

        def ask() -> None:
            try:
                told.put(self._asked(call, path, body))
            except Exception as error:
                told.put(error)

        # A socket's time is for each of its reads, and there is no end to an answer that comes byte by byte.
        threading.Thread(target=ask, name="anabranch endpoint", daemon=True).start()
        try:
            found = told.get(timeout=self.timeout_s)
        except queue.Empty:
            raise self._late() from None
        finally:
            call.end()
        if isinstance(found, Exception):
            raise found
        return found

    def _late(self) -> DataError:
        return DataError(f"{self.name} did not answer within {self.timeout_s:g} seconds")

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None, "the address was looked at"
        kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        # With a port, as an IPv6 address alone would be parted at its last colon.
        found: http.client.HTTPConnection = kind(
            parts.hostname, parts.port or kind.default_port, timeout=self.timeout_s
        )
        return found

    def _asked(self, call: _Call, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connection = self._connection()
        try:
            call.begin(connection)
            connection.request("POST", urlsplit(self.url).path + path, json.dumps(body).encode(), headers)
            with connection.getresponse() as answer:
                # Nobody is sent elsewhere: a key is for the address that was told.
                if not 200 <= answer.status < 300:
                    said = " ".join(self._without_key(_reason(answer)).split())[:_LONGEST]
                    raise DataError(f"{self.name} answers {answer.status}: {said}")
                data = answer.read(_MOST_BYTES + 1)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise DataError(f"cannot reach {self.name}: {error}") from None
        except (http.client.HTTPException, ValueError):
            raise DataError(f"{self.name} does not speak HTTP") from None
        finally:
            connection.close()
        if len(data) > _MOST_BYTES:
            raise DataError(f"{self.name} answers with more than {_MOST_BYTES >> 20} MiB")
        try:
            found = parse_json(data.decode("utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DataError(f"{self.name} does not answer {path} with a JSON object")
        return found

    def _without_key(self, text: str) -> str:
        """What an endpoint says may repeat what it was told, in JSON too. Before it is cut: half a key is none to be found."""
        if not self._key:
            return text
        for form in (self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1], " ".join(self._key.split())):
            text = text.replace(form, HIDDEN)
        return text


class ChatWriter(_Endpoint):
    """Writes instructions: one or two sentences on the task that a text is of, by a chat without sampling.

    A query is sent as it is, and so is what `prompt_of` makes of examples. Arguments are those of the endpoint: its ``url``, the ``model``
    there, ``key_env`` and ``timeout_s``; and ``max_tokens``, of an instruction.
    """

    def __init__(self, url: str, model: str, *, max_tokens: int = 128, **options: Any) -> None:
        super().__init__(url, model, **options)
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; an instruction has at least one")
        self.max_tokens = max_tokens

    def __call__(self, text: str) -> str:
        """The instruction. Raises DataError where the endpoint gives none."""
        messages = [{"role": "system", "content": _ROLE}, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}
        found = self.post("/chat/completions", body)
        try:
            said = found["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            said = None
        if not isinstance(said, str) or not said.strip():
            raise DataError(f"{self.name} wrote no instruction: {self._without_key(json.dumps(found))[:_LONGEST]}")
        return " ".join(self._without_key(said).split())


class EndpointEmbedder(_Endpoint):
    """Makes vectors of texts; its arguments are those of the endpoint."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]``. Raises DataError where the endpoint gives anything else than a vector for each text, of one size."""
        made: list[np.ndarray] = []
        for first in range(0, len(texts), _MOST_TEXTS):
            given = list(texts[first : first + _MOST_TEXTS])
            found = self.post("/embeddings", {"model": self.model, "input": given, "encoding_format": "float"})
            made += self._vectors(found, len(given))
        if len({len(vector_D) for vector_D in made}) > 1:
            raise DataError(f"{self.name} gives vectors of {sorted({len(vector_D) for vector_D in made})} numbers")
        return np.stack(made) if made else np.zeros((0, 1), np.float32)

    def _vectors(self, found: dict[str, Any], count: int) -> list[np.ndarray]:
        data: Any = found.get("data")
        try:
            by_place = {one["index"]: np.asarray(one["embedding"], np.float32) for one in data}
        # Whole numbers of hundreds of digits are JSON, too.
        except (LookupError, TypeError, ValueError, OverflowError):
            by_place = {}
        vectors = [by_place.get(place) for place in range(count)]
        if len(by_place) != count or any(
            vector_D is None or vector_D.ndim != 1 or not len(vector_D) or not np.isfinite(vector_D).all()
            for vector_D in vectors
        ):
            raise DataError(f"{self.name} does not give a vector of finite numbers for each of {count} texts")
        return [vector_D for vector_D in vectors if vector_D is not None]


def _reason(answer: http.client.HTTPResponse) -> str:
    try:
        return str(parse_json(answer.read(1 << 16))["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return answer.reason


def _without_secrets(url: str) -> str:
    """What an address that is none may be told by: keys stand in queries, too."""
    return re.sub(r"(?s)(?<=[?#]).+", HIDDEN, hide_passwords(url, is_url=True))
