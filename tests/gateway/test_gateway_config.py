"""Configs of a gateway: good files in TOML, YAML and JSON, and a table of bad ones, each told with file, line and field."""

import json
from pathlib import Path

import pytest

from anabranch import registry
from anabranch.config import Config, Field, configclass, from_dict, to_dict
from anabranch.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    MissingExtraError,
    TokenizerError,
    UnknownModelError,
)
from anabranch.gateway.config import (
    GatewayConfig,
    LimitsConfig,
    Secret,
    StrategyConfig,
    Target,
    default_config,
    find_target,
    load_config,
    make_strategy,
    names_of,
)
from anabranch.gateway.config.lines import parse
from anabranch.gateway.config.source import told_where
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.run import try_out
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price
from gateway_states import config

GOOD = """\
default_strategy = "fast"
store = "data/gateway.db"
deadline_s = 30

[[models]]
name = "small"
aliases = ["mini"]
price = { input_usd = 0.15, output_usd = "0.6", cached_input_usd = 0.075 }
[[models.deployments]]
provider = { kind = "mock", model = "s", latency_s = 0.1 }
weight = 3
[[models.deployments]]
provider = { kind = "openai", model = "s2", api_key = "env:UPSTREAM_KEY", base_url = "http://10.0.0.5:8000/v1" }

[[models]]
name = "large"
price = { input = 2000000000 }
deployments = [{ provider = { kind = "mock" } }]

[strategies.fast]
kind = "tried"
level = 3
models = ["small"]

[strategies.slow]
use = "tried"
fields = { level = 2, nested = { width = 7 } }

[fallbacks]
small = ["large"]

[admin]
key = "env:ADMIN_KEY"
"""

GOOD_YAML = """\
default_strategy: fast
store: data/gateway.db
deadline_s: 30
models:
  - name: small
    aliases: [mini]
    price: {input_usd: 0.15, output_usd: 0.6, cached_input_usd: 0.075}
    deployments:
      - provider: &mock {kind: mock, model: s, latency_s: 0.1}
        weight: 3
      - provider: {kind: openai, model: s2, api_key: "env:UPSTREAM_KEY", base_url: "http://10.0.0.5:8000/v1"}
  - name: large
    price: {input: 2000000000}
    deployments: [{provider: {<<: *mock, model: "", latency_s: 0.0}}]
strategies:
  fast: {kind: tried, level: 3, models: [small]}
  slow: {use: tried, fields: {level: 2, nested: {width: 7}}}
fallbacks: {small: [large]}
admin: {key: "env:ADMIN_KEY"}
"""


@configclass
class Nested(Config):
    width: int = 1


class Tried(Strategy, kind="tried"):
    """A strategy with a field and a part."""

    @configclass
    class Config(Strategy.Config):
        level: int = Field(default=1, ge=1)
        nested: Nested = Nested()


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setitem(registry.BUILTIN["strategy"], "tried", f"{__name__}:Tried")
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream-secret")
    monkeypatch.setenv("ADMIN_KEY", "admin-secret")
    registry.resolve.cache_clear()
    yield
    registry.resolve.cache_clear()


@pytest.fixture
def read(tmp_path):
    """Write text into a file and load it."""

    def load(text, name="g.toml"):
        (tmp_path / name).write_text(text)
        return load_config(tmp_path / name)

    return load


def test_a_good_file(read, tmp_path):
    config = read(GOOD)
    small, large = config.models
    assert small.price == Price(input=150_000_000, output=600_000_000, cached_input=75_000_000)
    assert large.price == Price(input=2_000_000_000)
    assert [small.deployment_name(0), small.deployment_name(1), large.deployment_name(0)] == [
        "small#0",
        "small#1",
        "large",
    ]
    assert small.deployments[0].provider.latency_s == 0.1
    assert small.deployments[1].provider.key_env == "UPSTREAM_KEY"
    assert config.strategies["fast"] == StrategyConfig(use="tried", fields={"level": 3}, models=("small",))
    assert make_strategy(config.strategies["slow"]).config.nested.width == 7
    assert config.store == str(tmp_path / "data/gateway.db")
    assert (config.default, config.aliases, config.model("mini").name) == ("fast", {"mini": "small"}, "small")
    assert config.pool().names == ("small", "large")
    assert config.require_key


