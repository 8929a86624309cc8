"""What a sender is told who is refused for want of room: in a budget, in a rate, or in the store."""

import math

from anabranch.errors import BudgetError, CapacityError, LimitError
from anabranch.gateway.logged_error import words
from anabranch.web.api_error import ApiError

# OpenAI's clients ask again after every 429 and 5xx, at once where they are to wait longer than this, unless they are told not to.
PATIENT_S = 60.0
HOPELESS = {"x-should-retry": "false"}

# Of a store that cannot write or be read: it has been tried for a while already.
STORE_RETRY_S = 5


def limited(error: LimitError) -> ApiError:
    """A limit as OpenAI's clients know it. The wait is said where waiting helps."""
    wait_s = error.retry_after_s
    headers = {} if wait_s is None else {"Retry-After": str(max(1, math.ceil(wait_s)))}
    if isinstance(error, BudgetError):
        if wait_s is None or wait_s > PATIENT_S:
            headers |= HOPELESS
        return ApiError(429, "insufficient_quota", words(error), type="insufficient_quota", headers=headers)
    return ApiError(429, "rate_limit_exceeded", words(error), type="requests", headers=headers)


def unavailable(error: CapacityError) -> ApiError:
    """The store cannot be written or read now. What is wrong with it, the log says: a sender cannot put it right."""
    message = "the gateway's store does not answer, so that nothing can be reserved; try again"
    return ApiError(503, "store_unavailable", message, headers={"Retry-After": str(STORE_RETRY_S)})
