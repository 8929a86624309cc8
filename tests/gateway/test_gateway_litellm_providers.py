"""Moving in from LiteLLM: providers of clouds with all that an entry says of them, and settings, each as what it is here."""

import pytest
import yaml

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config import import_litellm
from anabranch.routers.money import Price
from gateway_litellm import clear

AZURE = {"model": "azure/chat-eu", "api_base": "https://acme.openai.azure.com", "api_key": "os.environ/EU_KEY"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    clear(monkeypatch)


@pytest.fixture
def moved(tmp_path):
    """What a table of LiteLLM's becomes."""

    def move(*entries, **sections):
        models = [{"model_name": f"m{at}", "litellm_params": entry} for at, entry in enumerate(entries)]
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"model_list": models, **sections}))
        return import_litellm(path)

    return move


def provider(done):
    [model] = done.config.models
    made = to_dict(model.deployments[0].provider)
    default = to_dict(type(model.deployments[0].provider)(model="", **NEEDED.get(made["kind"], {})))
    return {name: value for name, value in made.items() if name == "kind" or value != default[name]}


NEEDED = {"azure": {"base_url": "https://x"}}


@pytest.mark.parametrize(
    ("entry", "made"),
    [
        (
            AZURE | {"api_version": "2025-01-01-preview"},
            {
                "kind": "azure",
                "model": "chat-eu",
                "base_url": AZURE["api_base"],
                "key_env": "EU_KEY",
                "api_version": "2025-01-01-preview",
            },
        ),
        (
            {"model": "azure/c", "api_base": "https://x.y", "azure_ad_token": "os.environ/TOKEN"},
            {"kind": "azure", "model": "c", "base_url": "https://x.y", "key_env": "TOKEN", "auth": "token"},
        ),
        (
            {"model": "azure/c", "api_base": "https://x.openai.azure.com"},
            {"kind": "azure", "model": "c", "base_url": "https://x.openai.azure.com", "key_env": "AZURE_API_KEY"},
        ),
        (
            {
                "model": "bedrock/converse/anthropic.claude-3-haiku-20240307-v1:0",
                "aws_region_name": "eu-west-3",
                "aws_access_key_id": "os.environ/ID",
                "aws_secret_access_key": "os.environ/SECRET",
                "aws_session_token": "os.environ/SESSION",
                "guardrailConfig": {"guardrailIdentifier": "g", "guardrailVersion": "1"},
            },
            {
                "kind": "bedrock",
                "model": "anthropic.claude-3-haiku-20240307-v1:0",
                "region": "eu-west-3",
                "access_key_env": "ID",
                "secret_key_env": "SECRET",
                "session_token_env": "SESSION",
                "guardrail": {"guardrailIdentifier": "g", "guardrailVersion": "1"},
            },
        ),
        (
            {"model": "bedrock/us-west-2/meta.llama3-8b-instruct-v1:0", "aws_profile_name": "work"},
            {"kind": "bedrock", "model": "meta.llama3-8b-instruct-v1:0", "region": "us-west-2", "profile": "work"},
        ),
        (
            {
                "model": "bedrock/x",
                "model_id": "arn:aws:bedrock:eu-west-3:1:inference-profile/eu.x",
                "aws_region_name": "eu-west-3",
                "aws_bedrock_runtime_endpoint": "https://vpce.example.com",
                "api_key": "os.environ/BEARER",
            },
            {
                "kind": "bedrock",
                "model": "arn:aws:bedrock:eu-west-3:1:inference-profile/eu.x",
                "region": "eu-west-3",
                "base_url": "https://vpce.example.com",
                "key_env": "BEARER",
            },
        ),
        (
            {
                "model": "vertex_ai/gemini-2.5-pro",
                "vertex_project": "acme-1",
                "vertex_location": "europe-west4",
                "vertex_credentials": "/keys/vertex.json",
            },
            {
                "kind": "vertex",
                "model": "gemini-2.5-pro",
                "project": "acme-1",
                "location": "europe-west4",
                "credentials_file": "/keys/vertex.json",
            },
        ),
        (
            {"model": "vertex_ai/gemini/4711", "vertex_project": "acme-1", "vertex_credentials": "os.environ/ACCOUNT"},
            {"kind": "vertex", "model": "endpoints/4711", "project": "acme-1", "credentials_env": "ACCOUNT"},
        ),
        ({"model": "gemini/gemini-2.5-flash"}, {"kind": "gemini", "model": "gemini-2.5-flash"}),
        (
            {"model": "ollama_chat/qwen3:8b", "api_base": "http://gpu:11434", "keep_alive": -1, "num_ctx": 8192},
            {
                "kind": "ollama",
                "model": "qwen3:8b",
                "base_url": "http://gpu:11434",
                "keep_alive": "-1",
                "num_ctx": 8192,
            },
        ),
        ({"model": "ollama/llama3"}, {"kind": "ollama", "model": "llama3"}),
        (
            {
                "model": "openrouter/qwen/qwen3-32b",
                "extra_body": {"provider": {"sort": "price"}, "models": ["b"], "usage": {"include": True}},
            },
            {"kind": "openrouter", "model": "qwen/qwen3-32b", "routing": {"sort": "price"}, "models": ["b"]},
        ),
    ],
)
def test_what_an_entry_says_of_its_provider_is_kept(moved, entry, made):
    done = moved(entry)
    assert provider(done) == made
    assert done.left == ()


