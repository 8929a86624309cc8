"""Fallbacks for what is a request's own: free of the budget of extra attempts, which is there for outages.

    a prompt too long, a filter's refusal, an answer too large    the next model is asked, at most `FURTHER` of them in one request
    said in words alone, which the sender may have written        one further model
    not supported there, so that nothing was sent                 as many as there are

What others ask of those models is not taken by them: a sender may ask each by its name as often as its limits allow, and `Plan.further`
holds these to the same limits. Where it says no, the request ends with what it was refused for.
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
