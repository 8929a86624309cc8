"""What a sender is told of a request that came to nothing."""

import math

from anabranch.errors import BudgetError, CapacityError
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.gateway.refusals import HOPELESS, limited, unavailable
from anabranch.web.api_error import ApiError

# Asked again at once, the same request would end in the same way.
IN_VAIN = ("deadline", "refused", "credit", "auth")


def refusal_of(error: BaseException) -> ApiError | None:
    """An error as OpenAI's clients know it; None for what nobody is told of: a fault of ours, or that the sender has gone."""
    if isinstance(error, UpstreamError):
        told = error.to_dict()["error"]
        return ApiError(
            error.status,
            told["code"],
            told["message"],
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
