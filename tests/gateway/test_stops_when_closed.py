"""Which providers stop making a stream once the connection is closed, as far as that is known."""

import pytest

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.azure import Azure
from anabranch.gateway.providers.bedrock import Bedrock
from anabranch.gateway.providers.engine import Engine
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.local import Local
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.ollama import Ollama
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.openrouter import OpenRouter
from anabranch.gateway.providers.provider import Provider
from anabranch.gateway.providers.recorded import Record, Replay
from anabranch.gateway.providers.vertex import Vertex
from anabranch.routers.money import Price


@pytest.mark.parametrize("kind", [OpenAI, Azure, Anthropic, Ollama, Engine, Local, Mock, Replay])
def test_these_do(kind):
    assert kind.stops_when_closed


@pytest.mark.parametrize("kind", [Provider, Bedrock, Gemini, Vertex, OpenRouter])
def test_these_do_not_or_nobody_knows(kind):
    assert not kind.stops_when_closed


@pytest.mark.parametrize(
    ("base_url", "stops"),
    [
        ("https://api.openai.com/v1", True),
        ("https://api.deepseek.com/v1", True),
        ("http://10.0.0.5:8000/v1", True),
        ("http://gpu/v1", True),
        ("https://notgroq.com/v1", True),
        ("https://groq.com.example.org/v1", True),
        ("https://api.groq.com/openai/v1", False),
        ("https://api.groq.com./openai/v1", False),
        ("https://bedrock-runtime.cn-north-1.amazonaws.com.cn/v1", False),
        ("https://GROQ.com/v1", False),
        ("https://api.mistral.ai/v1", False),
        ("https://generativelanguage.googleapis.com/v1beta/openai", False),
        ("https://bedrock-runtime.eu-west-3.amazonaws.com/openai/v1", False),
        ("https://openrouter.ai/api/v1", False),
    ],
)
def test_of_what_speaks_openai_s_api_the_address_tells(base_url, stops):
    assert OpenAI.Config(model="m", base_url=base_url, key_env=None).build().stops_when_closed is stops
    # Wherever it is, it passes streams on to others.
    assert not OpenRouter.Config(model="m", base_url=base_url, key_env=None).build().stops_when_closed


@pytest.mark.parametrize(
    ("base_url", "stops"),
    [
        ("https://api.anthropic.com", True),
        ("https://openrouter.ai/api", False),
        ("https://api.minimax.io/anthropic", False),
    ],
)
def test_of_what_speaks_anthropic_s_api_likewise(base_url, stops):
    assert Anthropic.Config(model="m", base_url=base_url, key_env=None).build().stops_when_closed is stops


def test_what_is_recorded_is_as_what_it_records(tmp_path):
    for base_url, stops in (("http://gpu/v1", True), ("https://api.groq.com/openai/v1", False)):
        inner = OpenAI.Config(model="m", base_url=base_url, key_env=None)
        made = Record.Config(provider=inner, path=str(tmp_path / "r.jsonl")).build()
        assert made.stops_when_closed is stops


@pytest.mark.parametrize(("said", "stops"), [(None, False), (True, True), (False, False)])
def test_what_the_config_says_is_believed(said, stops):
    provider = OpenAI.Config(model="m", base_url="https://api.groq.com/openai/v1", key_env=None)
    group = Group(
        name="m", deployments=(Deployment(name="d", provider=provider, stops_when_closed=said),), price=Price()
    )
    [live] = Dispatcher([group], DispatchRules(), http=object(), clock=lambda: 0.0).lives()
    assert live.stops_when_closed is stops
