"""``pool.json``: what it may say of embedder and writer, what it may not, and who is asked then."""

from dataclasses import fields

import pytest

from anabranch.adapters.glider import ChatWriter, EndpointEmbedder, GliderConfig, Plugins, PoolSettings, read_settings
from anabranch.adapters.glider.settings import ALLOWED, KEYS
from anabranch.errors import ConfigError

HERE = {"url": "http://127.0.0.1:9/v1", "model": "m"}


def settings(**said):
    return read_settings(said, {}, 3)


def test_what_is_named_is_made(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.setenv(KEYS, "MY_KEY")
    assert settings().plugins() == Plugins(None, None)
    assert settings(embedder="tfidf").plugins() == Plugins(None, None)
    states = object()
    assert settings(embedder="hidden-states").plugins(states) == Plugins(states, None)
    made = settings(embedder={**HERE, "timeout_s": 2}, writer={**HERE, "key_env": "MY_KEY"}).plugins()
    assert isinstance(made.embedder, EndpointEmbedder)
    assert isinstance(made.writer, ChatWriter)
    assert (made.embedder.timeout_s, made.writer.timeout_s, made.writer.model) == (2, 10, "m")
    # An option of a command goes before the file, and where no text is compared nobody is asked.
    given = Plugins(states, None)
    assert settings(embedder=HERE).plugins(None, given).embedder is states
    assert read_settings({"embedder": HERE}, {"instruction": False}, 3).plugins() == Plugins(None, None)


@pytest.mark.parametrize("embedder", ["tfidf", "hidden-states", HERE])
@pytest.mark.parametrize("instruction", [True, False])
def test_the_model_is_needed_where_its_states_are_compared(embedder, instruction):
    found = read_settings({"embedder": embedder}, {"instruction": instruction}, 3)
    assert found.needs_model == (instruction and embedder == "hidden-states")


def test_how_experts_are_chosen_is_apart():
    assert settings(embedder=HERE, weight=7.0, wait_s=1.0).choice == GliderConfig(weight=7.0)
    assert {one.name for one in fields(PoolSettings)} - {one.name for one in fields(GliderConfig)} == {
        "embedder",
        "writer",
        "wait_s",
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"embeder": "tfidf"}, "no field 'embeder'; did you mean 'embedder'"),
        ({"embedder": "bert"}, "^embedder is 'bert'; it must be 'tfidf', 'hidden-states' or a table of an endpoint"),
        ({"embedder": 3}, "^embedder is 3; it must be"),
        ({"embedder": [HERE]}, "^embedder is .*; it must be"),
        ({"embedder": None}, "^embedder is None; it must be"),
        ({"embedder": {"url": HERE["url"]}}, "^embedder.model is missing"),
        ({"embedder": {**HERE, "key": "sk-1"}}, "no field 'key'"),
        ({"embedder": {**HERE, "timeout_s": 0}}, "timeout_s is 0"),
        ({"embedder": {**HERE, "url": "ftp://x"}}, "embedder: the endpoint is 'ftp://x'; write http"),
        ({"embedder": {**HERE, "model": ""}}, "embedder: no model is named"),
        ({"embedder": {**HERE, "key_env": "NO_SUCH"}}, f"embedder: key_env is 'NO_SUCH', .*; .* set {KEYS}=NO_SUCH in"),
        ({"embedder": {**HERE, "key_env": "A,B; rm"}}, f"embedder: key_env is 'A,B; rm', .*; .* set {KEYS}=NAME in"),
        ({"embedder": {**HERE, "url": "http://127.0.0.1:9/v1/../admin"}}, "embedder: the endpoint is .*; write http"),
        ({"embedder": {**HERE, "url": "http://127.0.0.1:9/%2e%2E/admin"}}, "embedder: the endpoint is .*; write http"),
        ({"writer": "small"}, "^writer is 'small'; it must be a table of an endpoint"),
        (
            {"writer": {**HERE, "url": "http://x.example/v1"}},
            "writer: the endpoint http://x.example/v1 is not on this machine",
        ),
        ({"embedder": {**HERE, "url": "http://127.0.0.1.evil.example/v1"}}, "embedder: .* is not on this machine"),
        ({"embedder": {**HERE, "url": "http://localhost@evil.example/v1"}}, "embedder: the endpoint is .*; write http"),
        ({"embedder": "hidden-states"}, "embedder is 'hidden-states', of the model that the pool is on"),
        ({"wait_s": 1}, "wait_s is 1.*, and no endpoint is waited for"),
        ({"embedder": HERE, "wait_s": -1}, "wait_s is -1"),
        ({"top_k": 1, "top_p": 0.5}, "give one of them"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(said, message):
    with pytest.raises(ConfigError, match=message) as raised:
        settings(**said).plugins()
    assert "\n" not in str(raised.value)


def test_a_pool_from_elsewhere_sends_queries_nowhere_unless_that_is_allowed(monkeypatch):
    """Pools are shared: what one names would get what users ask, and the value of any variable."""
    far = {"url": "https://api.example.com/v1/", "model": "m", "key_env": "MY_KEY"}
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.setenv(KEYS, "MY_KEY")
    with pytest.raises(ConfigError, match=f"set {ALLOWED}=https://api.example.com/v1 in") as raised:
        settings(embedder=far).plugins()
    assert "sk-secret" not in str(raised.value)
    monkeypatch.setenv(ALLOWED, "http://other.example/v1, https://api.example.com/v1")
    assert isinstance(settings(embedder=far).plugins().embedder, EndpointEmbedder)
    # An address that is trusted is so with what it is asked, not with all that this machine knows.
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    for url in (far["url"], "http://127.0.0.1:1/v1"):
        with pytest.raises(ConfigError, match=f"key_env is 'OTHER_KEY', .* set {KEYS}=OTHER_KEY in") as raised:
            settings(embedder={**far, "url": url, "key_env": "OTHER_KEY"}).plugins()
        assert "sk-other" not in str(raised.value)
    for url in ("http://localhost:1/v1", "http://[::1]:1/v1", "http://127.9.9.9/v1"):
        monkeypatch.delenv(ALLOWED, raising=False)
        assert settings(embedder={"url": url, "model": "m"}).plugins()
