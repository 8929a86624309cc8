"""Which models a request may go to by what is known of their prices: none that may cost what nobody can say."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from anabranch.gateway.asked import Asked
from anabranch.web.api_error import ApiError, wrong_field

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime
    from anabranch.routers.contract.query import Candidate

HOW = "set price (input_usd and output_usd; 0 if it costs nothing), or limits.allow_unpriced"


async def payable(
    runtime: "Runtime", asked: Asked, candidates: Sequence["Candidate"], is_limited: Callable[[], Awaitable[bool]]
) -> tuple["Candidate", ...]:
    """The candidates of which it is known what they cost, in their order; where no money is limited, those without any price too.

    Args:
        runtime: that the request is on.
        asked: what it asks for.
        candidates: at least one.
        is_limited: whether a budget, or the request's own limit, applies to it.

    Raises ApiError (400) if none is left, for what is wrong with the first.
    """
    kept, refused = [], list[ApiError]()
    for one in candidates:
        error = await refusal(runtime, one.model, asked, is_limited)
        if error is None:
            kept.append(one)
        else:
            refused.append(error)
    if not kept:
        raise refused[0]
    return tuple(kept)


async def refusal(
    runtime: "Runtime", model: str, asked: Asked, is_limited: Callable[[], Awaitable[bool]]
) -> ApiError | None:
    """Why a model may not be asked for this: a price is missing; None if it may. Arguments as those of `payable`."""
    group = runtime.dispatcher.groups.get(model)
    if group is None or runtime.config.limits.allow_unpriced:
        return None
    for live in group.lives:
        if not live.deployment.is_priced:
            if await is_limited():
                return ApiError(400, "model_not_priced", no_price(group.name), param="model")
            continue
        lacking = asked.lacks(live.price, live.provider.holds_tool_calls)
        if lacking is not None:
            field, what = lacking
            if what is None:
                message = f"must say how often the tool may be used at most: nobody knows what {group.name} would cost without that"
            else:
                message = f"asks for what {group.name} has no price for: {what}; leave it out, or have its price set"
            return wrong_field(field, message, code="unpriced")
    return None


def no_price(model: str) -> str:
    """What is said of a model without a price, where money is limited."""
    return f"nobody knows what {model} costs, and a budget applies to this request; whoever runs the gateway can {HOW}"
