"""What senders are told who are refused for want of room."""

import pytest

from anabranch.errors import BudgetError, CapacityError, RateError
from anabranch.gateway.refusals import limited, unavailable


@pytest.mark.parametrize(("wait_s", "header"), [(None, {}), (0.0, {"Retry-After": "1"}), (2.1, {"Retry-After": "3"})])
def test_limits_say_how_long_to_wait_where_waiting_helps(wait_s, header):
    rate = limited(RateError("too fast", limit="rpm", retry_after_s=wait_s))
    of = {"subject": "team:a", "period": "day", "limit_nano": 5, "remaining_nano": 1, "resets_s": None}
    budget = limited(BudgetError("spent", retry_after_s=wait_s, **of))
    assert (rate.status, rate.code, rate.headers) == (429, "rate_limit_exceeded", header)
    hopeless = {"x-should-retry": "false"} if wait_s is None else {}
    assert (budget.status, budget.code, budget.headers) == (429, "insufficient_quota", header | hopeless)


def test_a_budget_that_is_full_for_long_is_not_asked_again_by_clients():
    of = {"subject": "team:a", "period": "day", "limit_nano": 5, "remaining_nano": 1, "resets_s": None}
    assert limited(BudgetError("spent", retry_after_s=61.0, **of)).headers == {
        "Retry-After": "61",
        "x-should-retry": "false",
    }
    assert "x-should-retry" not in limited(RateError("too fast", limit="rpm", retry_after_s=61.0)).headers


def test_a_store_that_does_not_answer_tells_senders_nothing_of_itself():
    refusal = unavailable(CapacityError("disk full at /srv/secret.db"))
    assert (refusal.status, refusal.code) == (503, "store_unavailable")
    assert "secret" not in str(refusal)
    assert int(refusal.headers["Retry-After"]) > 0
