"""Moving in from LiteLLM: what is taken over, field by field, and that everything else is said."""

import json

import pytest

from anabranch import registry
from anabranch.config import configclass, from_dict, to_dict
from anabranch.errors import ConfigError, DataError
from anabranch.gateway.config import GatewayConfig, import_litellm, load_config
from anabranch.gateway.config.price_table import list_price
from anabranch.gateway.config.prices import deployment_price
from anabranch.gateway.providers import Provider
from anabranch.routers.money import Price
from gateway_litellm import clear

THEIRS = """\
model_list:
  - model_name: gpt-4o-mini
    litellm_params:
      model: openai/gpt-4o-mini
      api_key: os.environ/OPENAI_KEY_EAST
      rpm: 500
      tpm: 90000
      weight: 2
    model_info:
      input_cost_per_token: 1.5e-7
      output_cost_per_token: 0.0000006
      cache_read_input_token_cost: 0.000000075
      max_input_tokens: 128000
      max_output_tokens: 16384
  - model_name: gpt-4o-mini
    litellm_params:
      model: gpt-4o-mini
      api_base: http://10.0.0.5:8000/v1
      api_key: sk-written-down
      timeout: 20
      stream_timeout: "5"
      max_parallel_requests: 8
      temperature: 0.2
  - model_name: claude
    litellm_params: {model: claude-sonnet-4-5, api_key: os.environ/ANTHROPIC_API_KEY}
  - model_name: local
    litellm_params: {model: hosted_vllm/qwen, api_base: "http://gpu:8000/v1"}
  - model_name: titan
    litellm_params: {model: sagemaker/titan}
  - model_name: "any/*"
    litellm_params: {model: "openai/*"}
  - model_name: nowhere
    litellm_params: {model: hosted_vllm/llama}
  - model_name: films
    litellm_params: {model: openai/sora-2}
    model_info: {mode: video_generation}
  - litellm_params: {model: openai/x}
router_settings:
  routing_strategy: least-busy
  num_retries: 2
  timeout: 60
  fallbacks:
    - gpt-4o-mini: [claude, titan]
    - gone: [claude]
  model_group_alias: {gpt-4: gpt-4o-mini, gpt-5: gone}
  redis_host: localhost
litellm_settings:
  num_retries: 7
  drop_params: true
general_settings:
  master_key: os.environ/LITELLM_MASTER_KEY
  database_url: postgresql://user:hush@db/litellm
environment_variables:
  REDIS_PASSWORD: hush
"""


class Anthropic(Provider, kind="anthropic"):
    """As much of the real one as an import sets."""

    @configclass
    class Config(Provider.Config):
        base_url: str = "https://api.anthropic.com"
        key_env: str | None = "ANTHROPIC_API_KEY"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    clear(monkeypatch)
    monkeypatch.setitem(registry.BUILTIN["provider"], "anthropic", f"{__name__}:Anthropic")
    registry.resolve.cache_clear()
    yield
    registry.resolve.cache_clear()


