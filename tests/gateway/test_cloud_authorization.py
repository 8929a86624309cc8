"""Calls that are signed, and tokens that expire: as a server sees them, which works out for itself what it must see."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qs, quote

import pytest

from anabranch.config import from_dict
from anabranch.errors import MissingExtraError
from anabranch.gateway.dispatch.upstream import Upstream
from anabranch.gateway.providers import Provider, UpstreamError, UpstreamRequest
from anabranch.gateway.providers.authorized import Authorized
from anabranch.gateway.providers.provider import Failure, HttpCall, read_all
from recorded_conversations import exchanges

CHAT = UpstreamRequest("chat", {"model": "x", "messages": [{"role": "user", "content": "hi"}]})
ACCESS, SECRET, SESSION = "AKIDEXAMPLE0123", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzEXAMPLE"


@contextlib.contextmanager
def serving(answer):
    """A server that answers each POST with ``answer(path, headers, body)``: a status and an object."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            status, value = answer(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def told(provider, requests=1, between=lambda: None):
    """What the provider's answers say, one after another over one transport; failures as their kind."""

    async def main():
        http = Upstream()
        transport, found = provider.transport(http), []
        try:
            for at in range(requests):
                if at:
                    between()
                try:
                    call = provider.build(CHAT)
                    # As the dispatcher does; what is sent may be billed.
                    call.is_sent = True
                    reply = await transport.open(call)
                    data = await read_all(reply)
                    if reply.status != 200:
                        raise UpstreamError(provider.error(reply.status, reply.headers, data))
                    found.append(provider.parse(CHAT, data).text)
                except UpstreamError as error:
                    found.append((error.failure.kind, call.is_sent))
        finally:
            await http.close()
        return found

    return asyncio.run(main())


# Amazon's signatures