def test_an_address_of_ones_own_is_not_sent_the_providers_key(moved):
    """It may be anybody's."""
    for model in ("openai/a", "anthropic/a"):
        own = moved({"model": model, "api_base": "http://10.0.0.5:8000/v1"}).config.models[0].deployments[0].provider
        theirs = moved({"model": model}).config.models[0].deployments[0].provider
        assert own.key_env is None
        assert theirs.key_env in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")


def test_prices_of_clouds_are_kept(moved):
    done = moved(AZURE | {"input_cost_per_token": 2.5e-6, "output_cost_per_token": 0.00001})
    assert done.config.models[0].price == Price(input=2_500_000_000, output=10_000_000_000)


def test_what_the_environment_says_is_read_for_the_import(moved, monkeypatch):
    for name, value in {
        "OWN": "https://own.example.com",
        "AWS_REGION": "eu-west-3",
        "VERTEXAI_PROJECT": "acme-1",
    }.items():
        monkeypatch.setenv(name, value)
    done = moved(
        {"model": "azure/c", "api_base": "os.environ/OWN"},
        {"model": "bedrock/x"},
        {"model": "vertex_ai/gemini-2.5-pro"},
    )
    assert done.left == ()
    azure, bedrock, vertex = (model.deployments[0].provider for model in done.config.models)
    assert (azure.base_url, bedrock.region, vertex.project) == ("https://own.example.com", "eu-west-3", "acme-1")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"model": "azure/c"}, "api_base is missing"),
        ({"model": "azure/c", "api_base": "os.environ/OWN"}, "OWN is not set now"),
        ({"model": "openai/c", "api_base": "os.environ/OWN"}, "OWN is not set now"),
        ({"model": "azure/c", "api_base": "https://u:p@x"}, "user or password"),
        ({"model": "bedrock/x"}, "aws_region_name is missing"),
        ({"model": "vertex_ai/gemini-2.5-pro"}, "vertex_project is missing"),
        ({"model": "vertex_ai/claude-sonnet-4@20250514", "vertex_project": "a-1"}, "none of Google's own"),
        ({"model": "ollama/x", "keep_alive": "soon"}, "cannot be taken over"),
    ],
)
def test_an_entry_that_would_go_elsewhere_is_not_taken(moved, entry, why):
    with pytest.raises(ConfigError, match=why):
        moved(entry)


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        (AZURE | {"api_key": "sk-hush"}, "api_key is a key written into the file (not shown)"),
        (AZURE | {"client_secret": "hush"}, "client_secret has no counterpart"),
        (
            {"model": "bedrock/x", "aws_region_name": "eu-west-3", "aws_role_name": "r"},
            "aws_role_name has no counterpart",
        ),
        (
            {"model": "vertex_ai/gemini-2.5-pro", "vertex_project": "a-1", "vertex_credentials": '{"key": "hush"}'},
            "vertex_credentials are written into the file (not shown)",
        ),
        ({"model": "openrouter/x", "extra_body": {"transforms": ["a"]}}, "extra_body.transforms has no counterpart"),
        ({"model": "gemini/x", "vertex_project": "a-1"}, "vertex_project has no counterpart"),
    ],
)
def test_what_of_an_entry_is_left_out_is_said(moved, entry, left):
    done = moved(entry)
    assert len(done.left) == 1
    assert left in done.left[0]
    assert "hush" not in str((done.left, to_dict(done.config)))


