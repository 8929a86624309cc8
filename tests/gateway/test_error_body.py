"""What an upstream's error says, and what of its words is passed on."""

import json
from datetime import UTC, datetime

import pytest

from anabranch.gateway.providers.error_body import RETRY_AFTER_S, classify, hidden, retry_after
from anabranch.gateway.providers.failures import Failure

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def said(value, status=400, headers=None):
    return classify(status, headers or {}, value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no such field"}}, "no such field"),
        ({"error": {"detail": "no such field"}}, "no such field"),
        ({"error": "no such field"}, "no such field"),
        ({"message": "no such field"}, "no such field"),
        ({"detail": [{"loc": ["model"]}]}, '[{"loc": ["model"]}]'),
        (b" upstream connect error ", "upstream connect error"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        # What is for eyes, or nothing at all, is passed over.
        (b"<html>busy</html>", "the upstream answered with status 400"),
        ([1, 2], "the upstream answered with status 400"),
        ({"error": {}}, "the upstream answered with status 400"),
        ({"error": None}, "the upstream answered with status 400"),
        (b"", "the upstream answered with status 400"),
        (b'{"error": {"message": ' + b"[" * 100_000, '{"error": {"message": ' + "[" * (65536 - 22)),
    ],
)
def test_its_message_is_found_wherever_it_stands(body, message):
    assert said(body).message == message


def test_its_words_are_kept_where_they_are_words():
    failure = said({"error": {"message": "m", "type": "t", "code": 17, "param": ["a"]}})
    assert (failure.type, failure.code, failure.param) == ("t", "17", None)
    assert failure.status == 400


def test_a_redirect_says_nothing_of_its_own():
    failure = said({"error": {"message": "moved"}}, 302)
    assert failure.kind == "garbage"
    assert "302" in failure.message
    assert "moved" not in failure.message


def test_words_hint_only_where_the_request_is_at_fault():
    text = {"error": {"message": "prompt is too long: 9 tokens"}}
    assert said(text, 400).hint == "context"
    assert said(text, 400).cause == "context"
    assert said(text, 403).hint is None
    assert said(text, 500).hint is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "1e9"}, RETRY_AFTER_S),
        ({"retry-after": "inf"}, RETRY_AFTER_S),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        # The finer of the two counts.
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 99999 12:00:30 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 2026 99:00:30 GMT"}, None),
    ],
)
def test_how_long_it_wants_to_be_left_alone(headers, seconds):
    assert retry_after(headers, NOW) == seconds


def test_what_it_asks_for_is_in_the_failure():
    assert said({}, 429, {"retry-after": "3"}).retry_after_s == 3.0


SECRET = "k-5a1b9c7d2e"


@pytest.mark.parametrize("field", ["message", "type", "code", "param"])
def test_our_key_is_taken_out_of_every_word(field):
    told = {"message": "m", field: f"before {SECRET} after"}
    found = getattr(hidden(Failure(kind="auth", **told), SECRET), field)
    assert found == "before [key] after"


def test_a_key_is_taken_out_before_the_text_is_cut():
    # Cut first, half of the key would be left, and look like none.
    text = "x" * 495 + SECRET
    assert hidden(Failure(kind="auth", message=text), SECRET).message == "x" * 495 + "[key]"
    word = "y" * 195 + SECRET
    assert hidden(Failure(kind="auth", message="m", code=word), SECRET).code == "y" * 195 + "[key]"


def test_what_is_passed_on_is_cut():
    found = hidden(Failure(kind="auth", message="x" * 999, type="t" * 999, code="c" * 999, param="p" * 999), None)
    assert [len(text) for text in (found.message, found.type, found.code, found.param)] == [500, 200, 200, 200]


def test_a_short_secret_is_no_reason_to_spoil_a_sentence():
    failure = Failure(kind="auth", message="a bad request")
    assert hidden(failure, "a") == failure
    assert hidden(failure, None) == failure
    assert hidden(failure, "a bad re").message == "[key]quest"
