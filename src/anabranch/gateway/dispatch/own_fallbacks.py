"""Fallbacks for what is a request's own: free of the budget of extra attempts, which is there for outages.

    a prompt too long, a filter's refusal, an answer too large    the next model is asked, at most `FURTHER` of them in one request
    said in words alone, which the sender may have written        one further model
    not supported there, so that nothing was sent                 as many as there are

Nothing else bounds them. A request asks each model of its chain once so, and is one of those that its sender's limits allow: none of these
models is asked more often than by as many requests that name it. (A program asks as often as `limits.strategy_calls` lets it.) To count
what comes of them, or to make them wait for each other, would take answers from senders whose prompts are merely long.
"""

from anabranch.gateway.providers.provider import Failure, FailureKind

# Of the request itself, whichever deployment of the model had it.
OWN: frozenset[FailureKind] = frozenset({"excess", "context", "filter", "unsupported"})

# Further models that one request is asked of. What is beyond costs extra attempts, as after an outage.
FURTHER = 3


def is_free(failure: Failure, further: int) -> bool:
    """Whether the next model is asked beside the budget of extra attempts, by a request that was asked of so many further ones so."""
    if failure.cause not in OWN:
        return False
    return failure.kind == "unsupported" or further < (1 if failure.kind == "request" else FURTHER)
