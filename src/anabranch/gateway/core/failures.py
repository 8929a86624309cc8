"""What a sender is told of a request that came to nothing."""

import math
from itertools import groupby

from anabranch.errors import BudgetError, CapacityError
from anabranch.gateway.dispatch import Report
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.gateway.refusals import HOPELESS, limited, unavailable
from anabranch.web.api_error import ApiError

# Asked again at once, the same request would end in the same way.
IN_VAIN = ("deadline", "refused", "credit", "auth")

# Models that are told of, each way.
_MOST_TOLD = 5


def refusal_of(error: BaseException) -> ApiError | None:
    """An error as OpenAI's clients know it; None for what nobody is told of: a fault of ours, or that the sender has gone."""
    if isinstance(error, UpstreamError):
        told = error.to_dict()["error"]
        return ApiError(
            error.status,
            told["code"],
            told["message"] + _tried(error.report),
            type=told["type"],
            param=told["param"],
            headers=_retry_after(error),
        )
    if isinstance(error, BudgetError):
        return limited(error)
    if isinstance(error, CapacityError):
        return unavailable(error)
    return error if isinstance(error, ApiError) else None


def _retry_after(error: UpstreamError) -> dict[str, str]:
    wait_s = error.failure.retry_after_s
    if error.failure.kind in IN_VAIN:
        return dict(HOPELESS)
    if error.status not in (429, 503):
        return {}
    return {"Retry-After": str(max(1, math.ceil(wait_s or 1)))}


def _tried(report: Report | None) -> str:
    """Who else was asked, and who was not and why; "" where the failure of one attempt says all, or nobody was asked."""
    if report is None or not report.attempts or len(report.attempts) + len(report.skipped) == 1:
        return ""
    found = []
    for model, attempts in groupby(report.attempts, lambda one: one.model):
        ends = ((one.cause or one.status) + (f" {one.http_status}" if one.http_status else "") for one in attempts)
        found.append(f"{model} ({', '.join(ends)})")
    asked = f"asked: {_some(found)}"
    passed = _some([f"{model} ({why})" for model, why in report.skipped])
    return f" ({asked}; not asked: {passed})" if passed else f" ({asked})"


def _some(said: list[str]) -> str:
    more = len(said) - _MOST_TOLD
    return ", ".join(said[:_MOST_TOLD]) + (f" and {more} more" if more > 0 else "")