# Settings

THREE = ({"model": "openai/a"}, {"model": "openai/b"}, {"model": "openai/c"})


def test_fallbacks_for_long_prompts_and_refusals_are_for_those_alone(moved):
    done = moved(
        *THREE,
        litellm_settings={
            "fallbacks": [{"m0": ["m1"]}],
            "context_window_fallbacks": [{"m0": ["m2"]}],
            "content_policy_fallbacks": [{"m1": ["m2", "gone"]}],
        },
    )
    config = done.config
    assert config.fallbacks == {"m0": ("m1",)}
    assert config.context_fallbacks == {"m0": ("m2",)}
    assert config.filter_fallbacks == {"m1": ("m2",)}
    assert ["'gone'" in line for line in done.left] == [True]


def test_settings_that_have_a_counterpart(moved):
    done = moved(
        *THREE[:1],
        THREE[1] | {"stream_timeout": 3, "max_parallel_requests": 2},
        router_settings={
            "allowed_fails": 2,
            "cooldown_time": 30,
            "stream_timeout": 7,
            "default_max_parallel_requests": 9,
            "enable_pre_call_checks": True,
            "num_retries": 0,
            "timeout": 45,
        },
        general_settings={
            "global_max_parallel_requests": 77,
            "max_request_size_mb": 2,
            "store_prompts_in_spend_logs": True,
            "maximum_spend_logs_retention_period": "36h",
        },
    )
    config = done.config
    assert done.left == ()
    assert (config.breaker.failures, config.breaker.window_s, config.breaker.open_s) == (3, 60.0, 30.0)
    assert (config.retries.attempts, config.deadline_s) == (1, 120.0)
    one, two = (model.deployments[0] for model in config.models)
    assert one.timeout_s == two.timeout_s == 45.0
    assert (one.first_token_timeout_s, one.max_in_flight) == (7.0, 9)
    assert (two.first_token_timeout_s, two.max_in_flight) == (3.0, 2)
    assert (config.limits.in_flight, config.limits.body_bytes) == (77, 2 << 20)
    assert (config.log.prompts, config.log.keep_days) == (True, 2)
    assert config.require_key is False


@pytest.mark.parametrize(
    ("section", "name", "value", "why"),
    [
        ("litellm_settings", "drop_params", True, "never left out silently"),
        ("litellm_settings", "max_budget", 100, "anabranch gateway budget set global"),
        ("litellm_settings", "cache", True, "cache.exact"),
        ("router_settings", "redis_password", "x", "is a part of shared.url"),
        ("router_settings", "cooldown_time", -1, "no number above 0"),
        ("router_settings", "enable_pre_call_checks", False, "has no counterpart"),
        ("router_settings", "model_group_alias", {"x": []}, "no model that was taken over"),
        ("general_settings", "maximum_spend_logs_retention_period", "soon", "no period such as 7d"),
        ("general_settings", "master_key", "os.environ/MASTER", "get 401"),
    ],
)
def test_settings_that_have_none_are_said(moved, section, name, value, why):
    done = moved(THREE[0], **{section: {name: value}})
    assert any(why in line and f"{section}.{name}" in line for line in done.left)


def test_with_a_master_key_requests_need_keys(moved):
    done = moved(THREE[0], general_settings={"master_key": "os.environ/MASTER"})
    assert (done.config.require_key, done.config.admin.key) == (True, "env:MASTER")


@pytest.mark.parametrize(
    ("entry", "speed"),
    [
        ({"model": "groq/llama-3.1-8b-instant"}, 2000.0),
        ({"model": "cerebras/gpt-oss-120b"}, 6000.0),
        ({"model": "openai/x", "api_base": "https://api.groq.com/openai/v1"}, 2000.0),
        # Somebody's own.
        ({"model": "groq/x", "api_base": "http://gpu:8000/v1"}, None),
        ({"model": "openai/gpt-4o"}, None),
        ({"model": "anthropic/claude-sonnet-4-20250514"}, None),
    ],
)
def test_what_is_faster_than_is_usual_is_declared_so(moved, entry, speed):
    """Nothing was, and streams of it that were left cost less than their bill (F5 of R20c)."""
    done = moved(entry)
    assert not done.left
    [model] = done.config.models
    assert model.deployments[0].output_speed == speed
