"""Prompts as the engine of a model in this process reads them: what is reserved for a call is not less than what it is billed.

What is counted beforehand is texts. A chat template puts marks around each, writes tools in its own words, and may say more than anybody
asked: how much that is, only the engine's own reader knows.
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from anabranch.gateway.dispatch.outgoing import outgoing
from anabranch.gateway.logged_error import raised
from anabranch.gateway.plain_values import said, whole_of
from anabranch.gateway.prompt_tokens import PromptCount
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest, Usage
from anabranch.gateway.providers.usage import TOKENS
from anabranch.web.turns import in_task, plainly

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.deployment_state import Live
    from anabranch.gateway.runtime import Runtime

logger = logging.getLogger(__name__)

# Of each kind: whether they cost anything is asked for, not how much.
_MANY = 10**6


async def engine_count(
    runtime: "Runtime",
    model: str,
    request: UpstreamRequest,
    count: PromptCount,
    sender: str,
    *,
    is_free_too: bool = False,
) -> PromptCount:
    """``count``, or where deployments of the model read the prompt here, and cost something, what it is to them.

    Args:
        runtime: that the request began on.
        model: to be asked.
        request: what it is asked.
        count: of its texts.
        sender: whose it is: senders take turns.
        is_free_too: also where they cost nothing.
    """
    group = runtime.dispatcher.groups[model]
    inside = [live for live in group.lives if live.provider.prompt_tokens is not None]
    if not inside or not (is_free_too or group.worst_nano(Usage(_MANY, _MANY))):
        return count
    found = [await _of(runtime, live, request, sender) for live in inside]
    known = [tokens for tokens in found if tokens is not None]
    if not known:
        # They will refuse it.
        return count
    if len(inside) < len(group.lives):
        return replace(count, at_most=max(count.at_most, *known))
    return replace(count, tokens=max(known), at_most=max(known), is_estimate=False)


async def _of(runtime: "Runtime", live: "Live", request: UpstreamRequest, sender: str) -> int | None:
    count = live.provider.prompt_tokens
    assert count is not None, "who asks has looked"
    try:
        call = (await outgoing(live, request, runtime.dispatcher.turns, sender)).call()
    except UpstreamError:
        return None
    call.sender = sender
    try:
        given = await in_task(lambda: count(call))
        found = plainly(lambda: whole_of(given))
    except Exception as error:
        logger.warning("the provider of deployment %s cannot count a prompt: %s", live.name, raised(error))
        return None
    if given is not None and (found is None or not 0 <= found <= TOKENS):
        logger.warning(
            "the provider of deployment %s cannot count a prompt: %s is no number of tokens from 0 to %d",
            live.name,
            said(given),
            TOKENS,
        )
        return None
    return found