def test_every_form_means_the_same(read, tmp_path):
    config = read(GOOD)
    assert read(GOOD_YAML, "g.yaml") == config == read(GOOD_YAML, "g.yml")
    assert read(json.dumps({**to_dict(config), "store": "data/gateway.db"}, indent=1), "g.json") == config


def test_no_secret_is_in_a_config(read):
    config = read(GOOD)
    for shown in (repr(config), str(config), json.dumps(to_dict(config))):
        assert "upstream-secret" not in shown
        assert "admin-secret" not in shown
    assert config.admin.key.reveal() == "admin-secret"
    assert from_dict(GatewayConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_secrets(tmp_path, monkeypatch):
    from anabranch.gateway.providers.keys import PASSPHRASE, write_key

    assert repr(Secret("env:ADMIN_KEY")) == "Secret(env:ADMIN_KEY)"
    for literal in ("sk-123", "env:", "env:a b", "file:", "", "ADMIN_KEY"):
        with pytest.raises(ConfigError, match="must say where the secret is") as refused:
            Secret(literal)
        assert not literal or literal not in str(refused.value).replace("env:VARIABLE", "").replace("file:PATH", "")
    with pytest.raises(ConfigError, match="NOT_THERE is not set"):
        Secret("env:NOT_THERE").reveal()
    monkeypatch.setenv(PASSPHRASE, "open sesame")
    write_key(tmp_path / "k", "sk-in-a-file")
    assert Secret(f"file:{tmp_path}/k").reveal() == "sk-in-a-file"


MODEL = '[[models]]\nname = "small"\n[[models.deployments]]\nprovider = { kind = "mock" }\n'  # 4 lines
BAD = [
    ("", 1, "models is missing in the gateway config"),
    ("models = []", 1, "models is ()"),
    ("models = 3", 1, "models is 3"),
    ("x = ", 1, "not TOML: invalid value"),
    ('a = 1\n[b\nc = "', 2, "not TOML"),
    ("a = 1\na = 2", 2, "not TOML: cannot overwrite a value"),
    (MODEL + "deadline_s = 1", 4 + 1, "models.0.deployments.0: the deployment config has no field 'deadline_s'"),
    ("deadline_s = 0\n" + MODEL, 1, "deadline_s is 0; it must be greater than 0"),
    ("deadlines = 3\n" + MODEL, 1, "the gateway config has no field 'deadlines'; did you mean 'deadline_s'?"),
    ('mid_stream = "stop"\n' + MODEL, 1, "mid_stream is 'stop'; it must be 'error', 'continue' or 'restart'"),
    (MODEL + "weight = -1", 5, "models.0.deployments.0.weight is -1; it must be greater than or equal to 0"),
    (MODEL + "\n\nrpm = 1.5", 7, "models.0.deployments.0.rpm is 1.5"),
    (MODEL + "[hedge]\nsamples = 0", 6, "hedge.samples is 0; it must be greater than or equal to 1"),
    (MODEL + "[lost]\noutput_speed = 0", 6, "lost.output_speed is 0; it must be greater than 0"),
    (MODEL + "[lost]\noutput_speed = inf", 6, "lost.output_speed is inf; it must be a finite number"),
    (MODEL + "[lost]\noutput_speed = nan", 6, "lost.output_speed is nan; it must be a finite number"),
    (
        MODEL + "[lost]\noutput_speed = 1e9",
        6,
        "lost.output_speed is 1000000000.0; it must be less than or equal to 1000000",
    ),
    (MODEL + "output_speed = 'fast'", 5, "models.0.deployments.0.output_speed is 'fast'"),
    (MODEL + "[lost]\nread_on = -1", 6, "lost.read_on is -1; it must be greater than or equal to 0"),
    (MODEL + "[feedback]\nfree = -1", 6, "feedback.free is -1; it must be greater than or equal to 0"),
    (
        MODEL.replace("mock", "mok"),
        4,
        "models.0.deployments.0.provider: no provider of kind 'mok'; did you mean 'mock'?",
    ),
    (
        MODEL.replace('kind = "mock"', 'model = "x"'),
        4,
        "models.0.deployments.0.provider needs a kind of provider; known: anthropic",
    ),
    (
        MODEL.replace(" }", ", tokns = 3 }"),
        4,
        "models.0.deployments.0.provider: Mock has no field 'tokns'; did you mean 'tokens'?",
    ),
    ('[[models]]\nname = "small"', 1, "models.0.deployments is missing in the model config"),
    ('[[models]]\nname = "small"\ndeployments = []', 3, "models.0.deployments is ()"),
    (MODEL + MODEL, 6, "models.1.name is 'small', which models.0.name is too; names must differ"),
    (
        MODEL + MODEL.replace('small"', 'b"\naliases = ["x",\n"small"]'),
        8,
        "models.1.aliases.1 is 'small', which models.0.name is too",
    ),
    (MODEL.replace("small", "auto/x"), 2, "models.0.name is 'auto/x'; names that begin with auto are for strategies"),
    (MODEL.replace("small", " small"), 2, "models.0.name is ' small'; it must be visible text"),
    (
        MODEL.replace('small"', 'small"\nprice = { input_usd = -1 }'),
        3,
        "models.0.price.input_usd is -1; it must be dollars per million",
    ),
    (MODEL.replace('small"', 'small"\nprice = { input_usd = "cheap" }'), 3, "models.0.price.input_usd is 'cheap'"),
    (
        MODEL.replace('small"', 'small"\nprice = { inptu_usd = 1 }'),
        3,
        "models.0.price: Price has no field 'inptu_usd'; did you mean",
    ),
    (MODEL.replace('small"', 'small"\nprice = { input = 1, input_usd = 1 }'), 3, "models.0.price.input are both there"),
    (
        MODEL.replace('small"', 'small"\nprice = { input = 0.5 }'),
        3,
        "models.0.price.input is 0.5, and counts nano-dollars; for dollars per million tokens write input_usd = 0.5",
    ),
    (MODEL.replace('small"', 'small"\nprice = { cached_input = 2 }'), 3, "write cached_input_usd = 2"),
    (
        MODEL + "[embedder]\nkind = 'hashed'\n[strategies.a]\nkind = 'ic_cache'\ntrusted = ['smal']",
        9,
        "strategies.a.trusted has 'smal', and there is no such model; did you mean 'small'?",
    ),
    (
        MODEL + "[strategies.a]\nkind = 'static'\nmodel = 'smal'",
        7,
        "strategies.a.model has 'smal', and there is no such model",
    ),
    (MODEL + "[strategies.a]\nkind = 'random'\nweights = { smal = 1 }", 7, "strategies.a.weights has 'smal'"),
    (
        MODEL + "[strategies.a]\nkind = 'rules'\n[[strategies.a.rules]]\nname = 'x'\nmodels = ['smal']",
        9,
        "strategies.a.rules.0.models has 'smal'",
    ),
    (MODEL + "[strategies.a]\nkind = 'trid'", 6, "strategies.a: no strategy 'trid'; did you mean 'tried'?"),
    (
        MODEL + "[strategies.a]\nkind = 'tried'\nlevle = 3",
        7,
        "strategies.a: Tried has no field 'levle'; did you mean 'level'?",
    ),
    (
        MODEL + "[strategies.a]\nkind = 'tried'\nlevel = 0",
        7,
        "strategies.a: level is 0; it must be greater than or equal to 1",
    ),
    (
        MODEL + "[strategies.a]\nkind = 'tried'\nuse = 'tried'",
        6,
        "strategies.a.kind and strategies.a.use are both there",
    ),
    (MODEL + "[strategies.a]\nmodels = ['small']", 5, "strategies.a: a strategy needs one of kind"),
    (
        MODEL + "[strategies.a]\nkind = 'tried'\nmodels = ['smal']",
        7,
        "strategies.a.models.0 is 'smal', which is no name of a model",
    ),
    (MODEL + "[strategies.a]\nrouter = 'nowhere'", 6, "strategies.a.router is "),
    (MODEL + '[strategies."a b"]\nkind = "tried"', 5, "strategies.a b: a name of a strategy has no spaces"),
    ('default_strategy = "cheap"\n' + MODEL, 1, "default_strategy is 'cheap'; did you mean 'cheapest'?"),
    (
        MODEL + "[fallbacks]\nsmal = ['small']",
        6,
        "fallbacks.smal is 'smal', which is no name of a model; did you mean 'small'?",
    ),
    (MODEL + "[fallbacks]\nsmall = [\n'small']", 7, "fallbacks.small.0 is 'small', which was tried before"),
    (MODEL + "[cache]\nsemantic = true", 6, "cache.semantic is true, which needs an embedder"),
    (MODEL + "[retries]\nbudget = 7", 6, "retries.budget is 7"),
    (MODEL + "[cache]\nthreshold = 2.0", 6, "cache.threshold is 2.0; it must be less than or equal to 1"),
    (MODEL + '[admin]\nkey = "sk-very-hidden"', 6, "admin.key must say where the secret is"),
    (MODEL + '[admin]\nkey = "env:NOT_THERE"', 6, "admin.key: the environment variable NOT_THERE is not set"),
    (MODEL + "[admin]\nport = 70000", 6, "admin.port is 70000"),
    (
        MODEL + '[[models.deployments]]\nprovider = { kind = "openai", api_key = "sk-very-hidden" }',
        6,
        "models.0.deployments.1.provider.api_key must say where",
    ),
    (
        MODEL + '[[models.deployments]]\nprovider = { kind = "openai", key_env = "sk-very-hidden" }',
        6,
        "models.0.deployments.1.provider.key_env is no name of an environment variable",
    ),
    (
        MODEL + '[[models.deployments]]\nprovider = { kind = "openai", api_key = "env:NOT_THERE" }',
        6,
        "models.0.deployments.1.provider.api_key is NOT_THERE, an environment variable that is not set",
    ),
]
BAD_YAML = [
    ("models: [", 1, "not YAML"),
    ("a: 1\nb: 2\nc: \x01\n", 3, "not YAML: it holds the character U+0001"),
    ("a: 1\nb: {c: 1\n", 3, "not YAML"),
    ("- 1\n- 2\n", 1, "the file holds a list; it must hold a table of fields"),
    ("just words", 1, "the file holds text"),
    ("deadline_s: 1\nmodels: []\ndeadline_s: 2\n", 3, "'deadline_s' is there twice, first in line 1"),
    (
        "models:\n  - name: small\n    deployments:\n      - provider: {kind: mock}\n        wieght: 3\n",
        5,
        "models.0.deployments.0: the deployment config has no field 'wieght'; did you mean 'weight'?",
    ),
    (
        "models:\n  - name: small\n    deployments:\n      - provider:\n          kind: mock\n          tokens: many\n",
        6,
        "models.0.deployments.0.provider.tokens is 'many'",
    ),
    ("? [a, b]\n: 1\n", 1, "a name of a field is sequence, not text"),
    ("a: !!python/object:os.system {}\n", 1, "the gateway config has no field 'a'"),
    (
        "a: &a [1,1,1,1,1,1,1,1]\n"
        + "".join(f"{x}: &{x} [{', '.join([f'*{y}'] * 8)}]\n" for y, x in zip("abcdef", "bcdefg", strict=True)),
        None,
        "more than 100,000 fields",
    ),
]


@pytest.mark.parametrize(("text", "line", "message"), BAD)
def test_bad_toml(read, tmp_path, text, line, message):
    check(lambda: read(text), tmp_path / "g.toml", line, message)


@pytest.mark.parametrize(("text", "line", "message"), BAD_YAML)
def test_bad_yaml(read, tmp_path, text, line, message):
    check(lambda: read(text, "g.yaml"), tmp_path / "g.yaml", line, message)


def check(load, path, line, message):
    with pytest.raises(ConfigError) as refused:
        load()
    told = str(refused.value)
    assert told.startswith(f"{path}:{line}: " if line else str(path)), told
    assert message in told
    assert "hidden" not in told


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the config .*nothing.toml: no such file"):
        load_config(tmp_path / "nothing.toml")
    (tmp_path / "g.ini").write_text("")
    with pytest.raises(ConfigError, match=r"g.ini is no config by its name; it must end in .toml, .yaml"):
        load_config(tmp_path / "g.ini")
    (tmp_path / "g.toml").write_bytes(b"a = 1\nb = '\xff'")
    with pytest.raises(ConfigError, match=r"g.toml:2: not UTF-8: byte 11 is 0xff"):
        load_config(tmp_path / "g.toml")


def test_lines_of_toml_by_hand(tmp_path):
    """Comments, strings with brackets in them, arrays over lines, dotted and quoted keys, arrays of tables in arrays of tables."""
    text = (
        '# c\n"a.b".c = 1  # [x]\nlong = """\n[not.a.table]\nd = 1\n"""\nlist = [\n  "]", # ]\n  { e = [1,\n 2] },\n]\n'
        "[[t]]\n[[t.u]]\nf = '''\n'''\n[[t.u]]\ng = 1979-05-27\n[[t]]\n[t.'u v']\nh.i = \"\\\"#\"\n"
    )
    _, lines = parse(text, tmp_path / "x.toml")
    assert lines == {
        "a.b": 2,
        "a.b.c": 2,
        "long": 3,
        "list": 7,
        "list.0": 8,
        "list.1": 9,
        "list.1.e": 9,
        "list.1.e.0": 9,
        "list.1.e.1": 10,
        "t": 12,
        "t.0": 12,
        "t.0.u": 13,
        "t.0.u.0": 13,
        "t.0.u.0.f": 14,
        "t.0.u.1": 16,
        "t.0.u.1.g": 17,
        "t.1": 18,
        "t.1.u v": 19,
        "t.1.u v.h": 20,
        "t.1.u v.h.i": 20,
    }


# Names


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("small", Target(model="small")),
        ("mini", Target(model="small")),
        ("auto", Target(strategy="fast")),
        ("auto?level=2", Target(strategy="fast", knobs={"level": "2"})),
        ("auto/slow", Target(strategy="slow")),
        ("auto/slow?", Target(strategy="slow")),
        ("auto/slow?lambda=2&x=a%20b&y=", Target(strategy="slow", knobs={"lambda": "2", "x": "a b", "y": ""})),
        ("router-slow-0.11593", Target(strategy="slow", knobs={"threshold": "0.11593"})),
        ("router-slow-1", Target(strategy="slow", knobs={"threshold": "1"})),
        ("router-slow-.5", Target(strategy="slow", knobs={"threshold": ".5"})),
    ],
)
def test_names(read, name, target):
    assert find_target(read(GOOD), name) == target


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("smal", ["small"]),
        ("LARGE", ["large"]),
        ("auto/slwo", ["auto/slow"]),
        ("auto/", ["auto"]),
        ("autos", ["auto"]),
        ("router-slow-1.5", []),
        ("router-none-0.5", []),
        ("", []),
        ("\0" * 10_000, []),
    ],
)
def test_unknown_names(read, name, near):
    with pytest.raises(UnknownModelError) as unknown:
        find_target(read(GOOD), name)
    assert unknown.value.near[: len(near)] == tuple(near)
    assert len(str(unknown.value)) < 1200


