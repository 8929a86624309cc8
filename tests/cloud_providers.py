"""Providers of clouds as tests make them, and what they make of recorded conversations."""

import json

import pytest

from anabranch.config import from_dict
from anabranch.gateway.providers import Provider, UpstreamRequest
from anabranch.gateway.providers.eventstream import EventStream
from anabranch.gateway.providers.reframed import Lines
from anabranch.gateway.providers.sse import Splitter, events
from recorded_conversations import KEY, exchanges, pieces

CLAUDE = "us.anthropic.claude-sonnet-4-20250514-v1:0"
CONFIGS = {
    "azure": {"model": "chat eu", "base_url": "https://acme.openai.azure.com"},
    "bedrock": {"model": CLAUDE, "region": "us-east-1"},
    "gemini": {"model": "gemini-2.5-flash"},
    "ollama": {"model": "qwen3:8b", "key_env": "OLLAMA_API_KEY"},
    "openrouter": {"model": "qwen/qwen3-32b"},
    "vertex": {"model": "gemini-2.5-flash", "project": "acme-1", "key_env": "VERTEX_KEY"},
}
FRAMERS = {"lines": Lines, "frames": EventStream}


@pytest.fixture
def keys(monkeypatch):
    for name in ("AZURE_OPENAI_API_KEY", "AWS_BEARER_TOKEN_BEDROCK", "GEMINI_API_KEY", "OLLAMA_API_KEY"):
        monkeypatch.setenv(name, KEY)
    for name in ("OPENROUTER_API_KEY", "VERTEX_KEY"):
        monkeypatch.setenv(name, KEY)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def made(kind, **fields):
    return from_dict(Provider.Config, {"kind": kind, **CONFIGS[kind], **fields}).build()


def chat(**fields):
    messages = fields.pop("messages", [{"role": "user", "content": "hi"}])
    return UpstreamRequest("chat", {"model": "x", "messages": messages, **fields})


def sent(kind, *, config=None, **fields):
    """The body that a chat request becomes."""
    return json.loads(made(kind, **(config or {})).build(chat(**fields)).body)


def data_of(reply):
    """Of each event of a stream, as the translator gets it."""
    data = b"".join(pieces(reply))
    kind = next((kind for kind in FRAMERS if kind in reply), None)
    if kind is not None:
        framer = FRAMERS[kind]()
        data = framer.feed(data) + framer.end()
    return [item for _, item in events(Splitter().feed(data))]


def recorded(kind):
    """A whole answer and a stream, both in words."""
    found = [one["reply"] for one in exchanges(kind)]
    return found[1], found[3]
