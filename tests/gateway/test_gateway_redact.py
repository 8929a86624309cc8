"""A config as it is shown: no secret is in it, wherever it was."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import to_dict
from anabranch.gateway.config import AdminConfig, DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.config.redact import redacted
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.providers.openai import OpenAI

NAMES = [
    "password",
    "db_password",
    "PASSWORD",
    "passwd",
    "passphrase",
    "secret",
    "client_secret",
    "api_key",
    "apikey",
    "token",
    "access-token",
    "credentials",
    "authorization",
    "auth",
    "x-api-key",
]
SECRET = st.text("abcXYZ0189", min_size=8, max_size=20).map(lambda text: "Q7" + text) | st.sampled_from(
    ["Q7 a/b:c?d", "Q7'\"x", "Q7#x%41"]
)


def in_url(secret):
    return st.sampled_from(
        [
            "postgresql://ann:{}@db.example.com:5432/gateway",
            "postgresql+psycopg://ann:{}@/gateway?host=/run/pg",
            "postgresql://ann@host:{}@db/gateway",
            "redis://:{}@cache:6379/0",
            "see https://ann:{}@example.com/v1 for more",
        ]
    ).map(lambda form: form.format(secret))


def in_setting(secret):
    return st.sampled_from(
        [
            "postgresql://ann@db/gateway?{}={}",
            "postgresql://ann@db/gateway?sslmode=require&{}={}&x=1",
            "host=db {}={} user=ann",
        ]
    ).flatmap(
        lambda form: st.sampled_from(["password", "sslpassword", "api_key", "token"]).map(
            lambda name: form.format(name, secret)
        )
    )


def holding(secret):
    """Something that holds the secret, at any depth, in any form."""
    plain = secret.isalnum()
    texts = in_url(secret) | in_setting(secret) if plain else in_url(secret)
    kept = st.one_of(
        texts,
        st.builds(
            lambda name, value: {name: value},
            st.sampled_from(NAMES),
            st.just(secret) | st.just([secret]) | st.just({"a": secret}),
        ),
        st.builds(lambda name: {"headers": {name: secret}}, st.sampled_from(["x-team", "cf-access", "accept"])),
        *([st.just(f"Bearer {secret}"), st.just(f"sk-{secret}")] if plain else []),
    )
    return st.recursive(
        kept,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
        ),
        max_leaves=4,
    )


@given(SECRET.flatmap(lambda secret: st.tuples(st.just(secret), holding(secret))))
def test_no_secret_is_shown_wherever_it_is(given_):
    secret, value = given_
    assert "Q7" not in json.dumps(redacted(value)), (secret, value)


@pytest.mark.parametrize(
    "shown",
    [
        {
            "key_env": "OPENAI_API_KEY",
            "key_file": "keys/openai.key",
            "max_tokens": 100,
            "require_key": True,
            "tokenizer": "t.json",
        },
        {
            "admin": {"key": "env:ANABRANCH_ADMIN_KEY"},
            "store": "postgresql://ann@db.example.com:5432/gateway",
            "path": "/a:b@c",
        },
        {
            "store": "sqlite:///data/gateway.db?synchronous=full",
            "base_url": "http://10.0.0.5:8000/v1",
            "limits": {"tpm": None, "rate": 0.5},
        },
        {"description": "reads tokens, keys and passwords", "models": ["a", "b"], "token": "", "tokens": 5},
    ],
)
def test_what_is_no_secret_stays(shown):
    assert redacted(shown) == shown


def test_who_and_where_stay_when_a_password_goes():
    assert redacted("postgresql://ann:pw@db:5432/g?sslmode=require") == "postgresql://ann:***@db:5432/g?sslmode=require"
    assert redacted({"password": 12345, "old_passwords": [1], "tokens": [1]}) == {
        "password": "***",
        "old_passwords": ["***"],
        "tokens": [1],
    }


def test_a_whole_config_with_passwords_in_all_places(monkeypatch):
    monkeypatch.setenv("A_KEY", "hidden-Q7")
    provider = OpenAI.Config(model="m", key_env="A_KEY", headers={"cf-access-client-secret": "Q7headers"})
    config = GatewayConfig(
        models=(
            ModelConfig(
                name="m", deployments=(DeploymentConfig(provider=provider),), description="Bearer Q7description"
            ),
        ),
        strategies={
            "cheapest": StrategyConfig(
                use="cheapest", fields={"deep": [{"db": {"password": "Q7fields"}}, "redis://x:Q7url@h"]}
            )
        },
        admin=AdminConfig(key=Secret("env:A_KEY")),
        store="postgresql://ann:Q7/store@db/gateway?sslpassword=Q7query",
    )
    shown = json.dumps(redacted(to_dict(config)))
    assert "Q7" not in shown
    for kept in ("A_KEY", "env:A_KEY", "cf-access-client-secret", "postgresql://ann:***@db/gateway", "cheapest"):
        assert kept in shown