def test_a_router_that_lies_beside_the_served_one_is_told_apart_from_none(tmp_path):
    """R20: auto/knn was "did you mean auto", though the folder held knn. Where the folder is, senders are not told."""
    (tmp_path / "knn.safetensors").touch()
    (tmp_path / "seen.safetensors").touch()
    folder = StrategyConfig(router=str(tmp_path))
    for name, called in (("recommended", "auto"), ("fitted", "auto/fitted")):
        held = config().replace(strategies={"cheapest": StrategyConfig(use="cheapest"), name: folder})
        held = held.replace(default_strategy=name) if called == "auto" else held
        with pytest.raises(
            UnknownModelError, match=f"a router knn was fitted beside the one that {called} is"
        ) as unknown:
            find_target(held, "auto/knn?k=3")
        assert "[strategies.knn]" in str(unknown.value)
        assert str(tmp_path) not in str(unknown.value)
        for other in ("auto/knm", "auto/seen", f"auto/../{tmp_path.name}/knn", "auto/", "knn"):
            with pytest.raises(UnknownModelError) as unknown:
                find_target(held, other)
            assert "was fitted" not in str(unknown.value)


@pytest.mark.parametrize("query", ["x", "x=1&x=2", "&".join(f"k{n}=1" for n in range(17))])
def test_knobs_that_cannot_be_read(read, query):
    with pytest.raises(InputError, match="model: "):
        find_target(read(GOOD), f"auto?{query}")


