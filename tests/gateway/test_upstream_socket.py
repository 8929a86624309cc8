"""A refusal that an upstream sends before it has read the call, and closes: it is answered and charged as the refusal it is."""

import asyncio
import contextlib
import json
import select
import socket
import ssl
import subprocess
import sys
import threading

import pytest

from anabranch.gateway.dispatch.upstream import Upstream
from anabranch.gateway.dispatch.upstream_beside import BESIDE_BYTES, UpstreamBeside
from anabranch.gateway.dispatch.upstream_socket import UpstreamSocket, upstream_socket
from anabranch.gateway.providers.http_call import read_all
from anabranch.gateway.providers.provider import HttpCall
from anabranch.gateway.store import LedgerQuery, open_store
from gateway_process import call, served

REFUSAL = json.dumps({"error": {"message": "no", "type": "x", "code": None}}).encode()
# Other systems may drop what came before a reset.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a system that keeps what came before a reset")

LARGE = b"x" * (BESIDE_BYTES + (1 << 19))


@contextlib.contextmanager
def refusing(status, *more, context=None):
    """A server, in a thread of its own, that reads no more than the head. Gives its port, and a list of the calls it got."""
    lines = (f"HTTP/1.1 {status} X", "content-type: application/json", "connection: close", *more)
    answer = "\r\n".join((*lines, f"content-length: {len(REFUSAL)}", "", "")).encode() + REFUSAL
    listener, calls = socket.create_server(("127.0.0.1", 0), backlog=64), []

    def serve():
        while True:
            try:
                link = listener.accept()[0]
            except OSError:
                return
            # What waits for an acknowledgement when it closes would never go out.
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError), link if context is None else context.wrap_socket(link, True) as link:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += link.recv(4096)
                calls.append(head)
                link.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], calls
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextlib.contextmanager
def reset(answer):
    """A socket to which ``answer`` was sent, and then that the other side is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", listener.getsockname())
        with upstream_socket(address) as link:
            link.connect(listener.getsockname())
            link.setblocking(False)
            other = listener.accept()[0]
            link.send(b"never read")
            assert select.select([other], [], [], 10)[0]
            other.sendall(answer)
            other.close()
            watch = select.poll()
            watch.register(link, 0)
            assert watch.poll(10_000)
            yield link


WRITES = {
    "send": lambda link: link.send(memoryview(bytearray(b"abcdefgh")).cast("I")),
    "sendmsg": lambda link: link.sendmsg(iter((b"abc", memoryview(b"defgh")))),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_came_before_a_reset_is_there_to_be_read_and_then_the_reset_is_told(write):
    with reset(b"the answer") as link:
        assert isinstance(link, UpstreamSocket)
        assert [write(link) for _ in range(3)] == [8, 8, 8]
        assert link.recv(3) == b"the"
        assert write(link) == 8
        assert link.recv(100) == b" answer"
        with pytest.raises(ConnectionError):
            write(link)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_reset_before_which_nothing_came_is_told_at_once(write):
    with reset(b"") as link, pytest.raises(ConnectionError):
        write(link)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_go_out_as_ever(write):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with upstream_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ())) as link:
            link.connect(listener.getsockname())
            other = listener.accept()[0]
            with other:
                assert write(link) == 8
                assert other.recv(100) == b"abcdefgh"
                link.setblocking(False)
                writes = iter(lambda: link.send(bytes(1 << 20)), 0)
                with pytest.raises(BlockingIOError):
                    list(writes)


def answers(transport, url, body, times):
    async def one():
        reply = await transport.open(HttpCall(url, {}, body))
        return reply.status, reply.headers.get("retry-after"), await read_all(reply)

    async def main():
        try:
            return [await asyncio.wait_for(one(), 60) for _ in range(times)]
        finally:
            await transport.close()

    return asyncio.run(main())


@pytest.mark.parametrize("make", [Upstream, UpstreamBeside])
@pytest.mark.parametrize("size", [len(LARGE), 6_000_000])
def test_a_refusal_ahead_of_the_body_is_the_answer(make, size):
    with refusing(429, "retry-after: 7") as (port, calls):
        found = answers(make(), f"http://127.0.0.1:{port}/", b"x" * size, 10)
    assert found == [(429, "7", REFUSAL)] * 10
    assert len(calls) == 10


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    """A server's context, and a client's that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {certificate} -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run(["openssl", *made.split(), *names], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs the command openssl, which makes a certificate")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)


def test_a_refusal_ahead_of_the_body_is_the_answer_over_tls(encrypted, monkeypatch):
    server, client = encrypted
    # aiohttp's own, of what the system trusts.
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", client)
    with refusing(413, context=server) as (port, _):
        found = answers(UpstreamBeside(), f"https://localhost:{port}/", LARGE, 10)
    assert found == [(413, None, REFUSAL)] * 10


MODEL = """
[[models]]
name = "{status}"
max_tokens = 100
price = {{input_usd = 1, output_usd = 1}}
deployments = [{{provider = {{kind = "openai", model = "m", base_url = "http://127.0.0.1:{port}", key_env = ""}}}}]
"""


def test_through_the_front_door_a_refusal_ahead_of_the_body_costs_nothing_and_is_not_tried_again(tmp_path):
    store, path = tmp_path / "g.db", tmp_path / "g.toml"
    with refusing(413) as (large, refused), refusing(429, "retry-after: 90") as (busy, put_off):
        models = MODEL.format(status=413, port=large) + MODEL.format(status=429, port=busy)
        path.write_text(f'store = "{store}"\nrequire_key = false\n{models}')
        with served("--config", str(path)) as gateway:
            for status, wait in ((413, None), (429, "90")):
                body = {"model": str(status), "messages": [{"role": "user", "content": LARGE.decode()}]}
                found, _, headers = call(gateway.url, "POST", "/v1/chat/completions", body)
                assert (found, headers["retry-after"], headers["x-route-attempts"]) == (status, wait, "1")
        assert len(refused) == len(put_off) == 1
    rows = ledger(store)
    assert [(row.status, row.code, row.attempts, row.cost_nano) for row in rows] == [
        ("error", "rate_limit_exceeded", 1, 0),
        ("error", "context_length_exceeded", 1, 0),
    ]
    assert all(row.reserved_nano > len(LARGE) * 1000 for row in rows)


def ledger(path):
    async def read():
        async with open_store(str(path)) as store:
            return await store.ledger(LedgerQuery(limit=10))

    return asyncio.run(read())
