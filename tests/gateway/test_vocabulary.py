"""What upstreams' errors mean: words of a vocabulary, compared whole, and never what a sender may have written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.retry import ACTION, OUTCOME
from anabranch.gateway.providers.provider import classify, hidden
from anabranch.gateway.providers.vocabulary import WORDS, hint_of, kind_of, status_said

# Errors as providers send them, with the status each comes with and what it means.
RECORDED = [
    (
        400,
        {
            "error": {
                "message": "Invalid schema for function 'f'",
                "type": "invalid_request_error",
                "param": "tools[0].function.parameters",
                "code": "invalid_function_parameters",
            }
        },
        "request",
    ),
    (
        400,
        {
            "error": {
                "message": "too long",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        },
        "context",
    ),
    (
        400,
        {
            "error": {
                "message": "no",
                "type": None,
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
                "innererror": {
                    "code": "ResponsibleAIPolicyViolation",
                    "content_filter_result": {"jailbreak": {"filtered": True}},
                },
            }
        },
        "filter",
    ),
    (
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "tools.0.custom.input_schema: no"},
            "request_id": "req_1",
        },
        "request",
    ),
    (400, {"object": "error", "message": "no", "type": "BadRequestError", "param": None, "code": 400}, "request"),
    (400, [{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}], "request"),
    (
        401,
        {
            "error": {
                "message": "Incorrect API key",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_api_key",
            }
        },
        "auth",
    ),
    (402, {"type": "error", "error": {"type": "billing_error", "message": "no"}}, "credit"),
    (403, {"type": "error", "error": {"type": "permission_error", "message": "no"}}, "forbidden"),
    (
        403,
        {
            "error": {
                "code": "unsupported_country_region_territory",
                "message": "no",
                "param": None,
                "type": "request_forbidden",
            }
        },
        "auth",
    ),
    (
        404,
        {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "model_not_found"}},
        "missing",
    ),
    (404, {"error": {"code": "DeploymentNotFound", "message": "no"}}, "missing"),
    (404, {"object": "error", "message": "no", "type": "NotFoundError", "param": None, "code": 404}, "missing"),
    (404, {"type": "error", "error": {"type": "not_found_error", "message": "model: no"}}, "not_found"),
    (404, {"detail": "Not Found"}, "not_found"),
    (413, {"type": "error", "error": {"type": "request_too_large", "message": "no"}}, "context"),
    (422, {"detail": [{"loc": ["body", "tools", 0], "msg": "field required", "type": "missing"}]}, "request"),
    (
        429,
        {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}},
        "rate_limit",
    ),
    (
        429,
        {"error": {"message": "no", "type": "insufficient_quota", "param": None, "code": "credit_balance_exhausted"}},
        "credit",
    ),
    (
        429,
        {"error": {"message": "no", "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}},
        "credit",
    ),
    (500, {"error": {"message": "no", "type": "server_error", "param": None, "code": None}}, "server"),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, "server"),
]

# What a sender may have an upstream quote.
HOSTILE = st.sampled_from(
    [
        "Invalid schema for function 'get_billing_info'",
        "insufficient_quota: your credit balance is too low, payment required, usage limit, spending limit",
        "invalid_api_key authentication_error",
        "This model's maximum context length is 8192 tokens; the prompt is too long",
        "flagged by our content_filter and content policy",
        "<!doctype html><title>403</title>",
    ]
) | st.text(max_size=60)


def quoting(value, text):
    """The body with every text in it replaced, but for the words that say what it is."""
    if isinstance(value, dict):
        return {name: quoting(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [quoting(item, text) for item in value]
    return text if isinstance(value, str) and value.lower() not in WORDS else value


@pytest.mark.parametrize(("status", "body", "kind"), RECORDED)
def test_what_providers_send(status, body, kind):
    assert classify(status, {}, json.dumps(body).encode()).kind == kind


@given(st.sampled_from(RECORDED), HOSTILE.filter(lambda text: text.lower() not in WORDS))
def test_no_text_of_an_error_changes_what_it_means(recorded, text):
    status, body, kind = recorded
    for said in (quoting(body, text), quoting(body, "neutral")):
        assert classify(status, {}, json.dumps(said).encode()).kind == kind


@given(st.integers(400, 499), HOSTILE)
def test_a_page_of_a_firewall_says_nothing_of_the_deployment(status, text):
    found = classify(status, {}, f"<!doctype html><title>{text}</title>".encode("utf-8", "replace"))
    assert found.kind == kind_of(status, None, None)
    assert (found.kind in ("auth", "credit")) == (status in (401, 402))


@pytest.mark.parametrize("word", sorted(WORDS))
@pytest.mark.parametrize("field", ["code", "type"])
def test_each_word_counts_as_code_or_type_and_only_whole(word, field):
    statuses = {"credit": 429, "auth": 403, "context": 400, "filter": 400, "missing": 404}
    status = statuses[WORDS[word]]
    assert classify(status, {}, json.dumps({"error": {field: word}}).encode()).kind == WORDS[word]
    for other in (f"{word}_", f"no {word}", word[:-1]):
        assert classify(status, {}, json.dumps({"error": {field: other}}).encode()).kind == kind_of(status, None, None)
    assert classify(status, {}, json.dumps({"error": {"message": word}}).encode()).kind == kind_of(status, None, None)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"error": {"code": 429}}, 429),
        ({"error": {"status": "503"}}, 503),
        ({"status_code": 400, "error": "x"}, 400),
        ({"error": {"code": "content_filter"}}, 400),
        ({"error": {"type": "insufficient_quota"}}, 402),
        ({"error": {"type": "invalid_request_error", "message": "insufficient_quota"}}, 400),
        ({"error": {"type": "overloaded_error"}}, 529),
        ({"error": {"code": "rate_limit_exceeded"}}, 429),
        ({"error": {"code": 10**30}}, 500),
        ({"error": {"code": "4000"}}, 500),
        ({"error": {"code": "²²²"}}, 500),
        ({"error": "boom"}, 500),
        ({}, 500),
    ],
)
def test_the_status_of_an_error_that_comes_without_one(value, status):
    assert status_said(value) == status


def test_what_an_error_says_is_shown_whatever_form_it_has():
    deep = b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}"
    assert classify(422, {}, b'{"detail": [{"msg": "field required"}]}').message == '[{"msg": "field required"}]'
    assert classify(422, {}, deep).kind == "request"
    long = classify(400, {}, json.dumps({"error": {"message": "x" * 9000, "code": "y" * 9000}}).encode())
    # It is cut once keys have been taken out of it.
    assert (len(long.message), len(long.code)) == (9000, 9000)
    assert (len(hidden(long, None).message), len(hidden(long, None).code)) == (500, 200)
    endless = classify(400, {}, json.dumps({"error": {"message": "x" * 99_000, "code": "y" * 99_000}}).encode())
    assert (len(endless.message), len(endless.code)) == (65_536, 65_536)


# Refusals that say in words alone what another model could change; where the request goes then.
def refusal(message, **fields):
    return {"type": "error", "error": {"type": "invalid_request_error", "message": message}, **fields}


IN_WORDS = [
    (refusal("prompt is too long: 208310 tokens > 200000 maximum"), "context"),
    (refusal("Your credit balance is too low to access the Anthropic API."), "credit"),
    (
        {
            "object": "error",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
            "message": "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.",
        },
        "context",
    ),
    (refusal("You have reached your specified API usage limits"), "credit"),
]


@pytest.mark.parametrize(("body", "hint"), IN_WORDS)
def test_words_decide_where_the_request_goes_and_say_nothing_of_the_deployment(body, hint):
    failure = classify(400, {}, json.dumps(body).encode())
    assert (failure.kind, failure.hint, failure.cause) == ("request", hint, hint)
    assert ACTION[failure.cause] != "give_up"
    assert OUTCOME[failure.kind] == "ignored"


@pytest.mark.parametrize(
    "message",
    [
        "Invalid schema for function 'f'",
        "temperature must be below 2",
        "",
        "`inputs` must be text",
        "the prompt token count is odd",
    ],
)
def test_other_words_decide_nothing(message):
    assert hint_of(400, message) is None
    assert hint_of(500, "prompt is too long") is None


@given(HOSTILE, st.sampled_from([400, 422]))
def test_no_400_is_ever_held_against_a_deployment_for_its_words(text, status):
    failure = classify(status, {}, json.dumps({"error": {"message": text, "type": "invalid_request_error"}}).encode())
    assert OUTCOME[failure.kind] == "ignored"
    assert failure.cause in ("request", "context", "credit")