def test_all_names(read):
    config = read(GOOD)
    assert names_of(config) == ["small", "mini", "large", "auto", "auto/fast", "auto/slow"]
    for name in names_of(config):
        find_target(config, name)


def test_a_model_may_look_like_a_strategy(read):
    config = read(MODEL.replace("small", "router-cheapest-0.5"))
    assert find_target(config, "router-cheapest-0.5") == Target(model="router-cheapest-0.5")


def test_without_a_config():
    config = default_config()
    assert from_dict(GatewayConfig, to_dict(config)) == config
    prices = [model.price.output for model in config.models]
    assert prices == sorted(prices)
    assert len(set(prices)) == 3
    assert find_target(config, "auto").strategy == "rules"
    assert not config.require_key


def test_the_least_that_may_be_is_taken(read):
    config = read(MODEL + "[hedge]\nsamples = 1\n[lost]\nread_on = 0\n[feedback]\nfree = 0\n")
    assert (config.hedge.samples, config.lost.read_on, config.feedback.free) == (1, 0, 0)


@pytest.mark.parametrize(
    ("fields", "room"),
    [
        ({}, 256 << 20),
        ({"body_bytes": 64 << 20}, 256 << 20),
        ({"body_bytes": (64 << 20) + 1}, (256 << 20) + 4),
        ({"body_bytes": 1000, "bodies_bytes": 4000}, 4000),
    ],
)
def test_there_is_room_for_four_bodies_of_any_size(fields, room):
    assert LimitsConfig(**fields).room_for_bodies == room


