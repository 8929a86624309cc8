"""What a sender is told of a request that came to nothing."""

import asyncio

import pytest

from anabranch.errors import BudgetError, CapacityError, InputError
from anabranch.gateway.core.failures import refusal_of
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.providers.provider import Failure, UpstreamError
from anabranch.web.api_error import ApiError


@pytest.mark.parametrize(
    ("kind", "status", "headers"),
    [
        ("rate_limit", 429, {"Retry-After": "3"}),
        ("unavailable", 503, {"Retry-After": "3"}),
        ("deadline", 504, {"x-should-retry": "false"}),
        ("auth", 502, {"x-should-retry": "false"}),
        ("server", 502, {}),
        ("context", 400, {}),
    ],
)
def test_an_upstream_s_failure_says_whether_it_is_worth_asking_again(kind, status, headers):
    told = refusal_of(UpstreamError(Failure(kind=kind, message="so it is", retry_after_s=2.5)))
    assert (told.status, str(told), told.headers) == (status, "so it is", headers)


def test_a_wait_that_nobody_said_is_a_second():
    assert refusal_of(UpstreamError(Failure(kind="unavailable", message="x"))).headers == {"Retry-After": "1"}


def test_money_and_the_store_are_refusals_and_faults_of_ours_are_not():
    short = BudgetError(
        "no room", subject="global", period="day", limit_nano=1, remaining_nano=0, resets_s=None, retry_after_s=None
    )
    told = refusal_of(short)
    assert (told.status, told.code, told.headers) == (429, "insufficient_quota", {"x-should-retry": "false"})
    assert refusal_of(CapacityError("disk full at /secret")).status == 503
    assert "/secret" not in str(refusal_of(CapacityError("disk full at /secret")))
    own = ApiError(400, "x", "y")
    assert refusal_of(own) is own
    for fault in (InputError("x"), KeyError("x"), asyncio.CancelledError()):
        assert refusal_of(fault) is None


def attempt(model, status, http_status=None):
    return Attempt(model=model, deployment=model, start_s=0.0, status=status, http_status=http_status)


@pytest.mark.parametrize(
    ("attempts", "skipped", "told"),
    [
        ([], [("a", "no deployment takes requests")], "so it is"),
        ([attempt("a", "server", 500)], [], "so it is"),
        (
            [attempt("a", "server", 500), attempt("a", "connect"), attempt("b", "context", 400)],
            [],
            "so it is (asked: a (server 500, connect), b (context 400))",
        ),
        ([attempt("a", "server", 500)], [("b", "why")], "so it is (asked: a (server 500); not asked: b (why))"),
        (
            [attempt(f"m{at}", "server", 500) for at in range(7)],
            [],
            "so it is (asked: " + ", ".join(f"m{at} (server 500)" for at in range(5)) + " and 2 more)",
        ),
    ],
)
def test_who_else_was_asked_is_told(attempts, skipped, told):
    report = Report(attempts=attempts, skipped=skipped)
    assert str(refusal_of(UpstreamError(Failure(kind="server", message="so it is"), report))) == told