def signature(secret, region, path, headers, signed, body):
    """Signature Version 4, step by step as documented, of what came over the wire."""
    canonical = "\n".join(
        [
            "POST",
            quote(path, safe="/~"),
            "",
            *(f"{name}:{headers[name].strip()}" for name in signed),
            "",
            ";".join(signed),
            hashlib.sha256(body).hexdigest(),
        ]
    )
    date = headers["x-amz-date"]
    scope = f"{date[:8]}/{region}/bedrock/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", date, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret}".encode()
    for part in (date[:8], region, "bedrock", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return scope, hmac.digest(key, text.encode(), "sha256").hex()


def check_signed(path, headers, body):
    """Whether a call is signed as it must be."""
    method, _, rest = headers["authorization"].partition(" ")
    fields = dict(part.strip().split("=", 1) for part in rest.split(","))
    signed = fields["SignedHeaders"].split(";")
    assert method == "AWS4-HMAC-SHA256"
    assert {"host", "x-amz-date"} <= set(signed)
    scope, wanted = signature(SECRET, "eu-west-3", path, headers, signed, body)
    assert fields["Credential"] == f"{ACCESS}/{scope}"
    return fields["Signature"] == wanted


@pytest.mark.parametrize(
    "model", ["us.anthropic.claude-sonnet-4-20250514-v1:0", "arn:aws:bedrock:eu-west-3:1:inference-profile/eu.x"]
)
@pytest.mark.parametrize("has_session", [False, True])
def test_amazon_sees_the_signature_that_it_works_out(monkeypatch, model, has_session):
    pytest.importorskip("botocore")
    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
    for name, value in {"OWN_ACCESS": ACCESS, "OWN_SECRET": SECRET, "OWN_SESSION": SESSION}.items():
        monkeypatch.setenv(name, value)
    seen = []

    def answer(path, headers, body):
        seen.append(headers)
        if not check_signed(path, headers, body):
            return 403, {"__type": "InvalidSignatureException", "message": "no"}
        return 200, exchanges("bedrock")[1]["reply"]["json"]

    with serving(answer) as url:
        fields = {"session_token_env": "OWN_SESSION"} if has_session else {}
        provider = from_dict(
            Provider.Config,
            {
                "kind": "bedrock",
                "model": model,
                "region": "eu-west-3",
                "base_url": url,
                "access_key_env": "OWN_ACCESS",
                "secret_key_env": "OWN_SECRET",
                **fields,
            },
        ).build()
        # The contract: what is built is not signed, and so always the same.
        assert "authorization" not in provider.build(CHAT).headers
        assert told(provider, 2) == ["It rains in Ghent."] * 2
    assert [headers.get("x-amz-security-token") for headers in seen] == [SESSION if has_session else None] * 2


TOKEN = "IQoJb3JpZ2luX2VjEJr//////////wEaCXVzLWVhc3QtMSJHMEUCIQDabcdefgEXAMPLE"
QUOTED = (
    "The request signature we calculated does not match the signature you provided.\n\nThe Canonical String for this "
    "request should have been\n'POST\n/model/x/converse\n\ncontent-type:application/json\nhost:h\n"
    f"x-amz-date:20260101T000000Z\nx-amz-security-token:{TOKEN}\n\nhost;x-amz-date\n{'ab' * 32}'"
)


@pytest.mark.parametrize(
    ("message", "secrets"),
    [
        (QUOTED, [TOKEN, "ab" * 32]),
        # Cut off, as long messages are, and with what is before it lost.
        (f"... {TOKEN[:20]}", [TOKEN[:20]]),
        (json.dumps({"raw": f"\n{TOKEN[:30]}"}), [TOKEN[:30]]),
        (f"... {TOKEN[30:]} is expired", [TOKEN[30:]]),
        (json.dumps({"raw": QUOTED}), [TOKEN, "ab" * 32]),
        (f"Credential={ACCESS}/20260101/eu-west-3, Signature={'12ef' * 16}", [ACCESS, "12ef" * 4]),
        (f"no user of {ACCESS}, nor of AKIAIOSFODNN7EXAMPLE: {SECRET}", [ACCESS, "AKIAIOSFODNN7EXAMPLE", SECRET]),
        (
            f"https://h/?X-Amz-Security-Token={quote(TOKEN, safe='')}&X-Amz-Signature=12ef",
            [quote(TOKEN, safe=""), "12ef"],
        ),
        (f"x-amz-security-token: {'other' * 9}", ["other"]),
        (f"token_{TOKEN}_is_old", [TOKEN]),
    ],
)
def test_what_calls_are_signed_with_is_told_to_nobody(monkeypatch, message, secrets):
    pytest.importorskip("botocore")
    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
    for name, value in {"OWN_ACCESS": ACCESS, "OWN_SECRET": SECRET, "OWN_SESSION": TOKEN}.items():
        monkeypatch.setenv(name, value)
    names = {"access_key_env": "OWN_ACCESS", "secret_key_env": "OWN_SECRET", "session_token_env": "OWN_SESSION"}
    with serving(lambda *_: (403, {"__type": "InvalidSignatureException", "message": message})) as url:
        table = {"kind": "bedrock", "model": "x.y", "region": "eu-west-3", "base_url": url, **names}
        provider = from_dict(Provider.Config, table).build()

        async def main():
            upstream = Upstream()
            try:
                reply = await provider.transport(upstream).open(provider.build(CHAT))
                return provider.error(reply.status, reply.headers, await read_all(reply))
            finally:
                await upstream.close()

        failure = asyncio.run(main())
    assert (failure.kind, "[key]" in failure.message) == ("auth", True)
    for secret in secrets:
        assert secret not in failure.message
    words = "The request signature we calculated does not match the signature you provided."
    assert (words in failure.message) == (words in message)


def test_without_credentials_nothing_is_sent(monkeypatch):
    pytest.importorskip("botocore")
    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
    monkeypatch.setenv("OWN_ACCESS", ACCESS)
    monkeypatch.delenv("OWN_SECRET", raising=False)
    config = {"kind": "bedrock", "model": "m", "region": "eu-west-3", "base_url": "http://127.0.0.1:1"}
    own = {**config, "access_key_env": "OWN_ACCESS", "secret_key_env": "OWN_SECRET"}
    assert told(from_dict(Provider.Config, own).build()) == [("auth", False)]


@pytest.mark.parametrize(("kind", "module"), [("bedrock", "botocore"), ("vertex", "google.auth")])
def test_without_its_extra_a_provider_says_which(monkeypatch, kind, module):
    from anabranch import extras

    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
    monkeypatch.setattr(extras, "is_installed", lambda name: name != module)
    fields = {"bedrock": {"region": "eu-west-3"}, "vertex": {"project": "p-1"}}[kind]
    provider = from_dict(Provider.Config, {"kind": kind, "model": "m", **fields}).build()
    with pytest.raises(MissingExtraError, match=rf"anabranch\[{kind}\]"):
        provider.transport(Upstream())


# Google's tokens


@pytest.fixture(scope="module")
def rsa():
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    form = serialization.NoEncryption()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, form).decode()
    return key.public_key(), text


class Google:
    """Gives out tokens that live ``lives_s``, for assertions that the account's key signed, and answers who has one."""

    def __init__(self, public):
        self.public, self.lives_s, self.given, self.revoked, self.is_open = public, 3600, 0, set(), True

    def answer(self, path, headers, body):
        if path == "/token":
            return self._token(body)
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token in self.revoked or not token.startswith("ya29.") or token != f"ya29.{self.given}":
            return 401, {"error": {"code": 401, "message": "no", "status": "UNAUTHENTICATED"}}
        return 200, exchanges("vertex")[1]["reply"]["json"]

    def _token(self, body):
        from cryptography.hazmat.primitives.asymmetric import padding
        from cryptography.hazmat.primitives.hashes import SHA256

        if not self.is_open:
            return 400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
        [assertion] = parse_qs(body.decode())["assertion"]
        signed, _, mark = assertion.rpartition(".")
        self.public.verify(base64.urlsafe_b64decode(mark + "=="), signed.encode(), padding.PKCS1v15(), SHA256())
        claims = json.loads(base64.urlsafe_b64decode(signed.split(".")[1] + "=="))
        assert claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"
        assert claims["exp"] > time.time()
        self.given += 1
        return 200, {"access_token": f"ya29.{self.given}", "expires_in": self.lives_s, "token_type": "Bearer"}