# What is found as the config is made into a gateway

FITTED = '[strategies.a]\nkind = "knn"\n'


@pytest.mark.parametrize(
    ("text", "line", "error", "message"),
    [
        (MODEL + '[strategies.a]\nkind = "linucb"', 5, ConfigError, "strategies.a needs vectors of queries"),
        (MODEL + FITTED + '[embedder]\nkind = "hashed"', 5, ConfigError, "strategies.a: knn has to learn first"),
        (MODEL + '[strategies.a]\nrouter = "g.toml"', 6, CheckpointError, "strategies.a.router: "),
        ('[embedder]\nkind = "fit_first"\n' + MODEL, 1, ConfigError, "embedder has to learn"),
        (
            MODEL.replace('small"', 'small"\ntokenizer = "no.json"'),
            3,
            TokenizerError,
            "models.0.tokenizer: no tokenizer at",
        ),
        (MODEL + "[otel]\nendpoint = 'http://h:1'", 5, MissingExtraError, "[otel] in the config needs"),
        ("a = 1\n" + MODEL, 1, ConfigError, "the gateway config has no field 'a'"),
    ],
)
def test_whatever_a_config_cannot_be_made_into_is_told_with_its_line(tmp_path, monkeypatch, text, line, error, message):
    """By the command, by Python, and where it is read again."""
    monkeypatch.setattr(Hashed, "needs_fit", 'kind = "fit_first"' in text)
    path = tmp_path / "g.toml"
    path.write_text(text.replace("fit_first", "hashed"))
    if error is MissingExtraError:
        missing(monkeypatch, "otel")
    for made in (lambda: Gateway(path), lambda: try_out(load_config(path), path)):
        with pytest.raises(error) as caught:
            made()
        assert str(caught.value).startswith(f"{path}:{line}: {message}"), caught.value


