"""Who is there: both ends of a connection prove that they know the secret of the run, without sending it.

    caller -> HELLO     {version, purpose, nonce, ...}
    called -> CHALLENGE {nonce, proof: HMAC(secret, "called" ...)}        refuses here whom it does not want
    caller -> PROOF     {proof: HMAC(secret, "caller" ...)}
    called -> WELCOME   {...}

Proofs cover the purpose and both nonces, so none fits another connection. A run without a secret does the same with an empty one: then
everybody is let in who can reach the port. What follows on the connection is not encrypted: over networks that others can read or write,
put the peers into a private network (WireGuard, a VPC) first.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from typing import Any

from anabranch.cluster.pccl.faults import Refused
from anabranch.cluster.pccl.times import HANDSHAKE_S
from anabranch.cluster.pccl.wire import (
    MOST_HELLO,
    VERSION,
    Frame,
    Kind,
    WireError,
    packed,
    receive_frame,
    send_all,
    word,
)

SECRET_NAME = "ANABRANCH_CLUSTER_SECRET"


def run_secret(given: str | None) -> bytes:
    """The secret of a run: what was given, or what the environment's ANABRANCH_CLUSTER_SECRET says; empty for none."""
    return (os.environ.get(SECRET_NAME, "") if given is None else given).encode()


def proof(secret: bytes, side: str, hello: dict[str, Any], nonce: str) -> str:
    """What one side shows of the secret: of this connection alone."""
    told = json.dumps(
        [VERSION, side, hello.get("purpose"), hello.get("run"), hello.get("nonce"), nonce], separators=(",", ":")
    )
    return hmac.new(secret, told.encode(), hashlib.sha256).hexdigest()


class Called:
    """The called side's part, a frame at a time; for loops that wait for nobody.

    Attributes:
        hello: what the caller said, once it has proved itself.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret, self._nonce = secret, secrets.token_hex(16)
        self._heard: dict[str, Any] | None = None
        self.hello: dict[str, Any] | None = None

    def answer(self, frame: Frame) -> bytes:
        """What to send back; nothing when `hello` stands. Raises WireError for a caller that is none of ours."""
        if self._heard is None and frame.kind == Kind.HELLO:
            word(frame.body, "purpose", 32)
            if len(word(frame.body, "nonce", 64)) < 16:
                raise WireError("a nonce that is too short")
            if frame.body.get("version") != VERSION:
                raise WireError(f"version {frame.body.get('version')!r:.20}, and this is version {VERSION}")
            self._heard = frame.body
            shown = proof(self._secret, "called", self._heard, self._nonce)
            return packed(Kind.CHALLENGE, {"nonce": self._nonce, "proof": shown})
        if self._heard is not None and frame.kind == Kind.PROOF:
            expected = proof(self._secret, "caller", self._heard, self._nonce)
            if not hmac.compare_digest(expected.encode(), word(frame.body, "proof", 128).encode()):
                raise WireError("another secret")
            self.hello = self._heard
            return b""
        raise WireError(f"a {frame.kind.name} before the connection has proved itself")


def call(sock: socket.socket, secret: bytes, hello: dict[str, Any], deadline: float) -> dict[str, Any]:
    """The caller's part, to the end. Returns the body of the welcome.

    Raises Refused where the other end refuses or does not know the secret, OSError and WireError where it is gone or none of ours.
    """
    said = {"version": VERSION, "nonce": secrets.token_hex(16), **hello}
    send_all(sock, packed(Kind.HELLO, said), deadline)
    # Whoever it is has proved nothing yet.
    answer = _expected(receive_frame(sock, deadline, MOST_HELLO), Kind.CHALLENGE)
    nonce = word(answer, "nonce", 64)
    expected = proof(secret, "called", said, nonce)
    if not hmac.compare_digest(expected.encode(), word(answer, "proof", 128).encode()):
        raise Refused("the other end does not know the secret of this run")
    send_all(sock, packed(Kind.PROOF, {"proof": proof(secret, "caller", said, nonce)}), deadline)
    return _expected(receive_frame(sock, deadline), Kind.WELCOME)


def _expected(frame: Frame, kind: Kind) -> dict[str, Any]:
    if frame.kind == Kind.REFUSED:
        raise Refused(str(frame.body.get("why", "refused"))[:500])
    if frame.kind != kind:
        raise WireError(f"a {frame.kind.name} where a {kind.name} was due")
    return frame.body


def take(sock: socket.socket, secret: bytes) -> dict[str, Any]:
    """The called side's part for a thread that may wait: the hello of a caller that has proved itself. The welcome is the caller's to send.

    Raises WireError, OSError; one that does not know the secret is told so.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    called = Called(secret)
    while called.hello is None:
        try:
            answer = called.answer(receive_frame(sock, deadline, MOST_HELLO))
        except WireError as error:
            send_all(sock, packed(Kind.REFUSED, {"why": str(error)}), deadline)
            raise
        if answer:
            send_all(sock, answer, deadline)
    return called.hello
