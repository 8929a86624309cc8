"""`Endpoint`: an address that speaks OpenAI's API, asked over a socket of the standard library.

Endpoint("http://127.0.0.1:8000/v1", "SmolLM2-135M-Instruct").post("/chat/completions", {...})
"""

import http.client
import json
import os
import queue
import re
import socket
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from anabranch.bounds import shown
from anabranch.errors import ConfigError, DataError
from anabranch.files import parse_json
from anabranch.redaction import HIDDEN, hide_passwords

__all__ = ["LONGEST", "Endpoint"]

# Of an answer, and a time that systems can wait for.
_MOST_BYTES, _MOST_SECONDS = 64 << 20, 1_000_000
# Refusals that come before a model is at work; what was broken off (408, and 499 of some proxies) may have been billed.
_REFUSED = frozenset(range(400, 500)) - {408, 499}
# What may be over in a moment: too many requests, and what a server or a proxy has trouble with.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
# What is about the call and not about who calls: its size, its content; some servers say 500 where a text is longer than their model reads.
_OF_THIS_CALL = frozenset({400, 406, 409, 413, 415, 422, 451, 500})
# Of what an error says of itself.
LONGEST = 400


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


class Endpoint:
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
            # One that climbs is another than it seems.
            is_one = is_one and not {".", ".."} & set(unquote(parts.path).split("/"))
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
        """The answer, an object.

        Raises DataError, without the key, for any other, and for one that is not whole in time. The error is one of a call that nobody
        bills (``is_free``) where no connection was made, and where the endpoint refused what it was sent (4xx); and ``is_transient`` where
        there was no connection, it broke, also in the midst of an answer, or the endpoint has too much to do (429, 5xx), but not where time
        ran out. It is ``is_of_this_call`` where the endpoint refused what was asked (400, 413, 422, ...), or broke over it (500).
        """
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
        connection, is_sent = self._connection(), False
        try:
            call.begin(connection)
            is_sent = True
            connection.request("POST", urlsplit(self.url).path + path, json.dumps(body).encode(), headers)
            with connection.getresponse() as answer:
                # Nobody is sent elsewhere: a key is for the address that was told.
                if not 200 <= answer.status < 300:
                    said = " ".join(self.without_key(_reason(answer)).split())[:LONGEST]
                    refused = DataError(f"{self.name} answers {answer.status}: {said}")
                    refused.is_free = answer.status in _REFUSED
                    refused.is_transient = answer.status in _TRANSIENT
                    refused.is_of_this_call = answer.status in _OF_THIS_CALL
                    raise refused
                data = answer.read(_MOST_BYTES + 1)
                # A part of a body that ends early is read like a whole one.
                if answer.length and len(data) <= _MOST_BYTES:
                    raise http.client.IncompleteRead(data, answer.length)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            unreached = DataError(f"cannot reach {self.name}: {error}")
            unreached.is_free, unreached.is_transient = not is_sent, True
            raise unreached from None
        except http.client.IncompleteRead:
            broken = DataError(f"{self.name} broke off in the midst of its answer")
            broken.is_transient = True
            raise broken from None
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

    def without_key(self, text: str) -> str:
        """What an endpoint says may repeat what it was told, in JSON too. Before it is cut: half a key is none to be found."""
        if not self._key:
            return text
        for form in (self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1], " ".join(self._key.split())):
            text = text.replace(form, HIDDEN)
        return text


def _reason(answer: http.client.HTTPResponse) -> str:
    try:
        return str(parse_json(answer.read(1 << 16))["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return answer.reason


def _without_secrets(url: str) -> str:
    """What an address that is none may be told by: keys stand in queries, too."""
    return re.sub(r"(?s)(?<=[?#]).+", HIDDEN, hide_passwords(url, is_url=True))