@pytest.fixture
def google(rsa, tmp_path, monkeypatch):
    pytest.importorskip("google.auth")
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    server = Google(rsa[0])
    with serving(server.answer) as url:
        account = {
            "type": "service_account",
            "project_id": "acme-1",
            "private_key_id": "1",
            "private_key": rsa[1],
            "client_email": "gateway@acme-1.iam.gserviceaccount.com",
            "client_id": "2",
            "token_uri": f"{url}/token",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("OWN_ACCOUNT", json.dumps(account))
        server.url, server.file = url, str(tmp_path / "account.json")
        yield server


def vertex(google, **fields):
    where = fields or {"credentials_file": google.file}
    table = {"kind": "vertex", "model": "gemini-2.5-flash", "base_url": google.url, **where}
    return from_dict(Provider.Config, table).build()


@pytest.mark.parametrize("is_file", [True, False])
def test_a_token_serves_until_it_ends(google, is_file):
    provider = vertex(google, **({} if is_file else {"credentials_env": "OWN_ACCOUNT"}))
    assert "/projects/acme-1/" in provider.build(CHAT).url
    assert told(provider, 3) == ["It rains in Ghent."] * 3
    assert google.given == 1


def test_a_token_about_to_end_is_replaced_before_the_call(google):
    google.lives_s = 60
    assert told(vertex(google), 3) == ["It rains in Ghent."] * 3
    assert google.given == 3


def test_a_token_that_was_revoked_is_replaced_once(google):
    assert told(vertex(google), 2, lambda: google.revoked.add("ya29.1")) == ["It rains in Ghent."] * 2
    assert google.given == 2
    google.revoked = {f"ya29.{at}" for at in range(9)}
    assert told(vertex(google)) == [("auth", True)]
    assert google.given == 4


def test_no_token_is_a_failure_of_ours_and_nothing_is_sent(google, caplog):
    google.is_open = False
    assert told(vertex(google)) == [("auth", False)]
    assert "invalid_grant" in caplog.text
    assert "PRIVATE KEY" not in caplog.text


def test_the_process_ends_while_a_token_is_waited_for():
    """Whoever fetches it may be told nothing for as long as the other side likes."""
    program = """
import asyncio, threading
from anabranch.gateway.providers.authorized import Authorized
from anabranch.gateway.providers.provider import HttpCall
begun = asyncio.Event()
async def main():
    loop = asyncio.get_running_loop()
    def hang(call):
        loop.call_soon_threadsafe(begun.set)
        threading.Event().wait()
    waiting = asyncio.ensure_future(Authorized(None, hang).open(HttpCall("http://x", {}, b"")))
    await begun.wait()
    waiting.cancel()
asyncio.run(main())
print("ended")
"""
    # Without end before: the limit is that of a test that hangs.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_who_gave_up_is_passed_over_and_a_fault_is_that_calls_alone():
    asked, go = [], Event()

    def headers(call):
        asked.append(call.url)
        go.wait()
        if call.url == "bad":
            raise UpstreamError(Failure(kind="auth", message="no"))
        return {}

    class Http:
        async def open(self, call):
            return type("Reply", (), {"status": 200})()

    async def main():
        transport = Authorized(Http(), headers)
        calls = [asyncio.ensure_future(transport.open(HttpCall(url, {}, b""))) for url in ("a", "left", "bad", "b")]
        while not asked:
            await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.sleep(0)
        go.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one).__name__ for one in found] == ["Reply", "CancelledError", "UpstreamError", "Reply"]
        # And after a time when there was nothing to do.
        await transport.open(HttpCall("later", {}, b""))

    asyncio.run(main())
    assert asked == ["a", "bad", "b", "later"]


def test_headers_are_made_one_call_after_another():
    """Many calls at once ask for one token: each sees what the one before it got."""
    running, most, made = 0, 0, []

    def headers(call):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1
        made.append(call.url)
        return {"authorization": call.url}

    class Http:
        async def open(self, call):
            assert call.headers["authorization"] == call.url
            return type("Reply", (), {"status": 200})()

    async def main():
        transport = Authorized(Http(), headers)
        await asyncio.gather(*(transport.open(HttpCall(f"u{at}", {"a": "b"}, b"")) for at in range(8)))

    asyncio.run(main())
    assert (most, sorted(made)) == (1, [f"u{at}" for at in range(8)])