def test_an_extra_that_a_provider_needs_is_told_with_its_line(tmp_path, monkeypatch):
    missing(monkeypatch, "bedrock")
    path = tmp_path / "g.toml"
    path.write_text(MODEL + MODEL.replace("small", "b").replace('"mock"', '"bedrock", model = "m", region = "r"'))
    with pytest.raises(MissingExtraError) as caught:
        Gateway(path)
    assert str(caught.value).startswith(f"{path}:8: models.1.deployments.0.provider: the provider bedrock needs")
    assert str(caught.value).endswith(caught.value.command)


def test_what_stands_in_no_file_is_told_without_a_line(tmp_path):
    path = tmp_path / "g.toml"
    path.write_text(MODEL + '[strategies.a]\nkind = "random"\n')
    for message, told in (
        ("strategies.recommended: nothing", None),
        ("nothing of the config", None),
        ("[other] in the config", None),
        ("strategies.a: nothing", 5),
    ):
        with pytest.raises(ConfigError) as caught, told_where(path):
            raise ConfigError(message)
        assert str(caught.value) == (message if told is None else f"{path}:{told}: {message}")
        with pytest.raises(ConfigError) as caught, told_where(None):
            raise ConfigError(message)
        assert str(caught.value) == message
    path.unlink()
    with pytest.raises(ConfigError, match=r"^strategies\.a: gone$"), told_where(path):
        raise ConfigError("strategies.a: gone")


