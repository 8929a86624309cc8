"""What a deployment is to be sent, and what it is called when a provider fails at that or at anything else."""

import logging
from dataclasses import dataclass, replace
from functools import partial

from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.provider_fault import checked
from anabranch.gateway.dispatch.retry import OUTCOME
from anabranch.gateway.logged_error import plain, raised
from anabranch.gateway.providers.provider import Failure, HttpCall, UpstreamError, UpstreamRequest
from anabranch.web.large_json import LARGE
from anabranch.web.turns import Turns, plainly

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is to be sent, before it takes a place among the deployment's attempts.

    Attributes:
        live: the deployment.
        request: as it is meant for that.
        made: of it; or why it cannot be sent there.
    """

    live: Live
    request: UpstreamRequest
    made: HttpCall | UpstreamError

    def call(self) -> HttpCall:
        """Raises UpstreamError where it cannot be sent."""
        if isinstance(self.made, UpstreamError):
            raise self.made
        return self.made


async def outgoing(live: Live, request: UpstreamRequest, turns: Turns, sender: str) -> Outgoing:
    """What a deployment is to be sent; a large request is put into its form in another thread, where senders take ``turns``.

    What goes wrong is of a kind that is held against nobody but the request. Nothing has been sent yet: whatever it is comes of what is in
    the request, be it that the provider has a fault that it meets.
    """
    if request.num_bytes > LARGE:
        return await turns.run(sender, partial(_outgoing, live, request))
    return _outgoing(live, request)


def _outgoing(live: Live, request: UpstreamRequest) -> Outgoing:
    try:
        return Outgoing(live, request, _built(live, request))
    except UpstreamError as error:
        return Outgoing(live, request, error)


def _built(live: Live, request: UpstreamRequest) -> HttpCall:
    try:
        try:
            return plainly(lambda: live.provider.build(request))
        except UpstreamError as error:
            failure = checked(error).failure
    except Exception as error:
        logger.error("the provider of deployment %s cannot send a request: %s", live.name, raised(error))
        message = f"the request cannot be put into the form that {live.name} takes ({type(plain(error)).__name__})"
        raise UpstreamError(Failure(kind="unsupported", message=message)) from None
    kind = failure.kind if OUTCOME[failure.kind] == "ignored" else "request"
    # The status is of no upstream.
    raise UpstreamError(replace(failure, kind=kind, status=None))
