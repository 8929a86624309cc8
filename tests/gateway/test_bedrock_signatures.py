"""Calls of Bedrock are sent and signed as botocore does it, whatever a model is called."""

import asyncio
import functools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.config import from_dict
from anabranch.errors import ConfigError
from anabranch.gateway.dispatch.upstream import Upstream
from anabranch.gateway.providers import Provider, UpstreamRequest
from anabranch.gateway.providers.provider import read_all

pytest.importorskip("botocore")
REGION, ACCESS, SECRET, TOKEN = (
    "eu-west-1",
    "AKIAEXAMPLE000000000",
    "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "FwoGZXIvYXdzEXAMPLE==",
)
ARN = "arn:aws:bedrock:eu-west-1:123456789012:application-inference-profile/a1b2c3"
NAMES = st.text(st.sampled_from("aZ9-._~:/%+@!$&'()*,;= #?[]{}|\\^`\"<>éß中"), min_size=1, max_size=24).filter(
    lambda name: name not in (".", "..")
)


class Heard:
    """A server that takes down what comes to it, byte by byte."""

    async def __aenter__(self):
        self.asked = []
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error):
        self._server.close()
        await self._server.wait_closed()

    async def _take(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.asked.append((head[0].split(" ")[1], headers, body))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()


@functools.cache
def service_of_botocore():
    from botocore.session import get_session

    return get_session().get_service_model("bedrock-runtime")


def path_of_botocore(name):
    """Of its own serializer."""
    from botocore.serialize import create_serializer

    service = service_of_botocore()
    made = create_serializer("rest-json").serialize_to_request(
        {"modelId": name, "messages": []}, service.operation_model("Converse")
    )
    return made["url_path"]


def signature_of_botocore(url, headers, body):
    """Of what came, at the time that it says."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    signed = re.search(r"SignedHeaders=([^,]+)", headers["authorization"])[1].split(";")
    request = AWSRequest("POST", url, {name: headers[name] for name in signed if name != "host"}, body)
    request.context["timestamp"] = headers["x-amz-date"]
    signer = SigV4Auth(Credentials(ACCESS, SECRET, TOKEN), "bedrock", REGION)
    return signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)


def provider_of(name, url, monkeypatch):
    for variable, value in (("A", ACCESS), ("S", SECRET), ("T", TOKEN)):
        monkeypatch.setenv(f"WIRE_{variable}", value)
    fields = {"access_key_env": "WIRE_A", "secret_key_env": "WIRE_S", "session_token_env": "WIRE_T"}
    return from_dict(
        Provider.Config, {"kind": "bedrock", "model": name, "region": REGION, "base_url": url, **fields}
    ).build()


async def heard(names, monkeypatch):
    http = Upstream()
    async with Heard() as server:
        for name in names:
            provider = provider_of(name, server.url, monkeypatch)
            call = provider.build(UpstreamRequest("chat", {"messages": [{"role": "user", "content": "hé"}]}))
            await read_all(await provider.transport(http).open(call))
        await http.close()
        return server.url, server.asked


@settings(max_examples=8, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6))
@example([ARN, "us.anthropic.claude-sonnet-4-20250514-v1:0", "a%2Fb", "a@b$c", "a b", "a/../b"])
def test_what_is_sent_is_what_botocore_sends_and_signs(names):
    with pytest.MonkeyPatch.context() as monkeypatch:
        url, asked = asyncio.run(heard(names, monkeypatch))
    for name, (path, headers, body) in zip(names, asked, strict=True):
        assert path == path_of_botocore(name)
        assert headers["authorization"].endswith(f"Signature={signature_of_botocore(url + path, headers, body)}")
        assert headers["x-amz-security-token"] == TOKEN
        assert json.loads(body)["messages"][0]["content"] == [{"text": "hé"}]


@pytest.mark.parametrize("name", [".", "..", "a\nb", "a\ud800"])
def test_a_name_that_no_path_can_hold_is_refused(name):
    with pytest.raises(ConfigError, match="an id or an ARN"):
        from_dict(Provider.Config, {"kind": "bedrock", "model": name, "region": REGION})
