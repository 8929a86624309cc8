"""Errors of clouds in one vocabulary, against their documentation."""

import json

import pytest

from anabranch.gateway.providers import UpstreamError
from cloud_providers import chat, keys, made

__all__ = ["keys"]
pytestmark = pytest.mark.usefixtures("keys")


def google(code, status, message="no", *details):
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


TOO_MANY = "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."
WAIT = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.07s"}
CREDIT = {"error": {"code": "insufficient_quota"}}
RAW = json.dumps({"error": {"message": "too long", "code": "context_length_exceeded"}})


@pytest.mark.parametrize(
    ("kind", "status", "headers", "body", "failure"),
    [
        ("azure", 400, {}, {"error": {"code": "content_filter", "message": "m", "innererror": {}}}, "filter"),
        ("azure", 401, {}, {"error": {"code": "401", "message": "m"}}, "auth"),
        ("azure", 404, {}, {"error": {"code": "DeploymentNotFound", "message": "m"}}, "missing"),
        ("azure", 400, {}, {"error": {"code": "context_length_exceeded", "message": "m"}}, "context"),
        ("bedrock", 400, {"x-amzn-errortype": "ValidationException:http://i"}, {"message": "m"}, "request"),
        (
            "bedrock",
            400,
            {},
            {"__type": "a#ValidationException", "message": "Input is too long for requested model."},
            "context",
        ),
        ("bedrock", 400, {"x-amzn-errortype": "ServiceQuotaExceededException"}, {"message": "m"}, "rate_limit"),
        ("bedrock", 403, {"x-amzn-errortype": "ExpiredTokenException"}, {"message": "m"}, "auth"),
        ("bedrock", 403, {"x-amzn-errortype": "AccessDeniedException"}, {"message": "m"}, "forbidden"),
        ("bedrock", 424, {"x-amzn-errortype": "ModelErrorException"}, {"message": "m"}, "server"),
        ("bedrock", 429, {"x-amzn-errortype": "ModelNotReadyException"}, {"message": "m"}, "rate_limit"),
        ("gemini", 400, {}, google(400, "INVALID_ARGUMENT"), "request"),
        ("gemini", 400, {}, google(400, "INVALID_ARGUMENT", TOO_MANY), "context"),
        # What a sender wrote is quoted, and says nothing.
        ("gemini", 400, {}, google(400, "INVALID_ARGUMENT", f"tool 'x. {TOO_MANY}' is no"), "request"),
        ("gemini", 400, {}, google(400, "INVALID_ARGUMENT", "m", {"reason": "API_KEY_INVALID"}), "auth"),
        ("gemini", 403, {}, google(403, "PERMISSION_DENIED", "m", {"reason": "BILLING_DISABLED"}), "credit"),
        ("vertex", 403, {}, google(403, "PERMISSION_DENIED"), "forbidden"),
        ("vertex", 503, {}, [google(503, "UNAVAILABLE")], "server"),
        ("ollama", 404, {}, {"error": "model 'x' not found"}, "missing"),
        ("gemini", 404, {}, google(404, "NOT_FOUND"), "missing"),
        ("bedrock", 404, {"x-amzn-errortype": "ResourceNotFoundException"}, {"message": "m"}, "missing"),
        ("openrouter", 402, {}, {"error": {"code": 402, "message": "m"}}, "credit"),
        (
            "openrouter",
            403,
            {},
            {"error": {"code": 403, "message": "m", "metadata": {"reasons": ["violence"]}}},
            "filter",
        ),
        ("openrouter", 403, {}, {"error": {"code": 403, "message": "m"}}, "forbidden"),
        ("openrouter", 400, {}, {"error": {"code": 400, "message": "m", "metadata": {"raw": RAW}}}, "context"),
        (
            "openrouter",
            400,
            {},
            {"error": {"code": 400, "message": "m", "metadata": {"raw": json.dumps(CREDIT)}}},
            "request",
        ),
    ],
)
def test_errors(kind, status, headers, body, failure):
    found = made(kind).error(status, headers, json.dumps(body).encode())
    assert found.kind == failure
    assert found.message


def test_how_long_google_asks_to_wait():
    found = made("gemini").error(429, {}, json.dumps(google(429, "RESOURCE_EXHAUSTED", "m", WAIT)).encode())
    assert (found.kind, found.retry_after_s) == ("rate_limit", 34.07)


@pytest.mark.parametrize(
    ("kind", "data", "failure"),
    [
        ("bedrock", {"exception": {"type": "throttlingException", "message": "m"}}, "rate_limit"),
        ("bedrock", {"exception": {"type": "modelStreamErrorException", "message": "m"}}, "server"),
        ("bedrock", {"exception": {"type": "newException"}}, "server"),
        ("gemini", google(503, "UNAVAILABLE"), "server"),
        ("vertex", google(429, "RESOURCE_EXHAUSTED"), "rate_limit"),
        ("ollama", {"error": "an error was encountered while running the model"}, "server"),
    ],
)
def test_errors_inside_a_stream(kind, data, failure):
    with pytest.raises(UpstreamError) as caught:
        made(kind).translator(chat(stream=True)).feed(json.dumps(data).encode())
    assert caught.value.failure.kind == failure


@pytest.mark.parametrize("where", ["choice", "top"])
def test_an_answer_of_openrouter_that_failed_under_200(where):
    error = {"code": 502, "message": "Provider returned error"}
    body = {"error": error} if where == "top" else {"choices": [{"finish_reason": "error", "error": error}]}
    with pytest.raises(UpstreamError, match="Provider returned error") as caught:
        made("openrouter").parse(chat(), json.dumps(body).encode())
    assert (caught.value.failure.kind, caught.value.failure.status) == ("server", 502)