@pytest.fixture
def moved(tmp_path):
    def move(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return import_litellm(path)

    return move


def test_what_is_taken_over(moved):
    config = moved(THEIRS).config
    assert [model.name for model in config.models] == ["gpt-4o-mini", "claude", "local"]
    mini, claude, local = config.models
    assert mini.price == Price(input=150_000_000, output=600_000_000, cached_input=75_000_000)
    assert (mini.context, mini.max_tokens, mini.aliases) == (144_384, 16_384, ("gpt-4",))
    east, own = mini.deployments
    assert (east.rpm, east.tpm, east.weight, east.timeout_s) == (500, 90_000, 2.0, 60.0)
    assert to_dict(east.provider)["kind"] == "openai"
    assert (east.provider.model, east.provider.key_env) == ("gpt-4o-mini", "OPENAI_KEY_EAST")
    assert east.provider.base_url == "https://api.openai.com/v1"
    assert (own.timeout_s, own.first_token_timeout_s, own.max_in_flight) == (20.0, 5.0, 8)
    assert (own.provider.base_url, own.provider.key_env) == ("http://10.0.0.5:8000/v1", None)
    assert to_dict(claude.deployments[0].provider)["kind"] == "anthropic"
    assert claude.deployments[0].provider.key_env == "ANTHROPIC_API_KEY"
    assert (local.deployments[0].provider.model, local.deployments[0].provider.key_env) == ("qwen", None)
    assert (config.balance, config.retries.attempts, config.deadline_s) == ("least_in_flight", 3, 360.0)
    assert config.fallbacks == {"gpt-4o-mini": ("claude",)}
    assert config.admin.key == "env:LITELLM_MASTER_KEY"
    assert config.shared.url == "redis://localhost:6379/0"


def test_what_is_not_is_said(moved, tmp_path):
    left = moved(THEIRS).left
    path = tmp_path / "config.yaml"
    fields = [line.removeprefix(f"{path}:").partition(": ")[2].split()[0] for line in left]
    assert fields == [
        "model_list.1.litellm_params.api_key",
        "model_list.1.litellm_params.temperature",
        "model_list.4.litellm_params.model",
        "model_list.5.model_name",
        "model_list.6.litellm_params.api_base",
        "model_list.7.model_info.mode",
        "model_list.8",
        "litellm_settings.drop_params",
        "router_settings.model_group_alias.gpt-5",
        "router_settings.fallbacks.0.gpt-4o-mini",
        "router_settings.fallbacks.1.gone",
        "general_settings.master_key",
        "general_settings.database_url",
        "environment_variables.REDIS_PASSWORD",
    ]
    assert f"{path}:19: model_list.1.litellm_params.api_key is a key written into the file (not shown)" in left[0]
    shown = "\n".join(left)
    assert "sk-written-down" not in shown
    assert "hush" not in shown


def test_it_reads_back_as_ours(moved, tmp_path, monkeypatch):
    """What was imported, written as JSON, loads as the same config."""
    for name in ("OPENAI_KEY_EAST", "ANTHROPIC_API_KEY", "LITELLM_MASTER_KEY"):
        monkeypatch.setenv(name, "x")
    done = moved(THEIRS)
    (tmp_path / "ours.json").write_text(json.dumps(done.to_dict()))
    assert load_config(tmp_path / "ours.json") == done.config.replace(store=str(tmp_path / "gateway.db"))
    assert from_dict(GatewayConfig, json.loads(json.dumps(done.to_dict()))) == done.config


def test_files_with_nothing_to_take(moved, tmp_path):
    with pytest.raises(ConfigError, match="no entry of model_list can be taken over; it is empty"):
        moved("router_settings: {}\n")
    with pytest.raises(ConfigError, match="there is no provider 'sagemaker' here"):
        moved("model_list:\n  - model_name: a\n    litellm_params: {model: sagemaker/a}\n")
    with pytest.raises(ConfigError, match="model_list is no list"):
        moved("model_list: {a: 1}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: not YAML"):
        moved("model_list: [\n")
    with pytest.raises(DataError, match="cannot read the config"):
        import_litellm(tmp_path / "none.yaml")


def test_a_master_key_written_down_is_not_taken(moved):
    done = moved(
        "model_list: [{model_name: a, litellm_params: {model: openai/a}}]\ngeneral_settings: {master_key: sk-1234}\n"
    )
    assert done.config.admin.key is None
    assert "sk-1234" not in str(done.left)
    assert done.config.models[0].deployments[0].provider.key_env == "OPENAI_API_KEY"


AZURE = """\
model_list:
  - model_name: a
    litellm_params: {model: azure/our-own, api_base: "https://x.openai.azure.com", api_key: os.environ/K, max_tokens: 2000}
    model_info: {base_model: azure/gpt-4o, id: east, max_output_tokens: 16384, max_input_tokens: 1000}
  - model_name: a
    litellm_params: {model: openai/gpt-4o-mini, api_key: os.environ/K}
    model_info: {id: 7}
"""


def test_what_a_model_is_based_on_says_what_it_costs(moved):
    done = moved(AZURE)
    assert done.left == ()
    (model,) = done.config.models
    east, other = model.deployments
    assert east.price == list_price("https://x.openai.azure.com", "gpt-4o")
    assert (east.price.input, east.price.output) == (2_500_000_000, 10_000_000_000)
    # The other has its own in the list, which is not that of the first.
    assert model.price is other.price is None
    assert deployment_price(model, other).input < east.price.input
    assert (east.name, other.name) == ("east", "7")
    assert (model.max_tokens, model.context) == (2000, 17_384)
    assert done.unpriced == ()


@pytest.mark.parametrize("base", ["gpt-4o", "azure/eu/gpt-4o", "openai/gpt-4o"])
def test_a_base_model_is_known_however_it_is_written(moved, base):
    done = moved(AZURE.replace("base_model: azure/gpt-4o", f"base_model: {base}"))
    assert done.config.models[0].deployments[0].price.input == 2_500_000_000


def test_a_base_model_that_is_not_in_the_list_and_ids_that_are_there_twice_are_said(moved):
    text = AZURE.replace("base_model: azure/gpt-4o", "base_model: azure/nobody").replace("id: 7", "id: east")
    done = moved(text)
    assert len(done.left) == 3
    assert "model_info.base_model is 'azure/nobody', which the price list that ships does not know" in done.left[0]
    assert all("model_info.id is 'east', which another deployment is called too" in line for line in done.left[1:])
    assert [one.name for one in done.config.models[0].deployments] == ["", ""]
    assert "has no price" in done.unpriced[0]


def test_a_price_of_an_entry_comes_before_its_base_model(moved):
    done = moved(AZURE.replace("max_tokens: 2000", "input_cost_per_token: 0.000001"))
    # What it does not say of answers is as the base model's.
    assert done.config.models[0].deployments[0].price == Price(input=1_000_000_000, output=10_000_000_000)


ALONE = "model_list:\n- model_name: a\n  litellm_params: {{model: {model}, api_key: os.environ/K, {price}}}\n  model_info: {info}\n"


@pytest.mark.parametrize(
    ("model", "price", "info", "found"),
    [
        ("openai/gpt-4o", "input_cost_per_token: 0.000002", "{}", Price(input=2 * 10**9, output=10**10)),
        ("openai/gpt-4o", "output_cost_per_token: 0.000002", "{}", Price(input=2_500_000_000, output=2 * 10**9)),
        (
            "openai/gpt-4o",
            "cache_read_input_token_cost: 0.000001",
            "{}",
            Price(input=2_500_000_000, output=10**10, cached_input=10**9),
        ),
        ("openai/my-own", "input_cost_per_token: 0.000002", "{mode: embedding}", Price(input=2 * 10**9)),
        # The list knows better than a mode.
        (
            "openai/gpt-4o",
            "input_cost_per_token: 0.000002",
            "{mode: embedding}",
            Price(input=2 * 10**9, output=10**10),
        ),
        # What is less than can be counted.
        (
            "openai/my-own",
            "input_cost_per_token: 1.0e-17, output_cost_per_token: 1.0e-17",
            "{}",
            Price(input=1, output=1),
        ),
        ("openai/my-own", "input_cost_per_token: null", "{input_cost_per_token: 0, output_cost_per_token: 0}", Price()),
        ("openai/my-own", "input_cost_per_token: 0.000002", "{}", "but no output_cost_per_token, and the price list"),
        ("openai/my-own", "input_cost_per_token: 0", "{}", "but no output_cost_per_token, and the price list"),
        ("openai/my-own", "output_cost_per_token: 0.000002", "{}", "but no input_cost_per_token, and the price list"),
        ("openai/my-own", "output_cost_per_token: 0.000002", "{mode: embedding}", "but no input_cost_per_token, and"),
        (
            "openai/my-own",
            "input_cost_per_image_token: 0.000002",
            "{}",
            "but no input_cost_per_token and no output_cost_per_token, and",
        ),
        ("openai/my-own", "input_cost_per_token: 0.000002, output_cost_per_token: -1", "{}", "but no output_cost"),
    ],
)
def test_what_an_entry_does_not_say_of_its_price_is_not_free(moved, model, price, info, found):
    done = moved(ALONE.format(model=model, price=price, info=info))
    if isinstance(found, Price):
        assert done.config.models[0].price == found
        assert (done.left, done.unpriced) == ((), ())
    else:
        assert found in done.left[-1]
        assert done.config.models[0].price is None
        assert "has no price" in done.unpriced[0]


def test_a_deployment_without_a_price_is_not_given_that_of_another(moved):
    entry = "- model_name: a\n  litellm_params: {{model: {}, api_key: os.environ/K}}\n  model_info: {}\n"
    free = "{input_cost_per_token: 0, output_cost_per_token: 0}"
    one, two = entry.format("openai/my-own", free), entry.format("openai/gpt-4o", "{}")
    for first, second, free_at in ((one, two, 0), (two, one, 1)):
        (model,) = moved("model_list:\n" + first + second).config.models
        prices = [deployment_price(model, each) for each in model.deployments]
        assert prices[free_at].is_free
        assert prices[1 - free_at].output == 10**10


def test_a_deployment_of_which_nobody_knows_a_price_has_the_dearest_of_its_model(moved):
    entry = "- model_name: a\n  litellm_params: {{model: hosted_vllm/x, api_base: 'http://{}/v1'}}\n  model_info: {}\n"
    price = "{{input_cost_per_token: {0}e-6, output_cost_per_token: {0}e-6}}"
    text = (
        "model_list:\n"
        + "".join(entry.format(f"h{at}", price.format(at)) for at in (1, 3, 2))
        + entry.format("h", "{}")
    )
    (model,) = moved(text).config.models
    assert [deployment_price(model, one).output // 10**9 for one in model.deployments] == [1, 3, 2, 3]
    # What is free somewhere may cost something elsewhere.
    text = "model_list:\n" + entry.format("h0", price.format(0)) + entry.format("h", "{}")
    done = moved(text)
    assert "has no price" in done.unpriced[0]


@pytest.mark.parametrize(
    ("router", "url", "left"),
    [
        ("{redis_url: os.environ/REDIS}", "env:REDIS", []),
        ("{redis_url: 'redis://cache:7/2'}", "redis://cache:7/2", []),
        ("{redis_host: cache, redis_port: 7}", "redis://cache:7/0", []),
        ("{redis_url: os.environ/REDIS, redis_password: os.environ/P}", "env:REDIS", ["redis_password"]),
        ("{redis_host: cache, redis_password: hush}", None, ["redis_host", "redis_password"]),
        ("{redis_url: 'redis://:hush@cache:7/2'}", None, ["redis_url"]),
        ("{redis_host: os.environ/HOST}", None, ["redis_host"]),
        ("{redis_url: 'http://cache'}", None, ["redis_url"]),
        ("{redis_host: 'a b/c@', redis_port: [1]}", None, ["redis_host", "redis_port"]),
        ("{}", None, []),
        ("null", None, []),
        ("{num_retries: 2}", None, []),
        ("{redis_host: null, redis_port: null}", None, []),
        ("{redis_port: 6379}", None, ["redis_port"]),
        ("{redis_host: cache, redis_port: 99999}", None, ["redis_host", "redis_port"]),
        ("{redis_host: '', redis_port: 6379}", None, ["redis_host", "redis_port"]),
        ("{redis_host: yes}", None, ["redis_host"]),
        ("{redis_url: '', redis_host: cache}", None, ["redis_url", "redis_host"]),
        ("{redis_url: 'rediss://[::1]:7/2?db=3'}", "rediss://[::1]:7/2?db=3", []),
        ("{redis_url: 'unix:///run/redis.sock?db=3'}", "unix:///run/redis.sock?db=3", []),
        # Wherever a password may stand, or what is left of one that was not escaped.
        ("{redis_url: 'redis://cache:7/2?password=hush'}", None, ["redis_url"]),
        ("{redis_url: 'redis://cache:7/2?db=1&p%61ssword=hush'}", None, ["redis_url"]),
        ("{redis_url: 'redis://hush@cache:7/2'}", None, ["redis_url"]),
        ("{redis_url: 'redis://user:12/hush@cache:7/2'}", None, ["redis_url"]),
        ("{redis_url: 'redis://user:12#hush@cache:7/2'}", None, ["redis_url"]),
        ("{redis_url: 'unix://:hush@/run/redis.sock'}", None, ["redis_url"]),
        ("{redis_url: 'redis://cache:99999/2'}", None, ["redis_url"]),
    ],
)
def test_redis_is_where_processes_count_together(moved, router, url, left):
    done = moved(f"{AZURE}router_settings: {router}\n")
    assert "hush" not in json.dumps(done.to_dict())
    assert (done.config.shared and done.config.shared.url) == url
    assert [line.partition("router_settings.")[2].split()[0] for line in done.left] == left
    assert "hush" not in "".join(done.left)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("litellm_settings: {callbacks: [otel, prometheus]}", "litellm_settings.callbacks has 'otel': spans go to"),
        ("litellm_settings: {success_callback: langfuse}", "success_callback has 'langfuse', which has no counterpart"),
        (
            "general_settings: {alerting: [slack]}",
            "general_settings.alerting is of budgets here, which are told by [webhooks",
        ),
    ],
)
def test_what_has_a_counterpart_that_is_set_elsewhere_names_it(moved, text, why):
    (line,) = moved(f"{AZURE}{text}\n").left
    assert why in line


