"""Addresses in a config: each is taken, or told by a ConfigError; none is a fault inside."""

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.config import from_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config import import_litellm
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.observe import OtelConfig
from anabranch.gateway.config.prices import unpriced
from anabranch.gateway.providers.openai import check_url

# As templates have it, and what else an address is not.
BROKEN = [
    "https://[your-resource].openai.azure.com/",
    "https://[your-host]/v1",
    "http://[::1:8000/v1",
    "http://::1]:8000/v1",
    "http://a:99999999/v1",
    "http://a:port/v1",
    "http://a\u2100b/v1",
    "http://",
    "",
]
# By kind, what else it needs.
KINDS = {
    "openai": {},
    "azure": {"key_env": "K"},
    "anthropic": {},
    "bedrock": {"region": "eu-west-3"},
    "gemini": {},
    "vertex": {"project": "p-1"},
    "ollama": {},
    "openrouter": {},
}
URLS = st.builds(
    "".join,
    st.lists(
        st.sampled_from(
            [*"[]:/@?#.%-\\ \n", "https://", "http://", "a.b", "openai.azure.com", "::1", "99999", "\u2100"]
        )
        | st.text(max_size=3),
        max_size=8,
    ),
) | st.builds("https://{}".format, st.text(max_size=20))


@pytest.mark.parametrize("url", BROKEN)
def test_what_is_no_address_is_told(url):
    with pytest.raises(ConfigError, match=r"base_url is .* must be a URL such as"):
        check_url("base_url", url)


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://[::1]:8000/v1", "http://10.0.0.5:65535"])
def test_an_address_is_taken(url):
    check_url("base_url", url)


def test_a_password_in_what_is_no_address_is_not_shown():
    with pytest.raises(ConfigError) as raised:
        check_url("base_url", "https://user:hush@[your-host]/v1")
    assert "hush" not in str(raised.value)


def made(read):
    """What is read, or None for a ConfigError."""
    try:
        return read()
    except ConfigError:
        return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["base_url", "proxy"])
@settings(max_examples=50, deadline=None)
@given(URLS)
@example(BROKEN[0])
def test_any_address_of_a_provider_is_taken_or_told(kind, field, url):
    provider = {"kind": kind, "model": "m", **KINDS[kind], field: url}
    config = {"models": [{"name": "m", "deployments": [{"provider": provider}]}]}
    found = made(lambda: from_dict(GatewayConfig, config))
    # What looks at the address later finds one.
    assert found is None or list(unpriced(found.models)) is not None


@settings(max_examples=50, deadline=None)
@given(URLS)
@example(BROKEN[0])
def test_any_address_of_a_collector_is_taken_or_told(url):
    found = made(lambda: OtelConfig(endpoint=url))
    assert found is None or found.endpoint == url


@pytest.mark.parametrize(
    "entry",
    [
        *({"model": f"{kind}/m"} for kind in ("openai", "azure", "azure_ai", "anthropic", "databricks", "ollama")),
        *({"model": f"{kind}/m"} for kind in ("gemini", "openrouter", "huggingface")),
        {"model": "vertex_ai/gemini-2.5-pro", "vertex_project": "p-1"},
        {"model": "bedrock/m", "aws_region_name": "eu-west-3"},
    ],
    ids=lambda entry: entry["model"],
)
@pytest.mark.parametrize("field", ["api_base", "base_url", "aws_bedrock_runtime_endpoint"])
@settings(max_examples=25, deadline=None)
@given(URLS)
@example(BROKEN[0])
def test_any_address_of_an_entry_of_litellms_is_taken_or_told(tmp_path_factory, entry, field, url):
    path = tmp_path_factory.mktemp("any") / "config.yaml"
    path.write_text(yaml.safe_dump({"model_list": [{"model_name": "m", "litellm_params": entry | {field: url}}]}))
    found = made(lambda: import_litellm(path))
    assert found is None or from_dict(GatewayConfig, found.to_dict()) == found.config