def test_what_says_where_already_is_not_told_twice(tmp_path, monkeypatch):
    """Also where the file is called as one of its fields."""
    monkeypatch.chdir(tmp_path)
    path = Path("models.toml")
    path.write_text("deadline_s = 0\n" + MODEL)
    with pytest.raises(ConfigError, match=r"^models\.toml:1: deadline_s is 0"), told_where(path):
        load_config(path)


def missing(monkeypatch, extra):
    """Let an extra be one that is not installed."""

    def refuse(name, *, by, of=None):
        if name == extra:
            command = f"pip install 'anabranch[{extra}]'"
            raise MissingExtraError(f"{by} needs it; {command}", modules=["it"], command=command)

    for module in ("config.needs", "observe.observers", "providers.bedrock"):
        monkeypatch.setattr(f"anabranch.gateway.{module}.require", refuse)


@pytest.mark.parametrize("name", ["http://x", "x:80", "", "a b", "[::1]", "x/", "a@b", "*.x"])
def test_a_host_that_no_request_names_is_refused(name):
    made = default_config().replace(hosts=("gateway.example", "::1", "127.0.0.1", "*", "A.b"))
    with pytest.raises(ConfigError, match=r"hosts\.1 is .*; write a name such as gateway\.example"):
        made.replace(hosts=("x", name))