def test_what_cannot_be_read_is_said_in_words(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the config .*: no such file or directory$"):
        import_litellm(tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="it is not UTF-8"):
        import_litellm(tmp_path / "odd.yaml")


@pytest.mark.parametrize(
    ("text", "field", "why"),
    [
        ("  litellm_params: {model: gpt-4o, max_tokens: 0.5}", "litellm_params.max_tokens", "no number from 1 on"),
        ("  litellm_params: {model: gpt-4o, rpm: 0.5}", "litellm_params.rpm", "no number from 1 on"),
        ("  litellm_params: {model: gpt-4o, weight: 0}", "litellm_params.weight", "no number above 0 and"),
        (
            "  litellm_params: {model: gpt-4o}\n  model_info: {max_input_tokens: 1.0e-9}",
            "model_info.max_input_tokens",
            "1 on",
        ),
        (
            "  litellm_params: {model: gpt-4o}\nrouter_settings: {default_max_parallel_requests: 0.1}",
            "router_settings.default_max_parallel_requests",
            "no number from 1 on",
        ),
        (
            "  litellm_params: {model: gpt-4o}\nrouter_settings: {num_retries: -0.5}",
            "router_settings.num_retries",
            "from 0 on",
        ),
        (
            "  litellm_params: {model: gpt-4o}\ngeneral_settings: {max_request_size_mb: 1.0e-9}",
            "general_settings.max_request_size_mb",
            "no number from",
        ),
        (
            "  litellm_params: {model: gpt-4o}\nrouter_settings: {redis_port: 99999}",
            "router_settings.redis_port",
            "is 99999, which is no port",
        ),
    ],
)
def test_a_number_that_would_be_none_is_said_with_its_line(moved, text, field, why):
    done = moved(f"model_list:\n- model_name: a\n{text}\n")
    line = next(one for one in done.left if field in one)
    assert why in line
    assert ".yaml:" in line
    assert len(done.left) <= 2


def test_settings_that_are_null_are_not_given(moved):
    sections = ("litellm_settings", "router_settings", "general_settings")
    names = ("routing_strategy", "fallbacks", "callbacks", "master_key", "database_url", "max_request_size_mb")
    text = "".join(f"{section}: {{{', '.join(f'{name}: null' for name in names)}}}\n" for section in sections)
    without, done = moved(AZURE), moved(AZURE + text)
    assert (done.config, done.left, len(done.notes)) == (without.config, (), len(without.notes))


@pytest.mark.parametrize(
    "base",
    ["ftp://joe:hush@gpu:8000/v1", "http://joe:hush@gpu:8000/v1", "http://gpu:8000/v1?key=hush", "ftp://hush@gpu/v1"],
)
def test_an_address_that_is_not_taken_over_is_told_without_its_password(moved, base):
    entry = f"  - model_name: b\n    litellm_params: {{model: hosted_vllm/b, api_base: '{base}'}}\n"
    done = moved(AZURE.replace("model_list:\n", f"model_list:\n{entry}"))
    assert "litellm_params.api_base cannot be taken over" in done.left[0]
    assert "hush" not in "".join(done.left)


def test_metrics_for_prometheus_are_there_anyway(moved):
    assert moved(f"{AZURE}litellm_settings: {{callbacks: [prometheus]}}\n").left == ()
