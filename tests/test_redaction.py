"""What looks like a secret is taken out wherever texts go: configs that are shown, errors that are passed on, examples that are kept."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config.redact import redacted
from anabranch.gateway.providers.provider import Failure, hidden
from anabranch.redaction import hide_keys, hide_passwords, hide_settings, is_secret_name, is_surely_secret_name
from anabranch.routers.ic_cache.redact import redact_personal

KEYS = [
    "sk-0123456789Q7abcdef",
    "sk-proj-0123Q7456789",
    "sk_live_0123Q7456789",
    "key-0123456789Q7abcdef",
    "ghp_0123456789Q7abcdef",
    "github_pat_0123456789Q7",
    "glpat-0123456789Q7",
    "xoxb-0123456789-Q7abcdef",
    "gsk_0123456789Q7",
    "xai-0123456789Q7",
    "hf_0123456789Q7abcdef",
    "AIzaSy0123456789Q7abcdefghijkl",
    "AKIA0123456789Q7ABCD",
    "Bearer abcdefgh12Q7345678",
    "bearer abcdefghQ7",
    "Basic YWxhZGRpbjpvQ7BlbnNlc2FtZQ==",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJRNyJ9.Q7sgnature",
    "sk-ab****Q7cd",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIQ7\n-----END RSA PRIVATE KEY-----",
    "https://hooks.slack.com/services/T0/B0/Q7XXXX",
    "https://discord.com/api/webhooks/123/Q7XXXX",
    "https://ann:Q7@example.com/v1",
    "redis://Q7tok3n@h",
    "https://Q7token@github.com/a/b",
]


@given(st.sampled_from(KEYS), st.sampled_from(["{}", "is {}.", "wrong key ({}) given", '"{}"', "a\n{}\nb"]))
def test_a_key_is_taken_out_of_whatever_it_stands_in(key, form):
    """By all who take keys out: they know the same ones."""
    text = form.format(key)
    for shown in (
        json.dumps(redacted({"description": text})),
        hidden(Failure(kind="auth", message=text), None).message,
        redact_personal(text),
    ):
        assert "Q7" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "a key-value-store, sk, pk and AKIA",
        "the bearer of news",
        "task-0123456789",
        "monkey-0123456789abc",
        "max_tokens: 5 is too large",
        "postgresql://ann@db:5432/g",
        "mail ann@example.com",
        "https://example.com/a@b",
        "Incorrect API key provided",
        "https://hooks.slack.com/services/",
    ],
)
def test_what_is_no_key_stays(text):
    assert hide_keys(hide_passwords(text)) == text


@pytest.mark.parametrize(
    "name",
    [
        "clientSecret",
        "accessKey",
        "x-token",
        "apiKey",
        "db.password",
        "privateKey",
        "AccountKey",
        "API_KEY",
        "sas_sig",
        "authToken",
        "secretAccessKey",
    ],
)
def test_names_of_every_style_say_that_they_are_secret(name):
    assert is_secret_name(name)
    assert redacted({name: "Q7"}) == {name: "***"}


@pytest.mark.parametrize(
    "name", ["key_env", "keyEnv", "monkey", "tokenizer", "max_tokens_per_s", "keys_by_name", "author", "keyboard"]
)
def test_names_that_only_sound_so_do_not(name):
    assert not is_secret_name(name)


def test_numbers_are_secret_only_where_the_name_leaves_no_doubt():
    assert is_surely_secret_name("clientSecret")
    assert is_surely_secret_name("dbPassword")
    assert not is_surely_secret_name("maxTokens")
    assert redacted({"maxTokens": 5, "clientSecret": 5}) == {"maxTokens": 5, "clientSecret": "***"}


def test_values_of_secret_names_go_and_the_names_stay():
    text = "Endpoint=https://x;AccountKey=Q7zz==;SharedAccessSignature=Q7;timeout=5"
    assert hide_settings(text) == "Endpoint=https://x;AccountKey=***;SharedAccessSignature=***;timeout=5"


@given(st.text(max_size=80))
def test_any_text_comes_out_once_and_for_all(text):
    once = hide_keys(hide_settings(hide_passwords(text)))
    assert hide_keys(hide_settings(hide_passwords(once))) == once


@pytest.mark.parametrize(
    "part",
    [
        "a",
        "a.",
        "a://a:",
        "key-",
        "eyJ-",
        "eyJ.",
        "bearer ",
        "sk-",
        "-----BEGIN ",
        "a@",
        "@",
        "://",
        "ghp_",
        "x=",
        "1 ",
    ],
)
def test_a_hostile_text_takes_no_longer_than_another(part):
    """Each of these would take minutes if every place of it were looked at from every other."""
    assert isinstance(redact_personal(part * (200_000 // len(part))), str)
