"""Providers of clouds keep the contract of all: each, and the addresses and configs of each."""

import json
from urllib.parse import urlsplit

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.azure import Azure
from anabranch.gateway.providers.bedrock import Bedrock
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.ollama import Ollama
from anabranch.gateway.providers.openrouter import OpenRouter
from anabranch.gateway.providers.vertex import Vertex
from anabranch.testing import check_provider
from cloud_providers import CLAUDE, CONFIGS, chat, data_of, keys, made, recorded
from recorded_conversations import KEY, exchanges

__all__ = ["keys"]
QUOTED = CLAUDE.replace(":", "%3A")
pytestmark = pytest.mark.usefixtures("keys")


@pytest.mark.parametrize("kind", CONFIGS)
def test_contract(kind):
    whole, stream = recorded(kind)
    translates = kind not in ("azure", "openrouter")
    check_provider(
        made(kind).config,
        secret=KEY,
        answer=json.dumps(whole["json"]).encode(),
        text="It rains in Ghent.",
        events=data_of(stream) if translates else (),
    )


@pytest.mark.parametrize("kind", ["amazon.titan-embed-text-v2:0", "cohere.embed-english-v3"])
def test_contract_of_bedrocks_embeddings(kind):
    check_provider(made("bedrock", model=kind).config, secret=KEY)


@pytest.mark.parametrize("kind", ["bedrock", "gemini", "ollama", "vertex"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_stream_put_together_is_the_whole_answer(kind, place):
    found = [one["reply"] for one in exchanges(kind)]
    provider = made(kind)
    translator = provider.translator(chat(stream=True))
    chunks = [chunk for data in data_of(found[2 + place]) for chunk in translator.feed(data)]
    one = assembled(chunks)["choices"][0]
    other = provider.parse(chat(), json.dumps(found[place]["json"]).encode()).body["choices"][0]
    for choice in (one, other):
        ids = [call.pop("id") for call in choice["message"].get("tool_calls", ())]
        for block in choice["message"].get("thinking_blocks", ()):
            block.pop("index", None)
            for id in ids:
                block["signature"] = block["signature"].replace(id, "ID")
        choice["message"]["content"] = choice["message"].get("content") or None
    assert one == other
    assert translator.told == provider.parse(chat(), json.dumps(found[place]["json"]).encode()).usage


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({}, "https://acme.openai.azure.com/openai/deployments/chat%20eu/chat/completions?api-version=2024-10-21"),
        (
            {"api_version": "2025-01-01-preview"},
            "https://acme.openai.azure.com/openai/deployments/chat%20eu/chat/completions?api-version=2025-01-01-preview",
        ),
        ({"api_version": "v1"}, "https://acme.openai.azure.com/openai/v1/chat/completions"),
        ({"api_version": "preview"}, "https://acme.openai.azure.com/openai/v1/chat/completions?api-version=preview"),
        ({"api_version": "v1", "base_url": "https://p/x/openai/v1/"}, "https://p/x/openai/v1/chat/completions"),
    ],
)
def test_azures_addresses(fields, url):
    call = made("azure", **fields).build(chat())
    assert call.url == url
    assert call.headers["api-key"] == KEY


def test_azure_with_a_token_of_entra():
    headers = made("azure", auth="token").build(chat()).headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert "api-key" not in headers


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({}, f"https://bedrock-runtime.us-east-1.amazonaws.com/model/{QUOTED}/converse"),
        ({"region": "cn-north-1"}, f"https://bedrock-runtime.cn-north-1.amazonaws.com.cn/model/{QUOTED}/converse"),
        (
            {"model": "arn:aws:bedrock:eu-west-1:1:inference-profile/eu.x"},
            "https://bedrock-runtime.us-east-1.amazonaws.com/model/arn%3Aaws%3Abedrock%3Aeu-west-1%3A1%3Ainference-profile%2Feu.x/converse",
        ),
    ],
)
def test_bedrocks_addresses(fields, url):
    from yarl import URL

    found = made("bedrock", **fields).build(chat()).url
    assert found == url
    # As botocore writes it; what is signed must be what is sent.
    assert URL(found, encoded=True).raw_path == urlsplit(url).path


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        (
            {"key_env": None},
            "https://us-central1-aiplatform.googleapis.com/v1/projects/acme-1/locations/us-central1/publishers/google/models/gemini-2.5-flash:generateContent",
        ),
        (
            {"key_env": None, "location": "global"},
            "https://aiplatform.googleapis.com/v1/projects/acme-1/locations/global/publishers/google/models/gemini-2.5-flash:generateContent",
        ),
        (
            {"project": None},
            "https://aiplatform.googleapis.com/v1/publishers/google/models/gemini-2.5-flash:generateContent",
        ),
        (
            {"key_env": None, "model": "endpoints/77"},
            "https://us-central1-aiplatform.googleapis.com/v1/projects/acme-1/locations/us-central1/endpoints/77:generateContent",
        ),
    ],
)
def test_vertexs_addresses(fields, url):
    assert made("vertex", **fields).build(chat()).url == url


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: Azure.Config(model="m"), "base_url is empty"),
        (lambda: Azure.Config(model="m", base_url="https://x", api_version="a&b"), "api_version"),
        (lambda: Azure.Config(model="m", base_url="https://x", headers={"api-key": "k"}), "api-key"),
        (lambda: Bedrock(Bedrock.Config(model="m")), "region is not set"),
        (lambda: Bedrock.Config(model="m", region="x.evil.com/"), "region is"),
        (lambda: Bedrock.Config(model="m", access_key_env="A"), "together"),
        (lambda: Gemini.Config(model="../x"), "model is"),
        (lambda: Vertex(Vertex.Config(model="m")), "project is not set"),
        (lambda: Vertex.Config(model="m", location="x/y"), "location is"),
        (lambda: Vertex(Vertex.Config(model="m", credentials_env="NOT_SET")), "NOT_SET is not set"),
        (lambda: Vertex(Vertex.Config(model="m", credentials_file="/none")), "cannot be read"),
        (lambda: Ollama.Config(model="m", keep_alive="soon"), "keep_alive"),
        (lambda: OpenRouter.Config(model="m", base_url="ftp://x"), "base_url"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(config, why):
    with pytest.raises(ConfigError, match=why):
        config()
